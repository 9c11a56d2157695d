"""Text and questions from files, or by name from Hugging Face datasets."""
