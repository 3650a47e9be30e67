"""llmc's own folder form for weights on GGUF's block grids."""
