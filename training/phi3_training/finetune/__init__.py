"""Makes the base model, fine-tunes it on the prepared chats and merges the result."""
