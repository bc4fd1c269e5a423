"""What a plan decides, and why: lines for `--verbose` and the log, one for each group of modules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.encoded import decoded_kinds
from quantcli.checkpoint.inspection import fold
from quantcli.core.kernels.machine import available, problem
from quantcli.core.text import count, size
from quantcli.core.threads import default_workers
from quantcli.planning.plan import Plan, quantized_items

if TYPE_CHECKING:
    from quantcli.calibration.session import Session
    from quantcli.checkpoint.spec import TensorSpec
    from quantcli.commands.job import Job
    from quantcli.core.events import Progress

_NAMES = 8  # in a line


def explain_plan(plan: Plan, progress: Progress) -> None:
    """Tell `progress` what a plan decides about modules. Costs nothing if nobody listens."""
    if progress.detailed:
        for line in (*_decoded(plan), *_by_rule(plan), *_kept(plan), *_fused(plan)):
            progress.detail(line)


def explain_job(job: Job[Any], progress: Progress) -> None:
    """Tell `progress` how a conversion will run: threads, kernels, what it continues."""
    if progress.detailed:
        for line in _run(job):
            progress.detail(line)


def explain_session(session: Session, progress: Progress) -> None:
    """Tell `progress` whether a calibration is used, continued or begun."""
    if not progress.detailed:
        return
    same = "it is of this model, with the same options and data"
    if session.complete:
        progress.detail(f"calibration {session.folder} is used: it is complete, and {same}")
    elif session.layers_done:
        layers = count(session.layers_done, "layer")
        progress.detail(f"calibration {session.folder} is continued after {layers}: {same}")
    else:
        reason = session.reason or "no layer is there"
        progress.detail(f"calibration {session.folder} is begun: {reason}")


def _decoded(plan: Plan) -> Iterator[str]:
    for kind in decoded_kinds(plan.checkpoint.tensors.values()):
        modules = count(kind["modules"], "module")
        yield f"decoded while it is read: {modules} in {kind['format']}, such as {kind['first']}"


def _by_rule(plan: Plan) -> Iterator[str]:
    groups: dict[tuple[str, str], list[TensorSpec]] = defaultdict(list)
    for item in quantized_items(plan):
        groups[item.where, item.scheme.name].append(item.source.spec)
    for (where, scheme), specs in groups.items():
        yield f"{where}: {scheme} for {count(specs, 'module')}: {_names(specs)}"


def _kept(plan: Plan) -> Iterator[str]:
    for kept in plan.kept:
        yield f"stays float: {count(kept.tensors, 'tensor')}, {kept.reason}: {_some(kept.names)}"


def _fused(plan: Plan) -> Iterator[str]:
    groups: dict[str, list[str]] = defaultdict(list)
    for module, name in plan.siblings.names.items():
        groups[name].append(module)
    several = {name: modules for name, modules in groups.items() if len(modules) > 1}
    if several:
        name, modules = next(iter(several.items()))
        who = "the recipe or the engine" if plan.siblings.given else "the engine"
        together = f"{who} takes {count(several, 'group')} of siblings together"
        yield f"{together}, such as {name}: {_some(modules)}"


def _run(job: Job[Any]) -> Iterator[str]:
    workers, cores = job.options.workers, default_workers()
    why = "one for each core" if workers == cores else f"as asked for; there are {count(cores, 'core')}"
    yield f"{count(workers, 'worker')}: {why}"
    unused = problem() or "numba and llvmlite are not there"
    yield "compiled kernels: " + ("used" if available() else f"not used, as {unused}")
    yield f"memory: about {size(job.memory)} for row blocks and buffers"
    place = job.out.draft_place
    if job.options.fresh:
        yield f"{place} is begun anew, as --fresh asks"
    elif job.shards_done:
        shards = count(job.shards_done, "shard")
        yield f"{place} is continued: {shards} of the same plan and source; hashes are compared first"
    elif job.out.begun:
        yield f"{place} is there, and no shard of it is complete"


def _names(specs: list[TensorSpec]) -> str:
    return _some([group.name for group in fold(specs)])


def _some(names: Iterable[str]) -> str:
    names = list(names)
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + more
