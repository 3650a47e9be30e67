"""Rounding a matrix to a type: the search for scales, and rounding to nearest. Tensors in, tensors out."""
