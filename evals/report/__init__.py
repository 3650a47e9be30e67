"""The report of an artifact: its types, its file, and its text for a terminal."""
