"""What belongs to Prompt flow: store, connection, questions, bundle, server, chat page."""
