"""Quality: perplexity, KL divergence and tasks of an artifact in its own runtime."""
