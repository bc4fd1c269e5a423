"""The model of a calibration, and what its recipes ask, in this process or in one of a cluster."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from quantcli.calibration import memory
from quantcli.calibration.loaded import CalibrationRun
from quantcli.calibration.methods.base import Method, methods_of
from quantcli.calibration.policy import Policy, Quantized, unreached
from quantcli.calibration.replay.devices import free_memory, open_device
from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.resources import Resources
from quantcli.calibration.sets.identity import digest_of, edits_of
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.spec import FLOAT_NAMES, torch_dtype
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress
from quantcli.core.text import size
from quantcli.planning.plan import Plan, quantized_items
from quantcli.planning.reach import next_token_layer
from quantcli.recipe.fields import Calibration
from quantcli.schemes.base import Scheme


def block_of(plan: Plan) -> Calibration:
    """The recipe's `calibration`, or its defaults."""
    return plan.recipe.file.calibration or Calibration()


def skeleton_of(plan: Plan, *, trust_remote_code: bool) -> Skeleton:
    """The model, with the next-token layer if one of its modules is measured.

    Raises InputError if transformers cannot build it, or no decoder stack is found.
    """
    layer = next_token_layer(plan.checkpoint)
    followed = layer is not None and any(layer.reads(module) for module in plan.measured)
    return Skeleton(
        plan.checkpoint,
        dtype_of(plan),
        trust_remote_code=trust_remote_code,
        next_token=layer if followed else None,
    )


def runs_of(
    plans: Sequence[Plan],
    skeleton: Skeleton,
    batches: Sequence[Batch],
    resources: Resources,
    progress: Progress,
) -> list[CalibrationRun]:
    """The calibrations of some plans that see the same inputs, with one replay. batches: the samples,
    and the probe at last.

    Raises InputError for modules that no replay reaches, and for siblings in several layers;
    MachineError if memory does not suffice.
    """
    device = open_device(resources.device)
    policies = [policy_of(plan) for plan in plans]
    layers = _layers(skeleton)
    for plan, policy in zip(plans, policies, strict=True):
        _check_reached(layers, policy, methods_of(plan))
        _check_siblings(layers, policy)
    needed = max(memory.of_methods(plan, resources.workers) for plan in plans)
    budget = memory.states_budget(skeleton, resources.workers, resources.max_memory, needed)
    limit = "80 % of the free memory" if resources.max_memory is None else "--max-memory"
    progress.detail(
        f"hidden states: up to {size(budget)} in memory, which {limit} leaves next to one layer, and "
        "the rest in the calibration's folder"
    )
    _check_memory(skeleton, device, progress)
    workers = 1 if policies[0].inputs == "running" else resources.workers
    replay = Replay(skeleton, batches, device=device, workers=workers)
    replay.report_to(progress, len(batches) - 1)
    all_methods = [method for plan in plans for method in methods_of(plan)]
    # copies of hidden states: a layer's inputs, its outputs, and what methods hold of them
    copies = 2 + max((method.hidden_states for method in all_methods), default=0)
    return [
        CalibrationRun(
            replay,
            policy,
            methods_of(plan),
            workers,
            budget // copies,
            digest_of(edits_of(plan)),
        )
        for plan, policy in zip(plans, policies, strict=True)
    ]


def dtype_of(plan: Plan) -> str:
    """The dtype to compute in, by its safetensors name."""
    dtype = block_of(plan).dtype
    return plan.serving_dtype if dtype == "auto" else FLOAT_NAMES[dtype]


def policy_of(plan: Plan) -> Policy:
    """What a plan asks, by module."""
    block = block_of(plan)
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
        if module not in layers and must_be_reached(quantized.scheme, methods)
    ]
    if outside and policy.uncalibrated != "dynamic":
        raise unreached(outside, policy.quantized[outside[0]].rule)


def must_be_reached(scheme: Scheme, methods: Sequence[Method]) -> bool:
    """Whether a module cannot do without tokens."""
    return any(m.name in scheme.methods and m.must_be_reached(scheme) for m in methods)
