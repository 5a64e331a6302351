"""Reading and writing what others use: Hugging Face folders, GGUF, tokenizers. Loading executes no code."""
