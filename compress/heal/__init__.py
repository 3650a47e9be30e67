"""Healing: the codes of a quantized model stay, what multiplies them is trained against the model it was made from."""
