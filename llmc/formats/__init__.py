"""Formats on disk: model folders, GGUF files, ONNX folders, quantization types and their packing, manifests."""
