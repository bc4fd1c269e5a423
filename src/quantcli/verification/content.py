"""What a checkpoint holds: who made it by which recipe, and the size of each type of weights."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.manifest import tool_text
from quantcli.checkpoint.spec import FLOATS
from quantcli.targets.base import StoredCheckpoint
from quantcli.verification.outcome import Maker, SizeReport

FLOAT = "FLOAT"  # the label of what is not quantized


def maker_of(manifest: Mapping[str, Any] | None, config: Settings) -> Maker | None:
    """The tool that made a checkpoint, and its recipe; None if neither manifest nor config.json says.

    All of it is as the checkpoint says: whoever can change the checkpoint can change it.
    """
    if manifest is not None:
        recipe = manifest.get("recipe")
        return Maker(tool_text(manifest.get("tool")), recipe if isinstance(recipe, str) else None)
    block = config.object_of("quantization_config")
    if block is None:
        return None
    producer = block.object_of("producer") or Settings({})
    name = producer.value("name") or block.value("quant_method")
    version = (producer if "version" in producer else block).value("version")
    if not isinstance(name, str):
        return None
    return Maker(f"{name:.40} {version:.40}" if isinstance(version, str) else f"{name:.40}", None)


def sizes_of(stored: StoredCheckpoint) -> list[SizeReport]:
    """The size of the modules of each label, largest first; what is not quantized comes last."""
    tensors = stored.checkpoint.tensors
    groups: dict[str, list[tuple[int, int]]] = defaultdict(list)
    quantized: set[str] = set()
    for module in stored.modules.values():
        specs = [tensor.spec for tensor in module.tensors.values()]
        quantized |= {spec.name for spec in specs}
        n, k = module.shape
        groups[module.layout.label].append((n * k, sum(spec.nbytes for spec in specs)))
    unchecked: dict[str, dict[str, int]] = defaultdict(dict)
    for name, tensor in tensors.items():
        module_name = name.rpartition(".")[0]
        if name not in quantized and (label := stored.unchecked.get(module_name)) is not None:
            quantized.add(name)
            sizes = unchecked[label]
            sizes[module_name] = sizes.get(module_name, 0) + tensor.spec.nbytes
    reports = [
        SizeReport(label, len(parts), sum(n for n, _ in parts), sum(nbytes for _, nbytes in parts))
        for label, parts in groups.items()
    ]
    reports += [
        SizeReport(label, len(own), None, sum(own.values())) for label, own in unchecked.items()
    ]
    reports.sort(key=lambda report: (-report.bytes, report.label))
    rest = [tensor.spec for name, tensor in tensors.items() if name not in quantized]
    floats = [spec for spec in rest if spec.dtype in FLOATS]
    # a stack of experts is one tensor of many modules: what is left is the difference
    whole = sum(tensor.spec.nbytes for tensor in tensors.values())
    left = whole - sum(report.bytes for report in reports)
    return [*reports, SizeReport(FLOAT, len(rest), sum(spec.numel for spec in floats), left)]
