"""`llmc inspect`, `llmc verify` and `llmc doctor`."""
