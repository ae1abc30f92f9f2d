"""What is remembered: the databases, and the intents of operations that are under way."""
