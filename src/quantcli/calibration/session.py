"""From a plan to a calibration: its identity, its text, and the run itself."""

from __future__ import annotations

import importlib.metadata
import os
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from quantcli import __version__
from quantcli.calibration import memory
from quantcli.calibration.building import block_of, dtype_of, must_be_reached, runs_of, skeleton_of
from quantcli.calibration.calibrate import Calibrator, Share
from quantcli.calibration.memory import BATCH_TOKENS
from quantcli.calibration.methods.base import methods_of
from quantcli.calibration.replay.devices import (
    open_device,
    too_little_memory,
)
from quantcli.calibration.report import expert_tokens
from quantcli.calibration.resources import Resources
from quantcli.calibration.rotation.basis import learn, learned_basis
from quantcli.calibration.sets.identity import Key, key_of
from quantcli.calibration.sets.place import Place, finished, finished_of_texts, place_of
from quantcli.calibration.spread import run as spread
from quantcli.calibration.store import Store, check_free, load_measured, reports
from quantcli.calibration.text.dataset import (
    Batch,
    Dataset,
    TextSource,
    check_length,
    check_source,
    load_dataset,
    model_limits,
    source_digest,
    text_digest,
    tokenizer_files,
)
from quantcli.calibration.text.documents import HUB
from quantcli.calibration.text.examples import NAME, Examples
from quantcli.calibration.text.tokenizer import start_process
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.memory.shortage import is_out_of_memory
from quantcli.core.place import check_calibration, check_writable
from quantcli.core.text import count
from quantcli.planning.measured import Basis, Measured
from quantcli.planning.plan import Plan, quantized_items
from quantcli.recipe.fields import Calibration

PROBE_TOKENS = 32  # of one sample: enough to follow tensors through a layer


@dataclass(frozen=True)
class Session:
    """A calibration that was checked as far as headers and files allow.

    root:   the folder that was given. folder: its own, within that one if it holds several.
    reason: why it is not the calibration that is there; empty if there is none, or it is that.
    basis:  what it is made of; the text of a data set is not known before it is read.
    """

    plan: Plan
    root: Path
    folder: Path
    source: TextSource
    key: Key
    basis: Basis
    layers_done: int
    complete: bool
    reason: str = ""

    @property
    def name(self) -> str:
        """The name of its recipe."""
        return Path(self.plan.recipe.document.path).stem

    def memory_nbytes(self, workers: int) -> int:
        """Bytes that one decoder layer and the work on it take, from headers; hidden states not."""
        return memory.needed(self.plan, workers)

    def states_nbytes(self, *, on_cluster: bool) -> int:
        """Bytes of hidden states on disk at a time, at most, as config.json has them: of two layers; on
        a cluster of all layers, if these are tasks."""
        layers = self.plan.checkpoint.text_config.size("num_hidden_layers")
        places = 2
        if on_cluster and spread.by_layers([self.plan]) and layers:
            places = layers + 1
        return places * spread.states_nbytes(self.plan, self.source.samples * self.source.length)


def prepare_session(
    plan: Plan,
    folder: Path,
    *,
    out: Path | None = None,
    fresh: bool = False,
    examples: Examples | None = None,
    others: Sequence[Session] | None = None,
    data: str | None = None,
) -> Session:
    """Run all checks that need no weights.

    out: the folder of the checkpoint to be written.
    examples, data: samples or a text, in place of what the recipe names.
    others: the sessions so far that share the folder, with any text and edits; None: those that are
        there must have the same.

    InputError if the recipe names no data, or data that does not exist; and if `folder` holds another
    calibration, or cannot hold one.
    """
    check_calibration(folder, plan.checkpoint.path, out)
    source = _source(plan, examples, data)
    _must_be_given(plan, source)
    if plan.checkpoint.in_memory:
        check_source(source, plan.checkpoint.path, "give the `tokenizer` of the model, or token ids")
    else:
        check_source(source, plan.checkpoint.path)
    check_length(source, model_limits(plan.checkpoint.text_config)[0])
    _check_running(plan)
    basis = _basis(plan, source)
    _check_text(plan, basis.text, source.where)
    key = _key(plan, source_digest(source, plan.checkpoint.path))
    taken = None if others is None else [Place(other.folder, other.key) for other in others]
    place = place_of(folder, key, fresh=fresh, taken=taken)
    if not place.complete:
        check_writable(place.folder)
        check_free(place.folder)
    done = place.done, place.complete, place.reason
    return Session(plan, folder, place.folder, source, key, basis, *done)


def _basis(plan: Plan, source: TextSource) -> Basis:
    """What a calibration is made of, as far as files tell."""
    of_ids = source.examples is not None and source.examples.ids
    files = {} if of_ids else tokenizer_files(plan.checkpoint.path)
    return Basis(text_digest(source), files, _tool(plan))


def _must_be_given(plan: Plan, source: TextSource) -> None:
    """InputError for the text of a recipe in a checkpoint, which has its name and its sha256 alone."""
    sha256 = block_of(plan).sha256
    if sha256 is None or source.examples is not None or source.data.startswith(HUB):
        return
    if not os.path.lexists(source.data):
        raise InputError(
            f"text `{Path(source.data).name:.200}` does not exist; its sha256 is {sha256}",
            where=source.where,
            fix="give the file with --data FILE",
        )


def _check_text(plan: Plan, sha256: str | None, where: str) -> None:
    """InputError if the text is not the one whose sha256 the recipe has. sha256: None: not known."""
    asked = block_of(plan).sha256
    if asked is None or sha256 is None or asked == sha256:
        return
    raise InputError(
        f"this is another text than the recipe's: its sha256 is {sha256}, the recipe's is {asked}",
        where=where,
        fix="give the recipe's text with --data FILE; for another one, leave `calibration.sha256` out "
        "of the recipe",
    )


def _key(plan: Plan, data: str) -> Key:
    block = block_of(plan)
    batch = max(1, _batch_tokens(plan, block) // block.length)
    return key_of(plan, block, dtype_of(plan), data=data, batch=batch)


def _source(plan: Plan, examples: Examples | None, data: str | None) -> TextSource:
    recipe, block = plan.recipe, block_of(plan)
    if block.data is None:
        methods = methods_of(plan)
        need = [i.module for i in quantized_items(plan) if must_be_reached(i.scheme, methods)]
        why = f"`{(need or plan.measured or ('',))[0]}`"
        if recipe.methods and not need:  # clips alone calibrate because a method does
            why = "`kv_cache`" if recipe.cache else recipe.methods[0].results[0]
        raise InputError(
            f"{why} needs calibration data, and the recipe names none",
            where=recipe.where("calibration") if recipe.file.calibration else str(recipe.document.path),
            fix="give the recipe `calibration: {data: FILE}`, or --data FILE",
        )
    where = NAME if examples is not None else f"--data {data}" if data is not None else None
    return TextSource(
        data=recipe.data_path() if data is None else data,
        where=where or recipe.where("calibration", "data"),
        samples=block.samples,
        length=block.length,
        seed=block.seed,
        pack=block.pack,
        batch_tokens=_batch_tokens(plan, block),
        examples=examples,
    )


def _check_running(plan: Plan) -> None:
    """InputError for a method that cannot take inputs that depend on the order of the samples."""
    if block_of(plan).inputs != "running":
        return
    if block_of(plan).all_tokens:
        raise InputError(
            "`all_tokens` does not go together with `inputs: running`, whose ranges are of the tokens "
            "that experts are given",
            where=plan.recipe.where("calibration", "all_tokens"),
            fix="set calibration.inputs to quantized or float, or leave out one of the two",
        )
    for method in methods_of(plan):
        if method.against_running is None:
            continue
        reason, change = method.against_running
        items = (i for i in quantized_items(plan) if method.name in i.scheme.methods)
        who = next((f"`{item.module}`" for item in items), f"`{method.name}`")
        raise InputError(
            f"{who} {reason}, which does not go together with `inputs: running`",
            where=plan.recipe.where("calibration", "inputs"),
            fix=f"set calibration.inputs to quantized or float, or change {change}",
        )


def _batch_tokens(plan: Plan, block: Calibration) -> int:
    """Tokens of a batch. 1, for a single sample, if samples are records, which then need no padding, or
    averages are over samples."""
    schemes = list({item.scheme: None for item in quantized_items(plan)})
    if not block.pack or block.inputs == "running" or any(scheme.ordered for scheme in schemes):
        return 1
    limits = [method.batch_tokens(schemes, block.length) for method in methods_of(plan)]
    return min([BATCH_TOKENS, *(limit for limit in limits if limit is not None)])


def load(session: Session) -> Measured:
    """A finished calibration."""
    folder, layers = finished(session.folder, session.key)
    measured = load_measured(folder, layers, session.key.modules)
    if measured.basis is not None:
        _check_text(session.plan, measured.basis.text, session.source.where)
    return measured


def load_for(plan: Plan, folder: Path) -> list[Measured]:
    """The finished calibrations in `folder` that have all that this plan needs, one for each text.

    InputError if there is none that is finished, and for one that is damaged or of something else.
    """
    key = _key(plan, "")
    places = finished_of_texts(folder, key)
    return [load_measured(place, layers, key.modules) for place, layers in places]


def run(session: Session, resources: Resources, progress: Progress, *, fresh: bool = False) -> None:
    """Calibrate. An interrupted run is continued after its last finished layer."""
    run_together([session], resources, progress, fresh=fresh)


def run_together(
    sessions: Sequence[Session],
    resources: Resources,
    progress: Progress,
    *,
    fresh: bool = False,
    later: Sequence[Session] = (),
    texts: dict[str, Dataset] | None = None,
) -> None:
    """Calibrate for several recipes that see the same inputs (`Key.inputs`, `Key.data`), each in a
    folder of its own. Interrupted, the same call continues after the last finished layer.

    later: calibrations of the model that follow: their text is read, too, before anything is measured.
    texts: those that were read, by `Key.data`.
    """
    plan, texts = sessions[0].plan, {} if texts is None else texts
    plans = [session.plan for session in sessions]
    if resources.executor is not None and spread.by_layers(plans):
        here = replace(resources, device="cpu")  # where nothing is computed then
    else:
        here = resources
    device = open_device(here.device)
    if done := min(session.layers_done for session in sessions):
        progress.keeps(f"{count(done, 'layer')} in {sessions[0].folder}")
    if any(session.key.data not in texts for session in (sessions[0], *later)):
        start_process(trust_remote_code=resources.trust_remote_code)
    progress.phase("building the model, without its weights")
    # before the tokenizer, which reads config.json as well and would be blamed for it
    skeleton = skeleton_of(plan, trust_remote_code=resources.trust_remote_code)
    for session in (sessions[0], *later):
        if session.key.data not in texts:
            texts[session.key.data] = _read_text(session, resources, progress)
    dataset = texts[sessions[0].key.data]
    if plan.recipe.file.learns_rotation:
        plans = _with_learned(
            sessions, dataset.batches, len(skeleton.layers), here, progress, fresh=fresh
        )
        skeleton = skeleton_of(plans[0], trust_remote_code=resources.trust_remote_code)
        fresh = False  # what was there is deleted
    batches = [*dataset.batches, _probe(dataset.batches[0])]
    runs = runs_of(plans, skeleton, batches, here, progress)
    with ExitStack() as stack:
        shares = []
        for session, calibration in zip(sessions, runs, strict=True):
            basis = replace(session.basis, text=texts[session.key.data].text)
            _check_text(session.plan, basis.text, session.source.where)
            store = Store(session.folder, session.key, len(skeleton.layers), basis, fresh=fresh)
            stack.callback(store.close)
            shares.append(Share(calibration, store, session.name))
        try:
            if resources.executor is None:
                Calibrator(shares, progress).run()
            else:
                work = spread.work_of(plans, shares, batches, resources)
                spread.on_cluster(shares, work, resources, progress)
        except InputError:
            for share in shares:
                share.store.forget()  # there is nothing to continue with
            raise
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            raise too_little_memory("a layer and its work", error, device) from None


def _with_learned(
    sessions: Sequence[Session],
    batches: Sequence[Batch],
    layers: int,
    resources: Resources,
    progress: Progress,
    *,
    fresh: bool,
) -> list[Plan]:
    """The plans of some sessions with learned rotations, each in its session's folder."""
    plans = []
    for session in sessions:
        store = Store(session.folder, session.key, layers, session.basis, fresh=fresh)
        try:
            learn(
                session.plan,
                session.folder,
                batches,
                progress,
                device=open_device(resources.device),
                workers=resources.workers,
                trust_remote_code=resources.trust_remote_code,
            )
        finally:
            store.close()
        plans.append(replace(session.plan, checkpoint=learned_basis(session.plan, session.folder)))
    return plans


def _read_text(session: Session, resources: Resources, progress: Progress) -> Dataset:
    """The samples. InputError for too few of them, and for text that cannot be read."""
    source, checkpoint = session.source, session.plan.checkpoint
    positions, vocabulary = model_limits(checkpoint.text_config)
    progress.phase(f"reading text: {source.samples} samples of {source.length} tokens of {source.data}")
    return load_dataset(
        source,
        checkpoint.path,
        positions=positions,
        vocab_size=vocabulary,
        trust_remote_code=resources.trust_remote_code,
        say=progress.say,
    )


def _probe(first: Batch) -> Batch:
    """Some tokens of the first sample."""
    length = PROBE_TOKENS if first.mask is None else min(PROBE_TOKENS, int(first.mask[0].sum()))
    return Batch(first.input_ids[:1, :length], None)


def _tool(plan: Plan) -> str:
    """The versions that compute."""
    transformers = importlib.metadata.version("transformers")
    versions = {"quantcli": __version__, "torch": torch.__version__, "transformers": transformers}
    return ", ".join(f"{name} {version}" for name, version in {**versions, **plan.packages}.items())


def summary(session: Session) -> dict[str, Any]:
    """The reports of a finished calibration as one, JSON-able."""
    folder, layers = finished(session.folder, session.key)
    load_measured(folder, layers)  # no file is damaged
    layer_reports = list(reports(folder, layers))
    modules = {
        name: module_report
        for report in layer_reports
        for name, module_report in report.modules.items()
    }
    edited: dict[str, list[Any]] = {}
    for report in layer_reports:
        for word, groups in report.groups.items():
            edited.setdefault(word, []).extend(groups)
    return {
        "calibration": str(session.folder),
        "layers": layers,
        "modules": modules,
        "experts": expert_tokens(modules),
        "taken_from": {
            name: donor for report in layer_reports for name, donor in report.taken_from.items()
        },
        **edited,
        "uncalibrated": sorted({name for report in layer_reports for name in report.uncalibrated}),
        "no_tokens": sorted(
            name for name, module_report in modules.items() if not module_report["tokens"]
        ),
        "samples": session.source.samples,
        "length": session.source.length,
    }
