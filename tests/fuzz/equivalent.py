"""Mutants that no test can notice, as no value or file differs. Each with the reason: read it again if
the code near it changes."""

from __future__ import annotations

_PLACE = "an input_scale, and a scale without dimensions, has no rows: its place shows none"
_ONCE = "global scales are what a module has once: rows are read for nothing but their shapes"
_SHAPE = "formats with global scales do not store the shape of a weight"
_READ = "p.suffix: read_span(module.tensors[p.suffix]"
_BITS = "the only other integers of 64 bits are shapes, and those were seen to before"
_DRY = "the first row is in messages of errors alone, and codes of 0 make none"

# module -> changed line, spaces do not count -> why it changes nothing
EQUIVALENT: dict[str, dict[str, str]] = {
    "checkpoint/header.py": {
        "if not TYPE_CHECKING:": "the tests of light commands notice it: it imports torch",
    },
    "checkpoint/files.py": {
        "return 1": "the size of a folder is not asked for",
        "return -1": "the size of a folder is not asked for",
        "target = file.resolve(strict=False)": "what leads nowhere has no status either",
    },
    "core/place.py": {
        "check_space(folder, -1)": "no disk has less than 0 free bytes",
        "if total <= 0:  # /proc, /sys": "no disk has less than 0 bytes",
    },
    "core/untrusted/names.py": {
        "if code < 65537:": "U+10000 is printable, so that it is never escaped",
        "if code <= 0x10000:": "U+10000 is printable, so that it is never escaped",
    },
    "planning/recode.py": {
        'parts["input_scale"] = _cast(parts, "input_scale", item, target, 1)': _PLACE,
        'parts["input_scale"] = _cast(parts, "input_scale", item, target, -1)': _PLACE,
        'where=_place(item, "input_scale", 1),': _PLACE,
        'where=_place(item, "input_scale", -1),': _PLACE,
        "where=_place(item, name, first_row, first[0] if first else 1),": _PLACE,
        "where=_place(item, name, first_row, first[0] if first else -1),": _PLACE,
        "raise _damaged(what, _place(item, name, first_row, first[0] if first else 1))": _PLACE,
        "raise _damaged(what, _place(item, name, first_row, first[0] if first else -1))": _PLACE,
        "for candidate in _around(nearest, 1):": "one further away has another product",
        "for candidate in _around(nearest, 3):": "one further away has another product",
        "again = target.unpack(numerics, target.pack(numerics, parts, (1, 0)))": _SHAPE,
        "again = target.unpack(numerics, target.pack(numerics, parts, (-1, 0)))": _SHAPE,
        "again = target.unpack(numerics, target.pack(numerics, parts, (0, 1)))": _SHAPE,
        "again = target.unpack(numerics, target.pack(numerics, parts, (0, -1)))": _SHAPE,
        'signed = item.module.layout.signed and name >= "weight_scale"': (
            "no other part whose name ends with _scale comes after it"
        ),
    },
    "planning/repack.py": {
        "names = dict(zip(files, files, strict=False))": "a list is as long as itself",
        "return recode(item, target, stored, 1, None)": _DRY,
        "return recode(item, target, stored, -1, None)": _DRY,
        f"stored |= {{{_READ}, 1, 0) for p in module.row_params}}": _ONCE,
        f"stored |= {{{_READ}, -1, 0) for p in module.row_params}}": _ONCE,
        f"stored |= {{{_READ}, 0, 1) for p in module.row_params}}": _ONCE,
        'elif param.suffix >= "deq_scale" and dtype == torch.int64:  # bits of a float32': _BITS,
        'elif param.suffix <= "deq_scale" and dtype == torch.int64:  # bits of a float32': _BITS,
        'elif owner[name][1] <= "bias":': "no suffix comes before it",
    },
}  # fmt: skip
