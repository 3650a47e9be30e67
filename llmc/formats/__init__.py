"""Formats on disk, read and written: models, quantization types and their packing, manifests."""
