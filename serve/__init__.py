"""The web page, which is also a Hugging Face Space (README.md)."""
