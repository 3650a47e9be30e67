"""The modules that run on the measured device (it may be this machine): bench, logits, facts of the machine."""
