"""The shards of a run as tasks of a cluster: `run` is the driver's side, `task` the nodes'."""
