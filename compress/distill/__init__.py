"""Distillation: a smaller float model is trained to predict the next-token distributions of a larger one."""
