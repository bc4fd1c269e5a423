"""A verification from end to end: the depths that were asked for, each after the ones before."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.files import SIGNATURE
from quantcli.checkpoint.hub import find_model
from quantcli.checkpoint.spec import FLOATS
from quantcli.core.cluster.cluster import Cluster
from quantcli.core.cluster.executor import TASK_WORKERS
from quantcli.core.errors import InputError, named
from quantcli.core.events import SILENT, Progress
from quantcli.core.findings import Finding, failed, noted, of_error
from quantcli.core.threads import default_workers
from quantcli.core.untrusted.names import printable
from quantcli.targets.base import StoredCheckpoint
from quantcli.verification.compare import LOOSEST
from quantcli.verification.content import maker_of, sizes_of
from quantcli.verification.limits import Limits, given_limits, own_limits
from quantcli.verification.options import VerifyOptions
from quantcli.verification.outcome import Report
from quantcli.verification.spread.pool import Pool, weight_files
from quantcli.verification.structure import Structure, verify_structure

if TYPE_CHECKING:
    from quantcli.verification.signature.identity import Signed


def verify(
    options: VerifyOptions, progress: Progress = SILENT, cluster: Cluster | None = None
) -> Report:
    """Verify a checkpoint. Depths after a failed one still run if they can.

    cluster: whose nodes read weights; None: threads of this process do. The document is the same.
    Raises InputError if there is nothing to verify, or nothing to verify it with. Writes no files.
    """
    given = given_limits(options)
    against = None if options.against is None else find_model(options.against)
    workers = options.workers or default_workers()
    task_workers = workers if cluster is None else options.workers or TASK_WORKERS
    pool = Pool(task_workers, cluster)
    folder = find_model(str(options.checkpoint))
    signed = None if options.identity is None else _signed(options, folder, pool, progress)
    try:
        structure = verify_structure(folder, options.tp_sizes)
    except InputError as error:
        if signed is None or signed.ok or not os.path.lexists(folder / SIGNATURE):
            raise
        report = Report(named(str(folder)), depths=["structure"])
        report.add([of_error("headers", error)])
        _add_signed(report, signed)
        return report
    report = structure.report
    if signed is not None:
        _add_signed(report, signed)
    elif os.path.lexists(folder / SIGNATURE):
        what = "it is signed, and the signature was not checked: --identity FILE checks it"
        report.add([noted("signature", what, SIGNATURE)])
    own, notes = own_limits(structure.checkpoint.path) if structure.checkpoint else ({}, [])
    report.add(notes)
    structure.limits = Limits(given, own)
    report.limits = structure.limits.to_report(LOOSEST)
    if structure.checkpoint is not None:
        report.made_by = maker_of(structure.manifest, structure.checkpoint.config)
    if structure.stored is None:
        return report
    report.sizes = sizes_of(structure.stored)
    if options.full:
        from quantcli.verification.full import verify_full

        files = weight_files([structure.stored.checkpoint])
        verify_full(structure, Pool(task_workers, cluster, files), progress)
    if against is None:
        return report
    from quantcli.planning.files import source_files
    from quantcli.verification.again.plan import plan_again
    from quantcli.verification.against import verify_against
    from quantcli.verification.reference import open_reference

    reference = open_reference(against)
    report.add(_other_model(structure, reference.checkpoint, workers, progress))
    trust = options.trust_remote_code
    conversion = plan_again(structure, against, options.calibration, trust_remote_code=trust)
    if options.run:
        from quantcli.verification.on_text.corpus import read_texts, text_sources
        from quantcli.verification.on_text.run import Extras, verify_run
        from quantcli.verification.on_text.tasks import read_tasks
        from quantcli.verification.on_text.trace import check_modules

        check_modules(structure.stored, options.layer or ())
        if options.tasks:
            progress.phase("looking the tasks up")
        tasks = read_tasks(options.tasks or ())

        # before the long comparison of weights: an error in the text is reported at once
        corpus = read_texts(text_sources(options), reference.checkpoint, progress, trust=trust)
        engine = None
        if options.served is not None:
            from quantcli.calibration.text.dataset import model_limits
            from quantcli.verification.on_text.endpoint import connect
            from quantcli.verification.on_text.engine import Engine

            endpoint = connect(options.served)
            progress.phase(f"asking the server for its log-probabilities of {endpoint.model:.80}")
            windows = [ids for batch in corpus.batches for ids in batch.input_ids.tolist()]
            vocabulary = model_limits(reference.checkpoint.text_config)[1]
            engine = Engine(endpoint, endpoint.answers(windows, progress), vocabulary)
    both = weight_files([structure.stored.checkpoint, reference.checkpoint])
    pool = Pool(task_workers, cluster, both)
    reference = verify_against(structure, reference, pool, progress, trust=trust)
    if conversion is not None:
        read = source_files(conversion.plan, conversion.plan.shards)
        conversion.run(report, Pool(task_workers, cluster, (*both, *read)), progress)
    unreadable = any(error.check in {"headers", "index", "parameters"} for error in report.errors)
    if options.run and not unreadable and not _unread(structure.stored):
        extras = Extras(options.layer or (), engine, trust, tasks, options.task_docs)
        verify_run(structure, reference, corpus, workers, progress, extras)
    return report


def _other_model(
    structure: Structure, model: Checkpoint, workers: int, progress: Progress
) -> Iterator[Finding]:
    """An error if the model is the one that was converted by its headers, and has other weights."""
    from quantcli.planning.files import other_weights

    source = (structure.manifest or {}).get("source")
    if not isinstance(source, dict) or source.get("fingerprint") != model.fingerprint:
        return
    if (name := other_weights(source.get("files"), model, workers, progress)) is not None:
        what = "this file of MODEL is not the one that was converted, by its hash"
        yield failed("source", what, printable(name), "give the model that was converted")


def _signed(options: VerifyOptions, folder: Path, pool: Pool, progress: Progress) -> Signed:
    """What the check of the signature finds."""
    from quantcli.checkpoint.signature.keys import load_identity
    from quantcli.verification.signature.identity import verify_identity

    assert options.identity is not None
    identity = load_identity(options.identity, options.signer)
    return verify_identity(folder, identity, pool, progress)


def _add_signed(report: Report, signed: Signed) -> None:
    report.depths.append("identity")
    report.add(signed.findings)
    report.count("signature", signed.files)


def _unread(stored: StoredCheckpoint) -> bool:
    """Whether codes would be taken for weights, as a damaged config or description hides their type."""
    read = {*stored.modules, *stored.unchecked}
    return any(
        name.endswith(".weight")
        and tensor.spec.dtype not in FLOATS | {"F64"}
        and name.removesuffix(".weight") not in read
        for name, tensor in stored.checkpoint.tensors.items()
    )
