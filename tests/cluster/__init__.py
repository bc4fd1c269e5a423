"""What a Ray cluster of several nodes does, and what it survives: `make test-ray`."""
