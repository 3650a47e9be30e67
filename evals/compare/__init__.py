"""Compare reports: differences, gates, and the decision whether an artifact may ship."""
