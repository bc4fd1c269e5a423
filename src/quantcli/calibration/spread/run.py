"""A calibration by a crew: which way it is shared, and where its folder must be seen."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from quantcli.calibration.building import block_of, dtype_of
from quantcli.calibration.calibrate import Calibrator, Share
from quantcli.calibration.methods.base import methods_of
from quantcli.calibration.resources import Resources
from quantcli.calibration.spread.crew import ClusterCrew, Crew
from quantcli.calibration.spread.layers import LayerTasks
from quantcli.calibration.spread.passes import SharedPasses
from quantcli.calibration.spread.worker import Work
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.remote.file import RemoteFile
from quantcli.checkpoint.spec import torch_dtype
from quantcli.core.cluster.connect import connect
from quantcli.core.cluster.sources import identities, see_sources
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.planning.plan import Plan


def by_layers(plans: Sequence[Plan]) -> bool:
    """Whether layers are tasks: they are independent, and a method needs all samples in one place."""
    independent = all(block_of(plan).inputs == "float" for plan in plans)
    return independent and not all(method.divisible for plan in plans for method in methods_of(plan))


def work_of(
    plans: Sequence[Plan], shares: Sequence[Share], batches: Sequence[Batch], resources: Resources
) -> Work:
    """A calibration, as the processes of a crew are given it. batches: with the probe at last."""
    folders = [share.store.folder.absolute() for share in shares]
    alone = replace(resources, executor=None)
    return Work(secrets.token_hex(8), plans, batches, alone, folders)


def on_cluster(shares: Sequence[Share], work: Work, resources: Resources, progress: Progress) -> None:
    """Measure all layers that are not done yet, on the nodes of a cluster.

    InputError for a model in memory, MachineError if a node does not see the model or the calibration's
    folder, or has another kind of CPU.
    """
    if work.plans[0].checkpoint.in_memory:
        raise InputError(
            "a model in memory cannot be calibrated on a cluster", fix="save it, and give the folder"
        )
    assert resources.executor is not None
    with connect(resources.executor, progress) as cluster:
        cluster.check_alike()
        cluster.everywhere(see_sources, common=identities(_weights(work)), progress=progress)
        for folder in dict.fromkeys(work.stores):
            cluster.check_shared(folder, "--calibration")
        calibrate(shares, work, ClusterCrew(cluster, work, resources.task_workers), progress)


def _weights(work: Work) -> list[Path]:
    """Files of the model in a folder; one that is elsewhere is checked when it is read."""
    checkpoint = work.plans[0].checkpoint
    files = (checkpoint.path / name for name in sorted(checkpoint.shards))
    return [file for file in files if not isinstance(file, RemoteFile)]


def states_nbytes(plan: Plan, tokens: int) -> int:
    """Bytes of the hidden states of some tokens at one place of the model, as config.json has them."""
    width = plan.checkpoint.text_config.size("hidden_size") or 0
    return tokens * width * torch_dtype(dtype_of(plan)).itemsize


def calibrate(shares: Sequence[Share], work: Work, crew: Crew, progress: Progress) -> None:
    """Measure all layers that are not done yet. The files are those of threads."""
    if by_layers(work.plans):
        tokens = sum(batch.input_ids.numel() for batch in work.batches)
        LayerTasks(shares, crew, progress, states_nbytes(work.plans[0], tokens)).run()
        return
    if block_of(work.plans[0]).inputs == "running":
        progress.detail("`inputs: running` goes sample by sample: it runs in this process alone")
        Calibrator(shares, progress).run()
        return
    passes = SharedPasses(crew)
    passes.recipes = [share.calibration for share in shares]
    others = [replace(share.calibration, others=passes) for share in shares]
    shared = [replace(share, calibration=run) for share, run in zip(shares, others, strict=True)]
    Calibrator(shared, progress).run()
