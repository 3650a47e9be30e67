"""Distillation: a smaller float model is trained to say what a larger one says."""
