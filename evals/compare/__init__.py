"""Reports side by side: differences, gates, the decision to ship."""
