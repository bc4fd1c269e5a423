"""Devices by name: their memory, and the formats that their engine has kernels for.

The facts are data, `devices.yaml`, each with its source.
"""

from __future__ import annotations

import difflib
import os
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from quantcli.core.errors import InputError
from quantcli.core.untrusted.patterns import glob_matches
from quantcli.core.untrusted.yaml_text import read_yaml

NATIVE = "native"
LIST = "`quantcli recommend --devices` lists the known ones"
_MOST = 1024  # devices
_FORM = re.compile(
    r"(?:(?P<count>\d+)\s*[x\u00d7]\s*)?(?P<name>[^:]+?)(?::\s*(?P<size>[^:]+))?", re.IGNORECASE
)
_CUSTOM = re.compile(r"(?P<size>\d+(?:\.\d+)?\s*g(?:i?b)?)[\s_-]+(?P<kind>[a-z0-9]+)", re.IGNORECASE)
_MAKERS = re.compile(r"^(nvidia|amd|intel|huawei)|(ascend|geforce|tesla|instinct|rtx)")
_CPU_KIND = "cpu"


@dataclass(frozen=True)
class Device:
    """A kind of device, and the number of them.

    name:    as in the list, or as it was given if only its kind and memory are known.
    nbytes:  memory of one of them.
    engine:  what serves on it.
    formats: patterns of (target, label) of linears -> NATIVE, or what the kernel does instead.
    experts: the same for experts of a mixture.
    cache:   element types of caches of keys and values that checkpoints have scales for.
    own:     the target whose recipes come first: the format that the engine was made for.
    options: of the targets of the engine, such as `device` of `ascend`.
    notes:   what to know about the figures.
    """

    name: str
    kind: str
    count: int
    nbytes: int
    engine: str
    formats: Mapping[tuple[str, str], str]
    experts: Mapping[tuple[str, str], str]
    cache: tuple[str, ...]
    options: Mapping[str, str]
    own: str
    notes: tuple[str, ...]
    source: str

    def kernel(self, target: str, label: str, *, expert: bool = False) -> str | None:
        """NATIVE, or what the kernel does instead; None if the engine has none for a label."""
        patterns = self.experts if expert else self.formats
        found = (
            how
            for (name, pattern), how in patterns.items()
            if name == target and glob_matches(pattern, label)
        )
        return next(found, None)

    def __str__(self) -> str:
        return f"{self.count} x {self.name}" if self.count > 1 else self.name


@cache
def _table() -> dict[str, Any]:
    path = Path(__file__).with_name("devices.yaml")
    table: dict[str, Any] = read_yaml(path.read_bytes(), str(path)).data
    kinds = table["kinds"]
    same = {kind: kinds[entry] for kind, entry in kinds.items() if isinstance(entry, str)}
    return table | {"kinds": kinds | same}


def _plain(name: str) -> str:
    """A name without what people write differently: case, spaces, hyphens, the maker."""
    return _MAKERS.sub("", re.sub(r"[^a-z0-9]", "", name.lower()))


@cache
def _names() -> dict[str, str]:
    """Plain spellings -> names of devices."""
    names = {}
    for name, entry in _table()["devices"].items():
        for spelling in (name, *entry.get("also", ())):
            names[_plain(spelling)] = name
    return names


def known_devices() -> list[dict[str, Any]]:
    """All devices: `name`, other names `also`, `kind`, `gb` (None: that of this machine), `engine`,
    `source`."""
    table = _table()
    return [
        {
            "name": name,
            "also": list(entry.get("also", ())),
            "kind": entry["kind"],
            "gb": entry["gb"] or None,
            "engine": table["kinds"][entry["kind"]]["engine"],
            "source": entry["source"],
        }
        for name, entry in table["devices"].items()
    ]


def parse_device(text: str) -> Device:
    """Devices as a user names them: `2x910B`, `H100`, `8xH100:94GB`, `2x48GB-ada`, `cpu`, `cpu:64GB`.

    Case, spaces and hyphens do not count. InputError for an unknown name, with the closest.
    """
    where = f"--for {text}"
    match = _FORM.fullmatch(text.strip())
    if match is None:
        raise InputError(
            f"`{text}` is not a device", where=where, fix=f"such as 2x910B or 4090; {LIST}"
        )
    count = int(match["count"][:9]) if match["count"] else 1
    if not 1 <= count <= _MOST:
        what = f"the number of devices must be from 1 to {_MOST:,}"
        raise InputError(what, where=where, fix=f"such as --for 2x{match['name']}")
    name, size = match["name"].strip(), match["size"]
    custom = _CUSTOM.fullmatch(name)
    if custom is not None and size is None:
        return _device(custom["kind"].lower(), count, _size(custom["size"], where), name, where)
    listed = _names().get(_plain(name))
    if listed is None:
        near = _nearest(name)
        raise InputError(f"no device `{name}` is known", where=where, fix=_known_fix(near, name))
    entry = _table()["devices"][listed]
    kind, notes = entry["kind"], [entry["note"]] if "note" in entry and size is None else []
    if size is not None:
        nbytes = _size(size, where)
    elif entry["gb"]:
        nbytes = round(entry["gb"] * 10**9)
    else:
        nbytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        kind = _own_kind() if kind == _CPU_KIND else kind
        notes = ["the memory is that of this machine"]
    return _device(kind, count, nbytes, listed, where, notes, entry["source"])


def _nearest(name: str) -> str:
    near = difflib.get_close_matches(_plain(name), _names(), n=5, cutoff=0.5)
    devices = dict.fromkeys(_names()[spelling] for spelling in near)
    return ", ".join(f"`{device}`" for device in list(devices)[:3])


def _known_fix(near: str, name: str) -> str:
    kinds = "ada" if not re.search(r"910|ascend|atlas", name, re.IGNORECASE) else "a2"
    own = f"or write its memory and kind, as in 24GB-{kinds}; {LIST}"
    return f"did you mean {near}? {own}" if near else own


def _device(
    kind: str, count: int, nbytes: int, name: str, where: str, notes: list[str] | None = None,
    source: str = "given by the user",
) -> Device:  # fmt: skip
    kinds = _table()["kinds"]
    if kind not in kinds:
        what = f"no kind of device `{kind}`"
        raise InputError(what, where=where, fix="kinds: " + ", ".join(kinds))
    entry = kinds[kind]
    notes = [*(notes or ()), *([entry["note"]] if "note" in entry else ())]
    formats = _patterns(entry["formats"])
    experts = _patterns(entry["experts"]) if "experts" in entry else formats
    return Device(
        name, kind, count, nbytes, entry["engine"], formats, experts,
        tuple(entry.get("cache", ())), entry.get("options", {}), entry["own"], tuple(notes), source,
    )  # fmt: skip


def _patterns(formats: Mapping[str, str]) -> dict[tuple[str, str], str]:
    labels = _table()["formats"]
    return {
        (target, pattern): how
        for name, how in formats.items()
        for target, patterns in labels[name].items()
        for pattern in patterns
    }


def _own_kind() -> str:
    """The kind of this machine's CPU."""
    if platform.machine().lower() in {"aarch64", "arm64"}:
        return "arm"
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return _CPU_KIND
    return "amx" if "amx_tile" in flags and "amx_int8" in flags else _CPU_KIND


def _size(text: str, where: str) -> int:
    """Bytes of a memory size. InputError for what is not one."""
    from quantcli.recipe.fields import parse_size

    text = re.sub(r"\s", "", text)
    try:
        return parse_size(text if text.lower().endswith("b") else f"{text}B")
    except ValueError as error:
        raise InputError(
            f"the memory of a device: {error}", where=where, fix="such as --for 8xH100:94GB"
        ) from None
