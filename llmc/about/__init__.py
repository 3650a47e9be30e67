"""What an artifact and an installation are: inspect, verify, doctor."""
