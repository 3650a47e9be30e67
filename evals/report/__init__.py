"""The report of an artifact: how it is stored and how it is shown in a terminal."""
