"""A calibration that many processes share: `worker` is what runs in each, `passes` and `layers` are the
two ways to share it, and `crew` does requests on a cluster."""
