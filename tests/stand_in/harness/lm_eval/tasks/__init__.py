"""The list of tasks."""


class TaskManager:
    """Knows the names of tasks."""

    all_tasks = ("hellaswag", "piqa")
