"""Statistics for llama.cpp's quantizer: which input columns of every linear matter, written as an importance matrix."""
