"""Rounding of a matrix to a quantization type: the search for scales, and round-to-nearest. Functions of tensors only."""
