"""Sources of models: a folder, a .gguf file or a hub id becomes a Hugging Face folder on this disk."""
