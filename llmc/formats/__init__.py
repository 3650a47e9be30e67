"""What lies on a disk: formats of models, read and written."""
