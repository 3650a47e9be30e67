"""The importance matrix for llama.cpp's quantizer: how important each input column of every linear is."""
