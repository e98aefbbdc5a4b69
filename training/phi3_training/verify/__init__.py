"""What is checked of a finished model: an export compared with it, and its tokens in every "
"place."""
