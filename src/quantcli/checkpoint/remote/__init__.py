"""Models on the Hub, in object storage or on a web server: read without a local copy."""
