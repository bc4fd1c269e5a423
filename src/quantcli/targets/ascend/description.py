"""quant_model_description.json: every tensor must have an entry, with a type of the engine."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import cached_property
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint, read_table
from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.head import lm_head
from quantcli.core.errors import InputError, closest
from quantcli.core.findings import Finding, failed, noted, of_error
from quantcli.core.numerics import LARGEST_SIDE
from quantcli.targets.ascend.latents import TYPE as LATENTS_TYPE
from quantcli.targets.ascend.loader import DESCRIPTION, FLOAT, LARGEST_TP, also_asked
from quantcli.targets.ascend.tensor_parallel import USUAL_TP
from quantcli.targets.ascend.types import MISNAMED, TYPES, UNCHECKED, type_of
from quantcli.targets.base import AGAIN
from quantcli.targets.stored_format import some
from quantcli.targets.vllm_family import MERGED, absent_head, expert_set, stacked_sets

SUFFIXES = {param.suffix for layout in TYPES.values() for param in layout.params} - {"weight"}
# Keys for the checkpoint as a whole by which the engine rounds more than weights: their only values.
# Source: vllm-ascend 182b75ea84, quantization/modelslim_config.py:497-500,1035-1042.
_CACHES = {"kv_cache_type": "C8", "fa_quant_type": LATENTS_TYPE}
_INDEXER = "indexer_quant_type"
_METADATA = re.compile(r"[a-z_]+|.*\.(indexer\.)?quant_type")


class Description:
    """The description of a checkpoint, from any producer.

    entries: values by the names of tensors, without those for the checkpoint as a whole.
    labels:  types by the names of modules, FLOAT ones too, under the engine's names; none for a module
             whose type the engine does not have.
    cache:   the type of the cache of keys and values; None if it stays float.
    group_size, version: as they are there; None if they are missing.
    largest_tp: the largest tensor parallel size that transforms of MXFP4 are made for.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.findings: list[Finding] = []
        table = self._read()
        self.cache = next((_CACHES[key] for key in _CACHES if table.value(key) == _CACHES[key]), None)
        self.group_size, self.version = table.value("group_size"), table.value("version")
        self.largest_tp = self._largest_tp(table)
        self.entries: dict[str, Any] = {
            key: table.value(key)
            for key in table
            if key in checkpoint.tensors or not _METADATA.fullmatch(key)
        }
        self.labels: dict[str, str] = {}
        if self.entries:
            self.findings += self._types()
            self.findings += self._group_size(table)
            self.findings += self._tensors()

    def _read(self) -> Settings:
        path = self.checkpoint.path / DESCRIPTION
        if not path.is_file():
            fix = f"{AGAIN}: without it the engine takes all weights for float"
            self.findings.append(failed("description", f"there is no {DESCRIPTION}", fix=fix))
            return Settings({})
        try:
            table = read_table(path)
        except InputError as error:
            self.findings.append(of_error("description", error))
            return Settings({})
        if table.value(_INDEXER):
            what = f"has `{_INDEXER}`: what the engine rounds by it, next to weights, is not verified"
            self.findings.append(noted("description", what, DESCRIPTION))
        for key, value in _CACHES.items():
            if table.value(key) not in (None, "", value):
                what = f"`{key}` is {table.value(key)!r:.40}; the engine knows {value} alone"
                self.findings.append(failed("description", what, DESCRIPTION, AGAIN))
        if not any("." in key for key in table):
            self.findings.append(failed("description", "describes no tensor", DESCRIPTION, AGAIN))
        return table

    def _largest_tp(self, table: Settings) -> int:
        size = table.value(LARGEST_TP) if LARGEST_TP in table else USUAL_TP
        if isinstance(size, int) and not isinstance(size, bool) and 1 <= size <= LARGEST_SIDE:
            return size
        what = f"has {size!r:.60} as `{LARGEST_TP}`, not a number from 1 to {LARGEST_SIDE}"
        self.findings.append(failed("description", what, DESCRIPTION, AGAIN))
        return USUAL_TP

    def _group_size(self, table: Settings) -> Iterator[Finding]:
        """A finding for a `group_size` other than a type of the description needs."""
        size = table.value("group_size")
        for label in dict.fromkeys(self.labels.values()):
            needed = type_of(label, size).described_group if label in TYPES else None
            if needed is None or size is None or (size == needed and size is not True):
                continue
            what = f"has `group_size` {size!r:.60}; {label} needs {needed}"
            yield failed("description", what, DESCRIPTION, AGAIN)

    def _types(self) -> Iterator[Finding]:
        """Findings of types that do not exist, and of tensors whose type is not their module's."""
        unknown: dict[str, list[str]] = defaultdict(list)
        for key, value in self.entries.items():
            if not isinstance(value, str):
                yield failed("description", f"`{key}` is {value!r:.60}, not a type", DESCRIPTION, AGAIN)
            elif key.endswith((".weight", ".weight_packed")):
                if value not in {FLOAT, *TYPES, *UNCHECKED}:
                    unknown[value].append(key)
                if MISNAMED.get(value, value) in {FLOAT, *TYPES, *UNCHECKED}:
                    # Source: vllm-ascend 182b75ea84, quantization/modelslim_config.py:1029-1031
                    self.labels[key.rpartition(".")[0]] = MISNAMED.get(value, value)
        for value, keys in unknown.items():
            yield _unknown_type(value, keys)
        for key, value in self.entries.items():
            module, _, suffix = key.rpartition(".")
            label = self.labels.get(module)
            if suffix not in SUFFIXES or label is None or not isinstance(value, str):
                continue
            if MISNAMED.get(value, value) != label:
                what = f"gives `{key}` the type {value!r:.60}, its weight {label}"
                yield failed("description", what, DESCRIPTION, AGAIN)

    def _tensors(self) -> Iterator[Finding]:
        """Findings of entries without a tensor, and of tensors without an entry."""
        tensors = self.checkpoint.tensors
        if names := sorted(
            key for key in self.entries.keys() - tensors.keys() if not self._only_asked(key)
        ):
            files = sorted(name for name in self.checkpoint.left_out if name.endswith(".safetensors"))
            hint = f"{files[0]} is not in the index, and may hold them: " if files else ""
            what = f"describes {some(names)}, which no weight file holds"
            yield failed("description", what, DESCRIPTION, f"{hint}{AGAIN}")
        if undescribed := [name for name in tensors if name not in self.entries]:
            weights = [name for name in undescribed if name.endswith(".weight")]
            fix = f"the engine stops at `{weights[0]}`: {AGAIN}" if weights else AGAIN
            yield failed("description", f"does not describe {some(undescribed)}", DESCRIPTION, fix)
        head = absent_head({name: stored.spec for name, stored in tensors.items()})
        if head and head not in self.entries and lm_head(self.checkpoint) == "tied":
            fix = f'add `"{head}": "FLOAT"`, as the engine looks it up although it is tied'
            yield failed("description", f"does not describe `{head}`", DESCRIPTION, fix)

    @cached_property
    def _with_experts(self) -> set[str]:
        """Names of modules that have numbered experts."""
        names = self.checkpoint.tensors
        return {name.partition(".experts.")[0] for name in names if ".experts." in name}

    @cached_property
    def _also_asked(self) -> set[str]:
        """Entries for names that only the engine has."""
        kind = self.checkpoint.config.text("model_type") or ""
        names = [name[:-7] for name in self.checkpoint.tensors if name.endswith(".weight")]
        return {f"{other}.weight" for name in names for other in also_asked(name, kind)}

    @cached_property
    def _stacks(self) -> frozenset[str]:
        """Names of sets of experts that are stored together."""
        return stacked_sets(self.checkpoint.tensors)

    def _only_asked(self, key: str) -> bool:
        """Whether an entry is for a name that the engine looks up although no file holds a tensor."""
        if key in self._also_asked:
            return True
        parent, _, last = key.removesuffix(".weight").rpartition(".")
        if last == "lm_head" or key == "lm_head.weight":
            return True
        for stored, siblings in MERGED.items():
            if last in siblings and f"{parent}.{stored}.weight" in self.checkpoint.tensors:
                return True
        if expert_set(key) in self._stacks:  # the engine looks up float experts one by one
            return True
        return last == "experts" and key.removesuffix(".experts.weight") in self._with_experts


def _unknown_type(value: str, keys: list[str]) -> Finding:
    engine_name = MISNAMED.get(value)
    hint = f"the engine's name for it is {engine_name}" if engine_name else closest(value, TYPES)
    fix = f"{hint}: {AGAIN}" if engine_name else (f"did you mean {hint}?" if hint else AGAIN)
    what = f"type {value!r:.60} of {some(keys)} is not one that the engine registers"
    return failed("description", what, DESCRIPTION, fix)
