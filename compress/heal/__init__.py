"""Healing: train the scales of a quantized model against the model that was quantized. Its codes do not change."""
