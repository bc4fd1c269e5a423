"""A quantized checkpoint as the float one that it stands for: each stored tensor is taken once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cache, partial

from torch import Tensor

from quantcli.checkpoint.checkpoint import CONFIG, Checkpoint, read_table
from quantcli.checkpoint.config.places import quantization_blocks
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Quantization, is_quantized, of_cache
from quantcli.checkpoint.encoded import Encoded, decoded_kinds
from quantcli.checkpoint.files import STALE
from quantcli.checkpoint.header import StoredTensor
from quantcli.core.errors import InputError
from quantcli.core.findings import Finding
from quantcli.core.registry import discover, packages_of
from quantcli.core.text import count
from quantcli.sources.base import AGAIN, Source, SourceFormat, check_scales, encoded, wrong
from quantcli.sources.stacked import split_experts
from quantcli.targets.ascend.types import deq_from_stored
from quantcli.targets.base import (
    StoredCheckpoint,
    Target,
    files_of_targets,
    must_be_readable,
    must_be_sound,
    quantization_of,
    target_of,
)
from quantcli.targets.module_rows import ModuleReader

# Checks of the numbers, which matter to any reader; not those that only serving needs, such as a dtype
# to serve in.
_OF_TENSORS = frozenset({"parameters", "siblings", "experts"})
_FLOAT = "start from the float checkpoint (bfloat16, float16 or float32)"


def decoded(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with an `Encoded` float weight in place of the tensors of a quantized module, and
    with experts one by one.

    One that is float and has no stacks of experts, or is decoded already, as it is. Its notes name the
    format. Raises InputError for an unknown format, for tensors that do not fit it, and for a
    checkpoint that an engine would refuse or misread.
    """
    if checkpoint.undecoded is not None:
        return checkpoint
    source_format = quantization_of(checkpoint) or _by_suffix(checkpoint)
    return split_experts(checkpoint if source_format is None else _decoded(checkpoint, source_format))


def _decoded(checkpoint: Checkpoint, source_format: Quantization) -> Checkpoint:
    notes = [*checkpoint.notes]
    weights, own = _read(checkpoint, source_format, notes)
    findings = own.findings if own else ()
    owner = {part.spec.name: weight for weight in weights for part in weight.parts}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in checkpoint.tensors.items():
        weight = owner.get(name)
        if weight is None and of_cache(name):
            continue  # of no weight: the planner takes it over, or says that it does not
        if weight is None:
            _refuse_code(tensor, checkpoint, weights, findings)
            tensors[name] = tensor
        elif name == weight.parts[0].spec.name:
            if weight.spec.name != name and weight.spec.name in checkpoint.tensors:
                what = f"the module has codes, and `{weight.spec.name}` as well: which is its weight?"
                raise wrong(tensor, what)
            tensors[weight.spec.name] = weight
    if own:
        must_be_sound(own, _OF_TENSORS)
    for kind in decoded_kinds(weights):
        notes.append(f"decoded from {kind['format']}: {count(kind['modules'], 'module')}")
    own_files = {*(each.own_file for each in _formats()), *files_of_targets()}
    stale = own_files & checkpoint.aux.keys()
    return replace(
        checkpoint,
        tensors=tensors,
        undecoded=checkpoint.tensors,
        notes=notes,
        aux={name: size for name, size in checkpoint.aux.items() if name not in stale},
        left_out={**checkpoint.left_out, **dict.fromkeys(sorted(stale), STALE)},
    )


def _read(
    checkpoint: Checkpoint, source_format: Quantization, notes: list[str]
) -> tuple[Sequence[Encoded], StoredCheckpoint | None]:
    """The modules, and the stored checkpoint of the target that read them, if one did."""
    settings, where = _settings(checkpoint)
    reader = _named(settings)
    if reader is not None:
        return list(_weights(reader, Source(checkpoint, settings, where, notes))), None
    target = target_of(checkpoint)
    if not settings and (target is None or target.name == "fp8"):
        reader = next((each for each in _formats() if each.shows(checkpoint)), None)
        if reader is not None:
            return list(_weights(reader, Source(checkpoint, settings, where, notes))), None
    if target is not None:
        own = target.open_stored(replace(checkpoint, tensors=_with_columns(checkpoint.tensors)))
        must_be_readable(own)
        return list(_read_own(own, target.name)), own
    names = sorted({*(each.name for each in _formats()), *discover(Target)})
    modules = count(source_format.modules, "module")
    raise InputError(
        f"model is already quantized: {source_format.format}, {modules}; "
        f"this version decodes {', '.join(names)}",
        where=f"{checkpoint.path}, {source_format.evidence}",
        fix=_FLOAT,
    )


def _weights(reader: SourceFormat, source: Source) -> Iterator[Encoded]:
    """Every module; the kind names the package of a format that is not quantcli's own."""
    package = "".join(f" ({name} {version})" for name, version in packages_of([type(reader)]).items())
    for weight in reader.read(source):
        yield replace(weight, kind=weight.kind + package) if package else weight


def _formats() -> list[SourceFormat]:
    """Every source format that is not that of a target."""
    return [cls() for cls in discover(SourceFormat).values()]


def _by_suffix(checkpoint: Checkpoint) -> Quantization | None:
    """The quantization of a checkpoint with tensors that one format alone has."""
    for each in _formats():
        specs = [spec for spec in checkpoint.specs() if spec.name.rpartition(".")[2] in each.suffixes]
        if specs:
            return Quantization(each.name, len(specs), f"`{specs[0].name}` {specs[0]}")
    return None


def _named(settings: Settings) -> SourceFormat | None:
    """The source format that settings name."""
    word = (settings.text("quant_method") or "").lower()
    return next((each for each in _formats() if word in each.methods), None)


def _with_columns(tensors: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Scales [n] of the n rows of a weight as [n, 1]: the same numbers, as engines read them."""
    columns = dict(tensors)
    for name, stored in tensors.items():
        module, _, suffix = name.rpartition(".")
        codes = tensors.get(f"{module}.weight") or tensors.get(f"{module}.weight_packed")
        rows = codes.spec.shape[:1] if codes and suffix == "weight_scale" else None
        if stored.spec.shape == rows and rows != (1,):
            columns[name] = replace(stored, spec=replace(stored.spec, shape=(*rows, 1)))
    return columns


def _settings(checkpoint: Checkpoint) -> tuple[Settings, str]:
    """The checkpoint's quantization config, and its file; empty if there is none."""
    for block in quantization_blocks(checkpoint.config, checkpoint.text_config):
        return block, CONFIG
    for each in _formats():
        path = checkpoint.path / each.own_file
        if each.own_file and path.is_file():
            table = each.settings_of(read_table(path))
            if "quant_method" not in table:
                table = table.with_values(quant_method=each.name)
            return table, each.own_file
    return Settings({}), CONFIG


def _refuse_code(
    tensor: StoredTensor,
    checkpoint: Checkpoint,
    weights: Sequence[Encoded],
    findings: Sequence[Finding],
) -> None:
    """InputError for a tensor of a quantized module that no reader took: a damaged one, or of a second
    format."""
    spec = tensor.spec
    module, _, suffix = spec.name.rpartition(".")
    beside = _beside()
    if not is_quantized(spec) and suffix not in beside:
        return
    errors = [finding for finding in findings if finding.severity == "error"]
    for finding in errors:
        message = f"{finding.what} {finding.where}"
        if f"`{module}`" in message or f"`{module}." in message:
            raise _error_of(finding, tensor)
    if suffix != "weight" and f"{module}.weight" not in checkpoint.tensors and suffix in beside:
        raise wrong(tensor, f"`{spec.name}` belongs to no weight: the module has no codes")
    if errors:
        raise _error_of(errors[0], tensor)
    if not weights:
        what = f"is {spec}: config.json declares this format, but no tensor uses it"
        raise wrong(tensor, what, _FLOAT)
    example = f"{count(weights, 'module')} such as `{weights[0].spec.name.removesuffix('.weight')}`"
    other = f"`{module}` with its {suffix} {spec} is not"
    raise wrong(tensor, f"formats are mixed: {example} are {weights[0].kind}, and {other}", _FLOAT)


@cache
def _beside() -> frozenset[str]:
    """Suffixes of tensors that accompany codes, in any format."""
    return _BESIDE.union(*(each.suffixes for each in _formats()))


def _error_of(finding: Finding, tensor: StoredTensor) -> InputError:
    where = finding.where or f"`{tensor.spec.name}` in {tensor.file.name}"
    return InputError(finding.what, where=where, fix=finding.fix or AGAIN)


# those that several formats share
_BESIDE = frozenset(
    {
        "weight_scale", "weight_scale_inv", "input_scale", "weight_offset", "weight_zero_point",
        "weight_shape", "weight_g_idx", "scales", "qzeros", "g_idx", "scale_weight", "scale_input",
        "weight_scale_2", "weight_global_scale", "input_scale_2", "input_global_scale",
    }
)  # fmt: skip


def _read_own(stored: StoredCheckpoint, target: str) -> Iterator[Encoded]:
    """Every module that is sound enough to be read. target: its name."""
    for module in stored.modules.values():
        suffixes = [p.suffix for p in module.layout.params if p.suffix in module.tensors]
        parts = [module.tensors[suffix] for suffix in suffixes]
        kind, opened = f"{target} {module.layout.label}", partial(SoundRows, module)
        yield encoded(module.name, module.shape, parts, opened, kind)


class SoundRows(ModuleReader):
    """Rows of a module whose scales are looked at: InputError for one that is not positive."""

    def stored(self, start: int, count: int) -> dict[str, Tensor]:
        """As they are stored; see ModuleReader."""
        tensors = super().stored(start, count)
        layout = self.module.layout
        for param in layout.params:
            suffix = param.suffix
            if suffix == "deq_scale":
                scale = deq_from_stored(tensors[suffix])[0]
            elif (
                param.values in {"positive", "signed"}
                and suffix.startswith("weight_scale")
                and suffix in tensors
            ):
                scale = tensors[suffix].float()
            else:
                continue

            def decode(other: Tensor, suffix: str = suffix) -> Tensor:
                return layout.dequantize({**tensors, suffix: other})

            signed = param.values == "signed"
            check_scales(scale, self.module.tensors[suffix], start, param.rows, decode, signed=signed)
        return tensors
