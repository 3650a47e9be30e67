"""The report of an artifact: what is in it, how it is stored, and how it is shown in a terminal."""
