"""Statistics for llama.cpp's quantiser: which input columns of every linear matter, written as an importance matrix."""
