"""The formats of artifacts: a class each, and the table of all."""
