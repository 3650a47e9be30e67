"""Find the artifacts that meet latency, memory and quality limits on a device: estimates, profiles, advice."""
