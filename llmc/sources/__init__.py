"""Where a model comes from: a folder, a .gguf file or the hub, as a Hugging Face folder on this disk."""
