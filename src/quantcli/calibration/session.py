"""From a plan to a calibration: its identity, its text, and the run itself."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from quantcli import __version__
from quantcli.calibration import memory
from quantcli.calibration.calibrate import Calibrator, Share
from quantcli.calibration.loaded import CalibrationRun
from quantcli.calibration.memory import BATCH_TOKENS
from quantcli.calibration.methods.base import Method, methods_of
from quantcli.calibration.policy import Policy, Quantized, unreached
from quantcli.calibration.replay.devices import (
    free_memory,
    is_out_of_memory,
    open_device,
    too_little_memory,
)
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.report import TAKEN_FROM, expert_tokens
from quantcli.calibration.resources import Resources
from quantcli.calibration.store import (
    Key,
    Store,
    check_free,
    check_store,
    data_of,
    digest_of,
    groups_of,
    load_measured,
    reports,
)
from quantcli.calibration.text.dataset import (
    Batch,
    TextSource,
    check_length,
    check_source,
    load_dataset,
    model_limits,
    source_digest,
)
from quantcli.calibration.text.examples import NAME, Examples
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.checkpoint.spec import FLOAT_NAMES, torch_dtype
from quantcli.checkpoint.tensors import read_bytes
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress
from quantcli.core.place import check_calibration, check_writable
from quantcli.core.text import size
from quantcli.planning.measured import Measured
from quantcli.planning.plan import Plan, quantized_items
from quantcli.planning.reach import next_token_layer
from quantcli.recipe.fields import Calibration
from quantcli.schemes.base import Scheme

PROBE_TOKENS = 32  # of one sample: enough to follow tensors through a layer


@dataclass(frozen=True)
class Session:
    """A calibration that was checked as far as headers and files allow."""

    plan: Plan
    folder: Path
    source: TextSource
    key: Key
    layers_done: int
    complete: bool

    def memory_nbytes(self, workers: int) -> int:
        """Bytes that one decoder layer and the work on it take, from headers; hidden states not."""
        return memory.needed(self.plan, workers)

    @property
    def states_nbytes(self) -> int:
        """Bytes of hidden states on disk at a time, at most: of two layers, as config.json has them."""
        hidden = self.plan.checkpoint.text_config.get("hidden_size")
        size = hidden if isinstance(hidden, int) and hidden > 0 else 0
        itemsize = torch_dtype(_dtype(self.plan)).itemsize
        return 2 * self.source.samples * self.source.length * size * itemsize


def prepare_session(
    plan: Plan,
    folder: Path,
    *,
    out: Path | None = None,
    fresh: bool = False,
    examples: Examples | None = None,
) -> Session:
    """Run all checks that need no weights. out: the folder of the checkpoint to be written. examples:
    the data, in place of what the recipe names.

    InputError if the recipe names no data, or data that does not exist; and if `folder` holds another
    calibration, or cannot hold one.
    """
    check_calibration(folder, plan.checkpoint.path, out)
    source = _source(plan, examples)
    if plan.checkpoint.in_memory:
        check_source(source, plan.checkpoint.path, "give the `tokenizer` of the model, or token ids")
    else:
        check_source(source, plan.checkpoint.path)
    check_length(source, model_limits(plan.checkpoint.text_config)[0])
    _check_running(plan)
    key = Key(
        model=content_digest(plan.checkpoint),
        recipe=asked(plan),
        data=source_digest(source, plan.checkpoint.path),
    )
    done, layers = check_store(folder, key, fresh=fresh)
    complete = 0 < layers == done and not any(folder.glob("*states-*"))  # which are to be deleted
    if not complete:
        check_writable(folder)
        check_free(folder)
    return Session(plan, folder, source, key, done, complete)


def _source(plan: Plan, examples: Examples | None) -> TextSource:
    recipe, block = plan.recipe, _block(plan)
    if block.data is None:
        methods = methods_of(plan)
        need = [i.module for i in quantized_items(plan) if _must_be_reached(i.scheme, methods)]
        why = f"`{(need or plan.measured or ('',))[0]}`"
        if recipe.methods and not need:  # clips alone calibrate because a method does
            why = "`kv_cache`" if recipe.cache else recipe.methods[0].results[0]
        raise InputError(
            f"{why} needs calibration data, and the recipe names none",
            where=recipe.where("calibration") if recipe.file.calibration else str(recipe.document.path),
            fix="give the recipe `calibration: {data: FILE}`, or --set calibration.data=FILE",
        )
    return TextSource(
        data=recipe.data_path(),
        where=recipe.where("calibration", "data") if examples is None else NAME,
        samples=block.samples,
        length=block.length,
        seed=block.seed,
        pack=block.pack,
        batch_tokens=_batch_tokens(plan, block),
        examples=examples,
    )


def _must_be_reached(scheme: Scheme, methods: Sequence[Method]) -> bool:
    """Whether a module cannot do without tokens."""
    return any(m.name in scheme.methods and m.must_be_reached(scheme) for m in methods)


def _check_running(plan: Plan) -> None:
    """InputError for a method that cannot take inputs that depend on the order of the samples."""
    if _block(plan).inputs != "running":
        return
    if _block(plan).all_tokens:
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


def _block(plan: Plan) -> Calibration:
    """The recipe's `calibration`, or its defaults."""
    return plan.recipe.file.calibration or Calibration()


def load(session: Session) -> Measured:
    """A finished calibration."""
    _, layers = check_store(session.folder, session.key)
    return load_measured(session.folder, layers)


def load_for(plan: Plan, folder: Path) -> Measured:
    """The finished calibration in `folder`, if it is of this plan; its text may be any.

    InputError for one that is not finished, damaged, or of something else.
    """
    key = Key(content_digest(plan.checkpoint), asked(plan), data_of(folder))
    done, layers = check_store(folder, key)
    if not 0 < layers == done:
        what = "no finished calibration is there"
        raise InputError(what, where=str(folder), fix="give the folder that `quantize` kept")
    return load_measured(folder, layers)


def run(session: Session, resources: Resources, progress: Progress, *, fresh: bool = False) -> None:
    """Calibrate. An interrupted run is continued after its last finished layer."""
    plan = session.plan
    device = open_device(resources.device)
    progress.phase("building the model, without its weights")
    # before the tokenizer, which reads config.json as well and would be blamed for it
    layer = next_token_layer(plan.checkpoint)
    followed = layer is not None and any(layer.reads(module) for module in plan.measured)
    skeleton = Skeleton(
        plan.checkpoint,
        _dtype(plan),
        trust_remote_code=resources.trust_remote_code,
        next_token=layer if followed else None,
    )
    positions, vocabulary = model_limits(plan.checkpoint.text_config)
    source = session.source
    progress.phase(f"reading text: {source.samples} samples of {source.length} tokens of {source.data}")
    dataset = load_dataset(
        source,
        plan.checkpoint.path,
        positions=positions,
        vocab_size=vocabulary,
        trust_remote_code=resources.trust_remote_code,
        say=progress.say,
    )
    policy, methods = _policy(plan), methods_of(plan)
    layers = _layers(skeleton)
    _check_reached(layers, policy, methods)
    _check_siblings(layers, policy)
    states_budget = memory.states_budget(
        skeleton, resources.workers, resources.max_memory, memory.of_methods(plan, resources.workers)
    )
    limit = "80 % of the free memory" if resources.max_memory is None else "--max-memory"
    progress.detail(
        f"hidden states: up to {size(states_budget)} in memory, which {limit} leaves next to one "
        f"layer, and the rest in {session.folder}"
    )
    _check_memory(skeleton, device, progress)
    limit = "80 % of the free memory" if resources.max_memory is None else "--max-memory"
    progress.detail(
        f"hidden states: up to {size(states_budget)} in memory, which {limit} leaves next to one "
        f"layer, and the rest in {session.folder}"
    )
    workers = 1 if policy.inputs == "running" else resources.workers
    batches = [*dataset.batches, _probe(dataset.batches[0])]
    replay = Replay(skeleton, batches, device=device, workers=workers)
    replay.report_to(progress, len(dataset.batches))
    # copies of hidden states: a layer's inputs, its outputs, and what methods hold of them
    copies = 2 + max((method.hidden_states for method in methods), default=0)
    calibration = CalibrationRun(replay, policy, methods, workers, states_budget // copies)
    store = Store(session.folder, session.key, len(skeleton.layers), _tool(plan), fresh=fresh)
    try:
        Calibrator([Share(calibration, store)], progress).run()
    except InputError:
        store.forget()  # there is nothing to continue with
        raise
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise too_little_memory("a layer and its work", error, device) from None
    finally:
        store.close()


def _check_memory(skeleton: Skeleton, device: torch.device, progress: Progress) -> None:
    """MachineError if an accelerator has no memory for the largest layer alone."""
    free = free_memory(device)
    if free is None:
        return
    largest = max((skeleton.nbytes(index) for index in range(len(skeleton.layers))), default=0)
    progress.detail(f"memory of `{device}`: {size(free)} free; the largest layer takes {size(largest)}")
    if free < largest:
        raise MachineError(
            f"memory of `{device}` does not suffice: the largest layer takes {largest:,} bytes, "
            f"{free:,} are free",
            fix="end what else uses the device, or take --device cpu",
        )


def _probe(first: Batch) -> Batch:
    """Some tokens of the first sample."""
    length = PROBE_TOKENS if first.mask is None else min(PROBE_TOKENS, int(first.mask[0].sum()))
    return Batch(first.input_ids[:1, :length], None)


def _dtype(plan: Plan) -> str:
    dtype = _block(plan).dtype
    return plan.serving_dtype if dtype == "auto" else FLOAT_NAMES[dtype]


def _policy(plan: Plan) -> Policy:
    block = _block(plan)
    quantized = {
        item.module: Quantized(
            item.scheme,
            torch_dtype(item.engine_dtypes.weight_scale),
            torch_dtype(item.engine_dtypes.input_scale),
            item.where,
        )
        for item in quantized_items(plan)
    }
    return Policy(
        quantized=quantized,
        siblings=plan.siblings,
        uncalibrated=block.uncalibrated,
        inputs=block.inputs,
        seed=block.seed,
        all_tokens=block.all_tokens,
        attention=plan.cache.layers if plan.cache and plan.cache.measured else {},
        serving_dtype=torch_dtype(plan.serving_dtype),
    )


def _layers(skeleton: Skeleton) -> dict[str, int]:
    """The decoder layer of each module that is in one."""
    return {
        segment.module: index
        for index in range(len(skeleton.layers))
        for experts in skeleton.segments(index).values()
        for segments in experts
        for segment in segments
    }


def _check_siblings(layers: Mapping[str, int], policy: Policy) -> None:
    """InputError for siblings of a recipe that share what is measured, and are in several layers."""
    first: dict[str, str] = {}
    for module in policy.quantized:
        name = policy.siblings.group(module)
        scheme = policy.quantized[module].scheme
        one_scale = scheme.needs_weight_amax and scheme.rounded_by_data
        shares = policy.measures(module) or one_scale
        if name is None or not (shares and policy.siblings.given_to(module)):
            continue
        other = first.setdefault(name, module)
        if layers.get(module) != layers.get(other):
            raise InputError(
                f"`siblings` groups `{module}` and `{other}`, which are in different layers: "
                "calibration goes layer by layer",
                where=policy.quantized[module].rule,
                fix="let a capture group contain the layer's number",
            )


def _check_reached(layers: Mapping[str, int], policy: Policy, methods: Sequence[Method]) -> None:
    """Modules outside of the decoder stack are never shown a token."""
    inside = {module.rpartition(".")[0] for module in layers}
    if unseen := [name for name in policy.attention if name not in inside]:
        raise InputError(
            f"`{unseen[0]}` is in no layer that a replay runs: its cache cannot be measured",
            where="kv_cache",
            fix="leave `kv_cache` out",
        )
    outside = [
        module
        for module, quantized in policy.quantized.items()
        if module not in layers and _must_be_reached(quantized.scheme, methods)
    ]
    if outside and policy.uncalibrated != "dynamic":
        raise unreached(outside, policy.quantized[outside[0]].rule)


def _tool(plan: Plan) -> str:
    """The versions that compute."""
    transformers = importlib.metadata.version("transformers")
    versions = {"quantcli": __version__, "torch": torch.__version__, "transformers": transformers}
    return ", ".join(f"{name} {version}" for name, version in {**versions, **plan.packages}.items())


def summary(session: Session) -> dict[str, Any]:
    """The reports of a finished calibration as one, JSON-able."""
    _, layers = check_store(session.folder, session.key)
    load_measured(session.folder, layers)  # no file is damaged
    layer_reports = list(reports(session.folder, layers))
    modules = {
        name: module_report
        for report in layer_reports
        for name, module_report in report["modules"].items()
    }
    edited: dict[str, list[Any]] = {}
    for report in layer_reports:
        for word, groups in groups_of(report).items():
            edited.setdefault(word, []).extend(groups)
    return {
        "calibration": str(session.folder),
        "layers": layers,
        "modules": modules,
        "experts": expert_tokens(modules),
        "taken_from": {
            name: donor
            for report in layer_reports
            for name, donor in report.get(TAKEN_FROM, {}).items()
        },
        **edited,
        "uncalibrated": sorted({name for report in layer_reports for name in report["uncalibrated"]}),
        "no_tokens": sorted(
            name for name, module_report in modules.items() if not module_report["tokens"]
        ),
        "samples": session.source.samples,
        "length": session.source.length,
    }


_SAMPLED = 4096  # tensors of which some bytes are looked at, and how many bytes of each


def asked(plan: Plan) -> dict[str, Any]:
    """All that decides the statistics, without model and data; flat, so that a difference has a name.

    Schemes that need no data count only if later layers are given their outputs. The name of a scheme
    counts only then, and if codes are chosen against its scales.
    """
    block = _block(plan).model_dump(exclude={"data"})
    identity = {f"calibration.{key}": value for key, value in block.items()}
    identity["target"] = [plan.recipe.target.name, plan.recipe.target.model_dump(mode="json")]
    if plan.recipe.file.siblings:
        identity["siblings"] = plan.recipe.file.siblings
    identity["the serving dtype"] = plan.serving_dtype
    options = {method.name: method.model_dump() for method in plan.recipe.methods}
    if len(options) > 1 or not all(options.values()):  # options name a method, and order is to be named
        identity["methods"] = list(options)
    for name, values in options.items():
        identity |= {f"{name}.{key}": value for key, value in values.items()}
    edits = any(method.edited_as for method in plan.methods)
    quantized_inputs = block["inputs"] != "float"
    measured, others = dict[str, Any](), list[Any]()
    for item in quantized_items(plan):
        how = [item.scheme.model_dump(mode="json"), list(item.engine_dtypes)]
        if item.module in plan.measured:
            named = quantized_inputs or item.asked & item.scheme.row_stats
            measured[item.module] = [item.scheme.name if named else "", *how]
        elif quantized_inputs:
            others.append([item.module, item.scheme.name, *how])
        elif edits:
            others.append(item.module)  # a float module may read the channels that are scaled
    identity["the modules that are measured, and how"] = digest_of(measured)
    identity["the modules that are quantized"] = digest_of(others)
    return identity


def content_digest(checkpoint: Checkpoint) -> str:
    """sha256 of the headers and of some bytes of many tensors: tells a model from one tuned from it."""
    digest = hashlib.sha256(checkpoint.fingerprint.encode())
    tensors = list(checkpoint.on_disk.values())
    step = -(-len(tensors) // _SAMPLED)
    for stored in tensors[:: max(1, step)]:
        size = min(_SAMPLED, stored.spec.nbytes)
        digest.update(read_bytes(stored, (stored.spec.nbytes - size) // 2, size))
    return digest.hexdigest()
