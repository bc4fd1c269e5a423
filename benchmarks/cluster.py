"""DeepSeek-V3 in bf16, 1.37 TB, on 1 to 64 nodes: what a conversion and a calibration would take.

The output is planned for real, from headers. What its pieces cost is measured on this machine
(cluster_costs.py). Then the schedule of `--executor ray` runs on paper (simulate.py), on nodes whose
cores are those of this machine. Its time is compared with a bound that no schedule can beat: the
slowest resource, if work could be cut anywhere, or the longest chain of tasks. Nodes take as long to
start in both.

    python benchmarks/cluster.py [--costs FILE] [--write] [--json]

--costs: take the costs from a file; if it does not exist, measure them and write them there.
--write: put the tables and the curve into docs.
"""

from __future__ import annotations

import gc
import json
import pickle
import resource
import shutil
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from math import inf
from pathlib import Path

import cluster_costs
import cluster_page
import deepseek
from cluster_costs import KINDS, LENGTH, SAMPLES, STEP, Conversions, Costs, tensors_of
from common import RECIPES, Line, finish, parser, workplace, write_model
from quantcli.calibration.spread.crew import shares_of
from quantcli.convert.spread.chunks import chunk_counts
from quantcli.planning.plan import Copy, Plan, Shard
from simulate import Bound, Cluster, Phase, Storage, Task, bound, makespan

NODES = (1, 2, 4, 8, 16, 32, 64)
CORES, WORKERS = 32, 8  # of a node, and of a task
LINK = 25e9 / 8  # bytes a second: 25 Gbit/s
OBJECTS = "object storage"
STORAGES = (
    Storage("parallel file system", LINK, 40e9, 20e9),
    Storage(OBJECTS, LINK, 100e9, 100e9),
    Storage("disk of one node", LINK, 6e9, 3e9, host=True),
)
STARTUP = 10.0  # seconds: Ray's processes on a node, imports, and the plan
DISPATCH = 0.005  # seconds of the driver for each task
LATENCY = 0.2  # seconds to open, sync and rename a file
BATCHES = SAMPLES * 2 // STEP  # of a recipe that learns
BAR = 1.10  # of the bound, on 16 nodes with a shared store
ERROR = 0.15  # of a prediction


@dataclass(frozen=True)
class Outcome:
    """A workload on some nodes. seconds and bounds: of its stages, one after the other."""

    workload: str
    storage: str
    nodes: int
    seconds: dict[str, float]
    bounds: dict[str, Bound]

    @property
    def total(self) -> float:
        """Seconds of all stages."""
        return sum(self.seconds.values())

    @property
    def over(self) -> float:
        """All stages over their bounds."""
        return self.total / sum(limit.seconds for limit in self.bounds.values())


@dataclass(frozen=True)
class Stage:
    """What is done before the next stage begins. least: the same work without what is done several
    times, for the bound; None: the tasks themselves."""

    tasks: list[Task]
    least: list[Task] | None = None


Stages = Callable[[Cluster], dict[str, Stage]]


@dataclass(frozen=True)
class Planned:
    """A plan, and what planning took."""

    plan: Plan
    line: Line


def planned(recipe: str, model: Path) -> Planned:
    """Plan in this process."""
    from quantcli.checkpoint.checkpoint import open_checkpoint
    from quantcli.planning.planner import make_plan
    from quantcli.recipe.recipe import load_recipe

    gc.set_threshold(200_000, 50, 100)  # as the command does
    began = time.process_time()
    plan = make_plan(load_recipe(RECIPES / f"{recipe}.yaml"), open_checkpoint(model))
    taken = time.process_time() - began
    began = time.process_time()
    content = pickle.dumps(plan, protocol=pickle.HIGHEST_PROTOCOL)
    sent = time.process_time() - began
    began = time.process_time()
    pickle.loads(content)
    loaded = time.process_time() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10
    sizes = f"{plan.checkpoint.nbytes / 1e12:.2f} TB to {plan.nbytes / 1e12:.2f} TB"
    detail = f"{plan.quantized_modules} matrices, {len(plan.shards)} files, {sizes}; "
    detail += f"peak {peak:.0f} MiB; pickled {len(content) / 1e6:.0f} MB, in {sent:.1f} s; "
    detail += f"read again in {loaded:.1f} s"
    return Planned(plan, Line(f"plan of {recipe}", taken, "CPU s", None, detail))


def checked(conversions: Conversions, costs: Costs, model: Path) -> Line:
    """A real conversion of several files and all kinds, against the simulated one on this machine."""
    write_model(model, [spec for kind in KINDS for spec in tensors_of(kind)[:6]], shards=3)
    shards = planned("w8a8_dynamic", model).plan.shards
    tasks = [Task((replace(_shard(shard, costs), wait=0.0),)) for shard in shards]
    used = conversions.of(model)
    shutil.rmtree(model)
    here = Cluster(1, 2, 1, Storage("this machine", inf, inf, inf))
    predicted = sum(phase.cpu for task in tasks for phase in task.phases)
    detail = (
        f"{used.cpu:.2f} CPU s, predicted {predicted:.2f}; {used.wall:.2f} s on two cores, predicted "
    )
    detail += f"{makespan(tasks, here):.2f}"
    return Line("a conversion here: error of its CPU", abs(used.cpu / predicted - 1), "", ERROR, detail)


def converting(plan: Plan, shards: Sequence[Phase], cluster: Cluster) -> list[Task]:
    """The tasks of a conversion on a cluster: files in their order, cut as the real one cuts them."""
    slots = cluster.nodes * cluster.slots
    folder = cluster.storage.name != OBJECTS
    return in_chunks(shards, chunk_counts(plan.shards, slots) if folder else [1] * len(shards))


def _shard(shard: Shard, costs: Costs) -> Phase:
    cpu = nbytes = 0.0
    for item in shard.items:
        kind = "other matrices"
        if isinstance(item, Copy):
            kind = "copies"
        elif ".experts." in item.source.spec.name:
            kind = "experts"
        cpu += costs.converting[kind] * item.source.nbytes / 1e9
        nbytes += item.source.nbytes
    return Phase(cpu, nbytes, shard.nbytes, LATENCY)


@dataclass(frozen=True)
class _Crew:
    """The tasks of a cluster, as a calibration sees them."""

    size: int
    threads: int = WORKERS


def passing(cluster: Cluster, costs: Costs) -> list[Task]:
    """The float pass: tasks that load every layer for their share of the batches, and write the inputs
    of all layers."""
    tasks = []
    for rank, share in enumerate(shares_of(BATCHES, _Crew(cluster.nodes * cluster.slots))):
        batches = len(share)
        phases: list[Phase] = []
        for index in range(deepseek.LAYERS):
            states = _STATES * batches / BATCHES
            forward = costs.forward * batches / BATCHES
            phases += [*_loading(index, costs), Phase(forward, written=states, threads=batches)]
        tasks.append(Task(tuple(phases), node=rank % cluster.nodes))
    return tasks


def passing_in_turn(costs: Costs) -> list[Task]:
    """The pass as it is not done today: a task for each layer, which loads it once and runs each batch
    as soon as the layer before has."""
    batch = Phase(costs.forward / BATCHES, written=_STATES / BATCHES, threads=1)
    # a task has as many threads as slots have cores: that many batches go at a time
    several = Phase(batch.cpu * WORKERS, written=batch.written * WORKERS)
    count = BATCHES // WORKERS
    return [
        Task(
            (
                *_loading(index, costs),
                *(replace(several, needs=(index - 1, 2 + n) if index else None) for n in range(count)),
            )
        )
        for index in range(deepseek.LAYERS)
    ]


_STATES = SAMPLES * LENGTH * deepseek.HIDDEN * 4.0  # bytes of a layer's inputs, float32


def _loading(index: int, costs: Costs) -> tuple[Phase, Phase]:
    """One thread reads; then all put the experts together, in float32."""
    nbytes = float(sum(spec.nbytes for spec in deepseek.layer(index)))
    reading = Phase(costs.reading * nbytes / 1e9, read=nbytes, threads=1)
    return reading, Phase(costs.loading * nbytes / 1e9)


def learning(costs: Costs) -> list[Task]:
    """A task for each layer: load it and its inputs, learn, load it with what it has learned, round."""
    others = costs.learning - costs.steps
    tasks = []
    for index in range(deepseek.LAYERS):
        load = _loading(index, costs)
        phases = (
            *load,
            Phase(read=_STATES),
            Phase(others),
            Phase(costs.steps, threads=2),  # a step is two batches, of a thread each
            *load,
            Phase(costs.rounding, threads=1),
        )
        tasks.append(Task(phases))
    return tasks


def simulated(workload: str, storage: Storage, nodes: int, stages: Stages) -> Outcome:
    """A workload, stage after stage; nodes start once."""
    seconds: dict[str, float] = {}
    bounds: dict[str, Bound] = {}
    startup = STARTUP
    slots = CORES // WORKERS
    for name, stage in stages(Cluster(nodes, CORES, slots, storage)).items():
        cluster = Cluster(nodes, CORES, slots, storage, startup, DISPATCH)
        seconds[name] = makespan(stage.tasks, cluster)
        bounds[name] = bound(stage.least or stage.tasks, cluster)
        startup = 0.0
    return Outcome(workload, storage.name, nodes, seconds, bounds)


def results(outcomes: Sequence[Outcome]) -> list[Line]:
    """A line for each outcome; on 16 nodes with a shared store it has the bar."""
    lines = []
    hosts = {storage.name for storage in STORAGES if storage.host}
    for one in outcomes:
        bar = BAR if one.nodes == 16 and one.storage not in hosts else None
        stages = "; ".join(
            f"{stage} {seconds:.0f} s, bound {one.bounds[stage].seconds:.0f} s ({one.bounds[stage].by})"
            for stage, seconds in one.seconds.items()
        )
        what = f"{one.workload}, {one.storage}, {one.nodes} nodes: time over bound"
        lines.append(Line(what, one.over, "", bar, f"{one.total:.0f} s: {stages}"))
    return lines


def facts(costs: Costs, plain: Plan) -> list[str]:
    """What the simulation stands on, in sentences."""
    gb = plain.checkpoint.nbytes / 1e9
    cpu = sum(_shard(shard, costs).cpu for shard in plain.shards) / gb
    layer, together = _loading(deepseek.DENSE, costs)
    learning_hours = (costs.learning + costs.rounding) / 3600
    return [
        f"The conversion reads {deepseek.FILES} files ({gb / 1e3:.2f} TB), quantizes "
        f"{plain.quantized_modules:,} matrices and writes {len(plain.shards)} files "
        f"({plain.nbytes / 1e12:.2f} TB).",
        f"Conversion, measured: {cpu:.2f} core seconds for each GB of source.",
        "Learning, measured on one layer of full width with 8 experts, and scaled to "
        f"{SAMPLES} samples of {LENGTH} tokens, {cluster_costs.EPOCHS} epochs and 256 experts: "
        f"{learning_hours:.1f} core hours for each layer. Its steps, {costs.steps / 3600:.1f} core "
        "hours of it, use two cores.",
        f"A layer has {layer.read / 1e9:.0f} GB, twice that in float32. One core reads it in "
        f"{layer.cpu:.0f} s, and then all cores of a task load it, in {together.cpu:.0f} core seconds. "
        f"The pass writes {deepseek.LAYERS * _STATES / 1e9:.0f} GB of layers' inputs. Its bound is "
        "that of a pass that loads each layer once.",
        f"A node has {CORES} cores, for {CORES // WORKERS} tasks of {WORKERS}, and a link of "
        f"{LINK / 1e9:.1f} GB/s each way. "
        + "; ".join(
            f"{storage.name}: {storage.read / 1e9:g} GB/s read, {storage.write / 1e9:g} GB/s written"
            for storage in STORAGES
        )
        + f". Starting takes {STARTUP:.0f} s, a task {1000 * DISPATCH:.0f} ms of the driver.",
    ]


def in_turn(costs: Costs) -> list[Line]:
    """What the pass would take if each layer were loaded once."""
    lines, tasks, storage = [], passing_in_turn(costs), STORAGES[0]
    for nodes in NODES:
        cluster = Cluster(nodes, CORES, CORES // WORKERS, storage, STARTUP, DISPATCH)
        usual = makespan(passing(cluster, costs), cluster)
        what = f"the pass with layers in turn, {storage.name}, {nodes} nodes"
        lines.append(Line(what, makespan(tasks, cluster), "s", None, f"{usual:.0f} s as it is"))
    return lines


def in_chunks(shards: Sequence[Phase], counts: Sequence[int]) -> list[Task]:
    """A conversion whose files are written by so many tasks each; one more reads a cut file for its
    hash."""
    tasks: list[Task] = []
    for whole, count in zip(shards, counts, strict=True):
        first = len(tasks)
        share = Phase(whole.cpu / count, whole.read / count, whole.written / count, whole.wait)
        tasks += [Task((share,))] * count
        if count > 1:
            reading = Phase(read=whole.written, wait=LATENCY, threads=1)
            tasks.append(Task((reading,), after=tuple(range(first, first + count))))
    return tasks


def of_pieces(shards: Sequence[Phase], pieces: int) -> list[Line]:
    """What a conversion would take if all files were cut."""
    cut, tasks = (in_chunks(shards, [count] * len(shards)) for count in (pieces, 1))
    lines = []
    for nodes in NODES:
        cluster = Cluster(nodes, CORES, CORES // WORKERS, STORAGES[0], STARTUP, DISPATCH)
        what = f"W8A8, {STORAGES[0].name}, {nodes} nodes: files in {pieces} pieces over whole ones"
        lines.append(Line(what, makespan(cut, cluster) / makespan(tasks, cluster), ""))
    return lines


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--costs", type=Path, metavar="FILE")
    arguments.add_argument(
        "--write", action="store_true", help="write the tables and the curve into docs"
    )
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        lines = []
        if options.costs and options.costs.exists():
            costs = Costs(**json.loads(options.costs.read_text()))
        else:
            conversions = cluster_costs.Conversions(folder, options.rounds)
            costs = cluster_costs.measured(conversions, folder)
            lines.append(checked(conversions, costs, folder / "mixed"))
            if options.costs:
                options.costs.write_text(json.dumps(asdict(costs)))
        deepseek.write_headers(folder / "model")
        recipes = ("w8a8_dynamic", "w4a4_flatquant")
        plans = {recipe: planned(recipe, folder / "model") for recipe in recipes}
    shards = {
        recipe: [_shard(shard, costs) for shard in each.plan.shards] for recipe, each in plans.items()
    }

    def conversion(cluster: Cluster, recipe: str) -> Stage:
        return Stage(converting(plans[recipe].plan, shards[recipe], cluster))

    workloads: dict[str, Stages] = {
        "W8A8": lambda cluster: {"conversion": conversion(cluster, "w8a8_dynamic")},
        "FlatQuant": lambda cluster: {
            "pass": Stage(passing(cluster, costs), passing_in_turn(costs)),
            "layers": Stage(learning(costs)),
            "conversion": conversion(cluster, "w4a4_flatquant"),
        },
    }
    outcomes = [
        simulated(name, storage, nodes, stages)
        for name, stages in workloads.items()
        for storage in STORAGES
        for nodes in NODES
    ]
    turns, pieces = in_turn(costs), of_pieces(shards["w8a8_dynamic"], 4)
    place = NODES.index(16)
    others = [
        f"The pass on 16 nodes and a {STORAGES[0].name}: {turns[place].detail}. If each layer were "
        f"loaded once, and batches went from node to node: {turns[place].value:.0f} s.",
        f"W8A8 on 16 nodes and a {STORAGES[0].name} takes {pieces[place].value:.2f} times as long if "
        "each file is cut into 4 chunks.",
    ]
    if options.write:
        cluster_page.write([*facts(costs, plans["w8a8_dynamic"].plan), *others], outcomes)
    lines += [*(each.line for each in plans.values()), *results(outcomes), *turns, *pieces]
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
