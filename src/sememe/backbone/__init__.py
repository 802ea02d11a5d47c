"""What is taken from Hugging Face: the only folder that knows the inside of a base model."""
