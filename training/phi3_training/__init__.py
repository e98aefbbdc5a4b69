"""Fine-tunes Phi-3 on chats, serves it and connects it to Prompt flow; `phi3` is its command."""
