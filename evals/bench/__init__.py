"""`llmc bench`: speed and memory of artifacts in their own runtimes, on one or more devices."""
