"""What runs on the device that is measured, also on this machine: bench, logits, facts of the machine."""
