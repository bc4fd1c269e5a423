"""Checks in threads of this process, or as tasks of a cluster: the outcome is the same."""
