"""What lies on a disk: model folders, GGUF files, ONNX folders, types and their packing, manifests."""
