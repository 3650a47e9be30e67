"""Which artifacts keep a device's limits: estimates, profiles, advice."""
