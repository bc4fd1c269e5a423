"""Work on several machines, with Ray. Progress and errors arrive as if it were local.

`executor` reads the option; `connect` gives a `Cluster`; `tasks` is what it runs. What runs on
the nodes is in `worker`. Nothing here knows what the work is.
"""
