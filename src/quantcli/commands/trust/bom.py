"""`bom` as a function: a bill of materials of a checkpoint, from its manifest, card and config.json.

The format is CycloneDX 1.6. The names of licences and the schema come from cyclonedx-python-lib; the
document is written here, since that library has no model cards.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantcli.checkpoint.checkpoint import Checkpoint, scan_checkpoint
from quantcli.checkpoint.files import CARD, MANIFEST
from quantcli.checkpoint.hub import HUB_ID, find_model
from quantcli.checkpoint.manifest import read_manifest
from quantcli.commands.keywords import PathLike, takes
from quantcli.commands.results import Result
from quantcli.commands.steps import OnProgress, progress_of
from quantcli.core.disk import check_file, write_file
from quantcli.core.errors import AnswerNo, InputError, MachineError
from quantcli.core.events import SILENT, Progress
from quantcli.core.place import expanded
from quantcli.core.text import pip_install
from quantcli.core.untrusted.names import printable, visible_json
from quantcli.core.untrusted.tables import Table
from quantcli.planning.card.source import kept, read_source_card

Component = dict[str, Any]  # as CycloneDX has it

_SCHEMA = "http://cyclonedx.org/schema/bom-1.6.schema.json"
_HASHES = {"sha256": "SHA-256", "blake3": "BLAKE3"}
_MODEL, _BASE, _TEXT, _RECIPE = "model", "base-model", "calibration-text", "recipe"
_COPY = "copy the checkpoint again, or convert the model again"


@dataclass(frozen=True, kw_only=True)
class Bom(Result):
    """A bill of materials.

    bom:   the document, in CycloneDX 1.6.
    file:  where it was written; None if it was not.
    notes: remarks, such as on what the checkpoint does not say.
    """

    bom: dict[str, Any]
    file: Path | None
    notes: list[str]

    @property
    def text(self) -> str:
        """The document as the content of a file."""
        return visible_json(json.dumps(self.bom, indent=2, ensure_ascii=False)) + "\n"


@takes()
def bom(checkpoint: PathLike, out: PathLike | None = None, on_progress: OnProgress = None) -> Bom:
    """The bill of materials of a checkpoint that quantcli wrote: base model, recipe, text, files, tool.

    The same checkpoint under the same name gives the same document. Weights are not read: hashes are
    those of the manifest.

    checkpoint:  a folder, a Hub id or an address.
    out:         a file to write it to, outside of the checkpoint.
    on_progress: as of `quantize`.

    Raises AnswerNo if files are not there as the manifest lists them, InputError for a checkpoint
    without a manifest, and MachineError without the package cyclonedx-python-lib.
    """
    file = None if out is None else Path(out)
    return make_bom(str(checkpoint), file, progress_of(on_progress))


def make_bom(checkpoint: str, file: Path | None = None, progress: Progress = SILENT) -> Bom:
    """What `bom` does."""
    try:
        import cyclonedx.spdx  # noqa: F401
    except ModuleNotFoundError:
        what = "a bill of materials needs the package cyclonedx-python-lib"
        raise MachineError(what, fix=pip_install("sbom")) from None
    if file is not None:
        check_file("--out", file)
    folder = find_model(checkpoint, progress)
    opened = scan_checkpoint(folder)
    if file is not None and file.resolve().is_relative_to(opened.path):
        what = "would become part of the checkpoint that it describes"
        raise InputError(what, where=f"--out {file}", fix="give a file outside of it")
    if not (opened.path / MANIFEST).is_file():
        what = f"there is no {MANIFEST}: what it was made of is not known"
        raise InputError(what, where=checkpoint, fix="give a checkpoint that quantcli wrote")
    manifest = Table(read_manifest(opened.path), MANIFEST)
    place = expanded(checkpoint)
    name = place.resolve().name if place.is_dir() else checkpoint.rstrip("/").rpartition("/")[2]
    notes: list[str] = []
    document = _document(printable(name), opened, manifest, notes)
    result = Bom(bom=document, file=file, notes=notes)
    _must_be_valid(result.text)
    if file is not None:
        write_file(file.resolve(), result.text.encode())
    return result


def _document(name: str, checkpoint: Checkpoint, manifest: Table, notes: list[str]) -> dict[str, Any]:
    card = dict(kept(read_source_card(checkpoint).front)) if CARD in checkpoint.aux else {}
    licenses = _licenses(card)
    if not licenses:
        notes.append("the card names no licence of the base model")
    parts = [_base(checkpoint, manifest, licenses), *_text(manifest), *_recipe(manifest)]
    if "calibration" in _recipe_keys(manifest) and "calibration" not in manifest:
        notes.append("the manifest does not record the text of the calibration")
    model: Component = {
        "type": "machine-learning-model",
        "bom-ref": _MODEL,
        "name": name,
        **({"licenses": licenses} if licenses else {}),
        "pedigree": {"ancestors": [parts[0]]},
        "components": [*_files(checkpoint, manifest)],
        "modelCard": _model_card(checkpoint, card),
        "properties": _properties(
            {
                "target": manifest.text("target", ""),
                "serving_dtype": manifest.text("serving_dtype", ""),
                "quantized_params_pct": manifest.number("quantized_params_pct", None),
                "plan": manifest.text("plan", ""),
            }
        ),
    }
    if not any("hashes" in file for file in model["components"] if file["name"] != MANIFEST):
        notes.append("the manifest holds no hashes: it was written with --no-checksum")
    others = parts[1:]
    content = {
        "metadata": {"tools": {"components": [*_tools(manifest)]}, "component": model},
        **({"components": others} if others else {}),
        "dependencies": [
            {"ref": _MODEL, "dependsOn": sorted(part["bom-ref"] for part in others)},
            *({"ref": part["bom-ref"]} for part in others),
        ],
    }
    digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    head = {
        "$schema": _SCHEMA,
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, digest)}",
        "version": 1,
    }
    return {**head, **content}


def _base(checkpoint: Checkpoint, manifest: Table, licenses: list[dict[str, Any]]) -> Component:
    """The model that was converted. Its name is that in the manifest, else in the card, if known."""
    source = manifest.table("source")
    front = read_source_card(checkpoint).front
    named = source.text("id", None) or front.get("base_model")
    found = HUB_ID.fullmatch(named) if isinstance(named, str) else None
    component: Component = {
        "type": "machine-learning-model",
        "bom-ref": _BASE,
        "name": found["repository"] if found else "not known",
    }
    if found:
        revision = found["revision"]
        component |= {"version": revision} if revision else {}
        component["purl"] = f"pkg:huggingface/{found['repository']}" + (
            f"@{revision.replace('/', '%2F')}" if revision else ""
        )
    if licenses:
        component["licenses"] = licenses
    files = source.tables("files", {})
    if files:
        component["components"] = [
            {"type": "file", "bom-ref": f"{_BASE}/{name}", "name": name, **_hashes(entry)}
            for name, entry in sorted(files.items())
        ]
    facts = {
        "fingerprint": source.text("fingerprint"),
        "tensors": source.integer("tensors"),
        "bytes": source.integer("bytes"),
    }
    return {**component, "properties": _properties(facts)}


def _text(manifest: Table) -> Iterator[Component]:
    """The text of the calibration."""
    if (calibration := manifest.table("calibration", None)) is None:
        return
    text = calibration.table("text")
    name = printable(text.text("name")) or "not known"
    found = {"sha256": text.text("sha256", None)}
    yield {
        "type": "data",
        "bom-ref": _TEXT,
        "name": name,
        **_hashes(Table(found, MANIFEST)),
        "data": [{"type": "dataset", "name": name, "description": "text of the calibration"}],
        "properties": _properties({"statistics": calibration.text("statistics", "")}),
    }


def _recipe(manifest: Table) -> Iterator[Component]:
    """The recipe, with its text."""
    if (text := manifest.text("recipe", None)) is None:
        return
    content = text.encode(errors="backslashreplace")
    attachment = {"contentType": "application/yaml", "content": content.decode()}
    yield {
        "type": "data",
        "bom-ref": _RECIPE,
        "name": "recipe",
        "hashes": [{"alg": "SHA-256", "content": hashlib.sha256(content).hexdigest()}],
        "data": [{"type": "configuration", "name": "recipe", "contents": {"attachment": attachment}}],
    }


def _recipe_keys(manifest: Table) -> set[str]:
    """The keys of the recipe at its top level."""
    lines = (manifest.text("recipe", None) or "").splitlines()
    return {line.partition(":")[0] for line in lines if line[:1].isalpha()}


def _files(checkpoint: Checkpoint, manifest: Table) -> Iterator[Component]:
    """Every file of the checkpoint, the manifest among them. AnswerNo if one is not there as listed."""
    listed = manifest.tables("files")
    for name, entry in listed.items():
        file = checkpoint.path / name
        if not file.is_file() or file.stat().st_size != entry.integer("bytes"):
            what = f"file `{printable(name):.200}` is not there as the manifest lists it"
            raise AnswerNo(what, where=MANIFEST, fix=_COPY)
    own = hashlib.sha256((checkpoint.path / MANIFEST).read_bytes()).hexdigest()
    for name in sorted({*listed, MANIFEST}):
        entry = listed.get(name, Table({"sha256": own}, MANIFEST))
        yield {"type": "file", "bom-ref": f"file/{name}", "name": name, **_hashes(entry)}


def _hashes(entry: Table) -> dict[str, Any]:
    """The hashes of an entry of a manifest, under their key; empty without any."""
    found = {alg: entry.text(key, None) for key, alg in _HASHES.items()}
    hashes = [{"alg": alg, "content": content} for alg, content in found.items() if content]
    return {"hashes": hashes} if hashes else {}


def _tools(manifest: Table) -> Iterator[Component]:
    """quantcli, and packages whose classes made the checkpoint, with their versions."""
    tool = manifest.table("tool")
    yield {"type": "application", "name": "quantcli", "version": tool.text("version")}
    packages = tool.table("packages", None)
    for name in sorted(packages or ()):
        assert packages is not None
        yield {"type": "library", "name": printable(name), "version": packages.text(name)}


def _model_card(checkpoint: Checkpoint, card: Mapping[str, Any]) -> dict[str, Any]:
    """What config.json and the card say of the model, and the text that it was calibrated on."""
    config = checkpoint.config
    facts = {
        "task": card.get("pipeline_tag"),
        "architectureFamily": config.text("model_type"),
        "modelArchitecture": next(iter(config.texts("architectures")), None),
    }
    texts = {key: printable(value) for key, value in facts.items() if isinstance(value, str)}
    return {"modelParameters": texts}


def _licenses(card: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The licence that a card names: its SPDX identifier, else its name; empty without one."""
    from cyclonedx.spdx import fixup_id

    named = card.get("license")
    if not isinstance(named, str):
        return []
    if (identifier := fixup_id(named)) is not None:
        return [{"license": {"id": identifier}}]
    name = card.get("license_name")
    link = card.get("license_link")
    license_: dict[str, Any] = {"name": name if isinstance(name, str) else named}
    if isinstance(link, str) and _is_address(link):
        license_["url"] = link
    return [{"license": license_}]


def _is_address(text: str) -> bool:
    """Whether a text is an address that any reader of the document takes."""
    plain = text.isascii() and not set(text) & set(' <>"{}|\\^`')
    return plain and text.startswith(("https://", "http://"))


def _properties(facts: Mapping[str, Any]) -> list[dict[str, str]]:
    """Facts that CycloneDX has no key for; those that are not known are left out."""
    return [
        {"name": f"quantcli:{key}", "value": f"{value}"}
        for key, value in facts.items()
        if value is not None and value != ""
    ]


def _must_be_valid(text: str) -> None:
    """The schema of CycloneDX holds for what is written here, whatever the manifest says."""
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    if error is not None:
        what = f"the manifest has a value that a bill of materials cannot hold: {_words(error)}"
        raise InputError(what, where=MANIFEST, fix=_COPY)


def _words(error: Any) -> str:
    """The first line of what the validator says."""
    return printable(str(getattr(error, "data", error)).splitlines()[0])[:200]
