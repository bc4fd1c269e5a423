"""Stored parameters against what an engine registers, whatever the format."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from quantcli.checkpoint.checkpoint import CONFIG
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.checkpoint.tensors import read_bytes
from quantcli.core.findings import Finding, failed
from quantcli.targets.layouts import SLICES, Param, StoredModule
from quantcli.targets.sidecars import declared_dtype

AGAIN = "convert the model again"


def check_param(param: Param, spec: TensorSpec, label: str, n: int, k: int) -> Iterator[Finding]:
    """Its dtype and shape, for a weight of n x k."""
    where = f"`{spec.name}`"
    if spec.dtype not in param.dtypes:
        what = f"is {spec.dtype}; {label} reads {' or '.join(param.dtypes)}, and would convert by value"
        yield failed("parameters", what, where, AGAIN)
    if not param.fits(spec.shape, n, k):
        expected = str(list(param.shape(n, k))).replace(str(SLICES), "1 or 16")
        what = f"is {list(spec.shape)}; for a weight of {n} x {k} {label} has {expected}"
        yield failed("parameters", what, where, AGAIN)


def check_bias(bias: StoredTensor | None, n: int) -> Iterator[Finding]:
    """That it can be added to n outputs."""
    if bias is not None and (bias.spec.dtype not in FLOATS or bias.spec.shape != (n,)):
        what = f"is {bias.spec}, not {n} floats"
        yield failed("parameters", what, f"`{bias.spec.name}`", AGAIN)


def check_serving_dtype(config: Mapping[str, Any]) -> Iterator[Finding]:
    """What config.json says that the engine computes in."""
    dtype = declared_dtype(config)
    if config and dtype not in {"BF16", "F16"}:
        text = {"F32": "float32", None: "no dtype that is known"}.get(dtype, str(dtype))
        what = f"says {text}; quantized models are served in bfloat16 or float16"
        yield failed("config", what, CONFIG, "set torch_dtype to bfloat16")


def check_shared(
    modules: Iterable[StoredModule], fused_name: Callable[[str], str | None]
) -> Iterator[Finding]:
    """Findings for siblings whose shared parameters differ: the engine keeps one for all of them.

    fused_name: fused name of a module, or None. Unlike labels are reported elsewhere.
    """
    groups: dict[tuple[str, str], list[StoredModule]] = defaultdict(list)
    for module in modules:
        if name := fused_name(module.name):
            groups[name, module.layout.label].append(module)
    for siblings in groups.values():
        for param in siblings[0].constants:
            if param.shared and all(param in module.constants for module in siblings):
                yield from _differing(param, siblings)


def _differing(param: Param, siblings: list[StoredModule]) -> Iterator[Finding]:
    """Who differs from the most."""
    kinds: dict[bytes, list[StoredModule]] = defaultdict(list)
    for module in siblings:
        stored = module.tensors[param.suffix]
        kinds[read_bytes(stored, 0, stored.spec.nbytes)].append(module)
    most, *others = sorted(kinds.values(), key=len, reverse=True)
    for module in (module for kind in others for module in kind):
        what = (
            f"differs from that of `{most[0].name}`: the engine keeps one for both, whichever it "
            "reads last"
        )
        yield failed("siblings", what, f"`{module.name}.{param.suffix}`", AGAIN)
