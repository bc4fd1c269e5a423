"""The simulated scheduler against the real one: three nodes of Ray on this machine, and waiting tasks.

Waiting takes no CPU, so that other work on the machine changes little, and the three nodes can have
more cores than it has. What is compared is what the simulator adds to the lengths of tasks: slots,
order, places, and the driver's time for each task, which is measured first. cluster.py checks what a
real conversion takes.
"""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from typing import Any

from common import Line, finish, parser
from simulate import Cluster, Phase, Storage, Task, bound, makespan

NODES, SLOTS = 3, 4
ERROR = 0.10
NOWHERE = Storage("nowhere", 1.0, 1.0, 1.0)


def wait(common: Any, request: float, progress: Any) -> None:
    """A task of so many seconds."""
    time.sleep(request)


def seconds(cluster: Any, lengths: Sequence[float]) -> float:
    """Wall time of tasks of these lengths."""
    began = time.perf_counter()
    cluster.run(wait, lengths)
    return time.perf_counter() - began


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--tasks", type=int, default=90)
    options = arguments.parse_args()
    from ray.cluster_utils import Cluster as Local

    from quantcli.core.cluster.connect import connect
    from quantcli.core.cluster.executor import Executor

    small = {"num_cpus": SLOTS, "object_store_memory": 100 * 2**20, "include_dashboard": False}
    local = Local(initialize_head=True, head_node_args=small)
    lines = []
    try:
        for _ in range(NODES - 1):
            local.add_node(num_cpus=SLOTS, object_store_memory=100 * 2**20)
        with connect(Executor(local.address)) as cluster:
            seconds(cluster, [1.0] * (NODES * SLOTS * 2))  # starts the processes
            dispatch = seconds(cluster, [0.0] * 200) / 200
            lines.append(Line("driver's time for a task", 1000 * dispatch, "ms"))
            draw = random.Random(0)
            workloads = {
                "alike": [1.5] * options.tasks,
                "mixed": [draw.uniform(0.5, 3.0) for _ in range(options.tasks)],
                "a long one last": [1.0] * options.tasks + [6.0],
            }
            for name, lengths in workloads.items():
                tasks = [Task((Phase(wait=length),)) for length in lengths]
                paper = Cluster(NODES, SLOTS, SLOTS, NOWHERE, dispatch=dispatch)
                real, predicted = seconds(cluster, lengths), makespan(tasks, paper)
                detail = f"real {real:.2f} s, predicted {predicted:.2f} s, bound "
                detail += f"{bound(tasks, paper).seconds:.2f} s; {len(tasks)} tasks on {NODES} nodes"
                what = f"tasks {name}: error of the prediction"
                lines.append(Line(what, abs(real / predicted - 1), "", ERROR, detail))
    finally:
        local.shutdown()
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
