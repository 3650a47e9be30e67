"""Quality of an artifact in its own runtime: perplexity, KL divergence and zero-shot tasks."""
