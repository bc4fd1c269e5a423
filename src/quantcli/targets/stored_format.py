"""A checkpoint on disk as an engine of the vLLM family would load it, whatever its format."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from typing import ClassVar

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import of_cache
from quantcli.checkpoint.header import StoredTensor
from quantcli.checkpoint.roles import roles_of
from quantcli.checkpoint.spec import FLOATS, TensorSpec
from quantcli.checkpoint.tensors import read_bytes, read_tensor
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import LATENTS, Cache, Numerics
from quantcli.targets import tensor_parallel
from quantcli.targets.base import AGAIN, Refusal
from quantcli.targets.kv_cache import (
    LATENT,
    StoredCache,
    attention_layers,
    check_cache,
    is_scale,
    stored_cache,
    unused,
)
from quantcli.targets.layouts import SLICES, Layout, Param, Sides, StoredModule, Values
from quantcli.targets.sidecars import declared_dtype
from quantcli.targets.stored_experts import StoredExperts, uneven_experts
from quantcli.targets.vllm_family import (
    EXPERT,
    expert_sets,
    float_linear,
    fused_groups,
    fused_name,
    fused_siblings,
)


class StoredFormat(ABC):
    """The modules of a checkpoint and the findings of its checks; see `StoredCheckpoint`.

    A format derives from it: `read` takes in its config or description, `check_parameters` gives every
    module a label and calls `check_layout` for the quantized ones. The constructor runs all checks.

    labels:       labels of modules by name, also of float ones; none for a module of unknown label.
    by_module:    stored tensors by module and suffix, in the order of the files.
    unchecked:    see `StoredCheckpoint`; `check_parameters` names them.
    values:       see `StoredCheckpoint`.
    cache:        likewise.
    readable:     `read` sets it to False if the config is too damaged to tell modules' labels.
    float_label:  the label of a module that stays float.
    unregistered: the engine's treatment of a tensor that it does not register.
    """

    float_label: ClassVar[str] = "float"
    unregistered: ClassVar[str] = "the engine stops at it, or leaves it out"

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.serving_dtype = declared_dtype(checkpoint.config) or "BF16"
        self.checked: dict[str, int] = defaultdict(int)
        self.modules: dict[str, StoredModule] = {}
        self.unchecked: dict[str, str] = {}
        self.values: dict[str, Values] = {}
        self.cache: StoredCache | None = None
        self.labels: dict[str, str] = {}
        self.by_module: dict[str, dict[str, StoredTensor]] = defaultdict(dict)
        for name, stored in checkpoint.tensors.items():
            module, _, suffix = name.rpartition(".")
            self.by_module[module][suffix] = stored
        self.readable = True
        self.findings: list[Finding] = list(self.read())
        if self.readable:
            checks = self.check_parameters, self._siblings, self._experts, self._loader, self._kv_cache
            for check in checks:
                self.findings += check()
            self.findings += self._unchecked()
        self.checked["config"] += 1
        self.findings += self.check_config()

    def __reduce__(self) -> tuple[type[StoredFormat], tuple[Checkpoint]]:
        """Another process reads the config again: what looks modules up there cannot be sent."""
        return type(self), (self.checkpoint,)

    # -- what a format gives -------------------------------------------------------------------------

    @abstractmethod
    def read(self) -> Iterable[Finding]:
        """Take in the config or the description; findings of its faults."""

    @abstractmethod
    def check_parameters(self) -> Iterator[Finding]:
        """Labels for all modules; findings of names, dtypes and shapes of their tensors."""

    def check_siblings(self) -> Iterator[Finding]:
        """Findings of siblings, other than different labels and shared parameters."""
        yield from ()

    def check_loader(self) -> Iterator[Finding]:
        """Findings of the way in which the engine looks modules up by name."""
        yield from ()

    def check_config(self) -> Iterator[Finding]:
        """Findings of config.json that do not concern single modules."""
        return _check_serving_dtype(self.checkpoint.config)

    def check_arithmetic(self, module: StoredModule) -> Iterator[Finding]:
        """Findings for numbers of a module that do not follow from its others; here none do."""
        yield from ()

    def declared_cache(self) -> Cache | None:
        """The cache of keys and values that the checkpoint declares; None: a float one."""
        return None

    def unknown_cache(self, tensors: Mapping[str, StoredTensor]) -> str | None:
        """The reason why tensors of the cache are not checked, if the engine has arithmetic for them
        that this version does not have."""
        return None

    def check_offsets(self, cache: StoredCache) -> Iterator[Finding]:
        """Findings of offsets of the cache; here they are not read by the engine."""
        yield from ()

    def fused_name(self, module: str) -> str | None:
        """As `Target.fused_name`."""
        return fused_siblings(module)

    def float_only(self, module: str) -> str | None:
        """The reason why the engine always builds this module as float; None if it does not."""
        return float_linear(module)

    def builds_quantized(self, module: str) -> bool | None:
        """Whether the engine builds a module of this name with quantized weights; None: not known."""
        return None

    def missing(self, module: str, suffix: str) -> Finding:
        """The finding for a required parameter that no file holds."""
        what = f"{self.labels[module]} needs `{module}.{suffix}`, which no file holds"
        fix = f"the engine would compute with uninitialised memory: {AGAIN}"
        return failed("parameters", what, fix=fix)

    def limits(self, module: StoredModule, sides: Sides, devices: int) -> Iterator[str]:
        """Reasons why a module cannot be split; sides: n and k on one of the devices that share it."""
        return tensor_parallel.limits(module, sides, devices, self.modules)

    # -- what all formats share ----------------------------------------------------------------------

    def check_tp(self, size: int) -> Iterator[Finding]:
        """Findings for `size` devices: attention heads, widths, and the limits of the format."""
        config = self.checkpoint.text_config
        return tensor_parallel.check_tp(config, self.modules.values(), size, self.limits)

    def check_layout(
        self,
        module: str,
        layout: Layout,
        numerics: Numerics | None,
        sides: Sides | None = None,
        faults: Iterable[Finding] = (),
    ) -> Iterator[Finding]:
        """Findings for a quantized module's tensors; one without faults goes to `modules`.

        sides:  n and k, if they do not follow from the shape of the codes.
        faults: errors that the format has seen in the module.
        """
        tensors = self.by_module[module]
        codes = tensors[layout.weight.suffix].spec
        if len(codes.shape) != 2:
            yield failed("parameters", f"is {codes}, not a matrix", f"`{codes.name}`", AGAIN)
            return
        n, k = sides or layout.sides(codes.shape)
        errors = list(faults)
        for param in layout.params:
            if param.suffix in tensors:
                errors += _check_param(param, tensors[param.suffix].spec, layout.label, n, k)
            elif param.required:
                errors.append(self.missing(module, param.suffix))
        errors += _check_bias(tensors.get("bias"), n)
        yield from errors
        registered = {param.suffix for param in layout.params} | {"bias"}
        for suffix in sorted(tensors.keys() - registered):
            if of_cache(f"{module}.{suffix}"):
                continue  # of another module in the engine, with a check of its own
            what = f"{layout.label} has no {suffix}: {self.unregistered}"
            yield failed("parameters", what, f"`{module}.{suffix}`", AGAIN)
        if not errors:
            stored = {suffix: tensors[suffix] for suffix in tensors.keys() & registered}
            self.modules[module] = StoredModule(
                module, layout, stored, (n, k), self.serving_dtype, numerics
            )

    def _unchecked(self) -> Iterator[Finding]:
        """A note for each format that engines load and this version cannot read."""
        modules: dict[str, list[str]] = defaultdict(list)
        for module, form in self.unchecked.items():
            modules[form].append(module)
        for form, names in modules.items():
            yield noted("parameters", f"this version cannot check {some(names)}: {form}")

    def _siblings(self) -> Iterator[Finding]:
        """Siblings have one label, and the same bytes of each parameter that the engine keeps once."""
        yield from as_findings("siblings", fused_groups(self.labels))
        self.checked["siblings"] += sum(self.fused_name(name) is not None for name in self.modules)
        yield from _check_shared(self.modules.values())
        yield from self.check_siblings()

    def _experts(self) -> Iterator[Finding]:
        """The experts of a layer are complete and alike."""
        yield from as_findings("experts", expert_sets(self.labels))
        self.checked["experts"] += sum(bool(EXPERT.fullmatch(name)) for name in self.modules)
        yield from uneven_experts(self.checkpoint)
        config = self.checkpoint.text_config
        family = config.text("model_type") or self.checkpoint.config.text("model_type") or ""
        yield from StoredExperts(
            self.checkpoint, family, self.modules, self.builds_quantized
        ).findings()

    def _kv_cache(self) -> Iterator[Finding]:
        """Each layer of attention has the scales of the cache that the engine reads."""
        tensors = {name: t for name, t in self.checkpoint.tensors.items() if of_cache(name)}
        self.cache = cache = stored_cache(tensors, self.declared_cache())
        if cache is None:
            return
        if reason := self.unknown_cache(tensors):
            self.cache = None
            yield noted("cache", reason, f"`{cache.tensors[0].spec.name}`")
            return
        specs = (t.spec for name, t in tensors.items() if is_scale(name))
        self.values |= {spec.name: "positive" for spec in specs if spec.dtype in FLOATS}
        self.checked["cache"] += len(tensors)
        shapes = {name: t.spec.shape for name, t in self.checkpoint.tensors.items()}
        weights = {name.removesuffix(".weight"): shape for name, shape in shapes.items()}
        weights |= {name: module.shape for name, module in self.modules.items()}
        try:
            layers = attention_layers(self.checkpoint, roles_of(self.checkpoint), weights)
        except InputError as error:
            yield noted("cache", f"scales of the cache were not checked: {error.what}", error.where)
            return
        latents = next((layer.name for layer in layers.values() if layer.queries), None)
        if latents is not None and cache.cache != LATENTS:
            yield noted("cache", f"scales of the cache were not checked: {LATENT}", f"`{latents}`")
            return
        self.cache = cache = replace(cache, attention=layers)
        yield from check_cache(cache, layers, tensors)
        yield from self.check_offsets(cache)
        if not cache.served and cache.tensors:
            yield unused(cache)

    def _loader(self) -> Iterator[Finding]:
        """The engine finds every label, and has the quantized modules quantized."""
        self.checked["loader"] += len(self.labels)
        yield from self.check_loader()
        with_note = set()
        for name, module in self.modules.items():
            layout = module.layout
            if reason := self.float_only(name):
                yield failed("loader", f"is {layout.label}: {reason}", f"`{name}`", AGAIN)
            if EXPERT.fullmatch(name):
                if not layout.experts:
                    what = f"the engine has no {layout.label} for experts"
                    yield failed("loader", what, f"`{name}`", AGAIN)
            elif layout.note and layout.label not in with_note:
                with_note.add(layout.label)
                yield noted("loader", layout.note, f"`{name}`")


def as_findings(check: str, refusals: Iterable[Refusal]) -> Iterator[Finding]:
    """Refusals of modules as errors of a check."""
    for refusal in refusals:
        yield failed(check, refusal.what, f"`{refusal.module}`", AGAIN)


def orphan(module: str, suffix: str) -> Finding:
    """The finding for a parameter of a module that has no codes."""
    what = f"`{module}.{suffix}` belongs to no weight: `{module}.weight` is missing"
    return failed("parameters", what, fix=AGAIN)


def some(names: Collection[str]) -> str:
    """The first name, and the number of others."""
    first = next(iter(names))
    return f"`{first}`" + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def recorded_shape(stored: StoredTensor) -> tuple[int, int] | None:
    """n and k in a `weight_shape`; None if it is not two integers."""
    if stored.spec.shape != (2,) or stored.spec.dtype not in {"I64", "I32"}:
        return None
    n, k = read_tensor(stored).tolist()
    return n, k


def _check_param(param: Param, spec: TensorSpec, label: str, n: int, k: int) -> Iterator[Finding]:
    """Findings of a parameter's dtype and shape, for a weight of n x k."""
    where = f"`{spec.name}`"
    if spec.dtype not in param.dtypes:
        what = f"is {spec.dtype}; {label} reads {' or '.join(param.dtypes)}, and would convert by value"
        yield failed("parameters", what, where, AGAIN)
    if not param.fits(spec.shape, n, k):
        expected = str(list(param.shape(n, k))).replace(str(SLICES), "1 or 16")
        what = f"is {list(spec.shape)}; for a weight of {n} x {k} {label} has {expected}"
        yield failed("parameters", what, where, AGAIN)


def _check_bias(bias: StoredTensor | None, n: int) -> Iterator[Finding]:
    """A finding for a bias that cannot be added to n outputs."""
    if bias is not None and (bias.spec.dtype not in FLOATS or bias.spec.shape != (n,)):
        what = f"is {bias.spec}, not {n} floats"
        yield failed("parameters", what, f"`{bias.spec.name}`", AGAIN)


def _check_serving_dtype(config: Settings) -> Iterator[Finding]:
    """A finding for a dtype in config.json in which no engine serves quantized models."""
    dtype = declared_dtype(config)
    if config and dtype not in {"BF16", "F16"}:
        text = {"F32": "float32", None: "no dtype that is known"}.get(dtype, str(dtype))
        what = f"says {text}; quantized models are served in bfloat16 or float16"
        yield failed("config", what, CONFIG, "set torch_dtype to bfloat16")


def _check_shared(modules: Iterable[StoredModule]) -> Iterator[Finding]:
    """Findings for shared parameters that differ between siblings of one label.

    The majority is taken for right.
    """
    groups: dict[tuple[str, str], list[StoredModule]] = defaultdict(list)
    for module in modules:
        if name := fused_siblings(module.name):
            groups[name, module.layout.label].append(module)
    for siblings in groups.values():
        fused = fused_name(siblings[0].name) is not None
        for param in siblings[0].constants:
            if not param.shared or not (fused or param.of_experts):
                continue
            names_by_bytes: dict[bytes, list[str]] = defaultdict(list)
            for module in siblings:
                if stored := module.tensors.get(param.suffix):
                    names_by_bytes[read_bytes(stored, 0, stored.spec.nbytes)].append(module.name)
            (first, *_), *others = sorted(names_by_bytes.values(), key=len, reverse=True)
            for name in (name for names in others for name in names):
                what = f"differs from that of `{first}`: the engine keeps one for both"
                what += "" if param.of_experts else ", whichever it reads last"
                yield failed("siblings", what, f"`{name}.{param.suffix}`", AGAIN)


def unlike_scales(modules: Iterable[StoredModule]) -> Iterator[Finding]:
    """A note on siblings of which each has one scale, and not the same.

    Sources: vllm 0.32.0, model_executor/layers/quantization/utils/w8a8_utils.py:75-107,
    modelopt.py:2146-2157 and, for experts, utils/fp8_utils.py (process_fp8_weight_tensor_strategy_moe).
    """
    groups: dict[str, list[tuple[str, float]]] = defaultdict(list)
    for module in modules:
        scale = float(read_tensor(module.tensors["weight_scale"]).reshape(()))
        groups[fused_siblings(module.name) or module.name].append((module.name, scale))
    unlike = [names for names in groups.values() if len({scale for _, scale in names}) > 1]
    if unlike:
        first, a = unlike[0][0]
        second, b = next(entry for entry in unlike[0] if entry[1] != a)
        more = f" ({len(unlike) - 1} more like it)" if len(unlike) > 1 else ""
        what = (
            f"`{first}` has weight_scale {a:.6g} and `{second}` {b:.6g}{more}: the engine fuses "
            "them, and rounds codes again to the larger scale"
        )
        yield noted("siblings", what)
