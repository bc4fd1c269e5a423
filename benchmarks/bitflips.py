"""Single flipped bits in any file of a checkpoint: how many does `verify --full` see?

Half of the flips (seeded) fall anywhere by size, half in a file that is chosen first, so that headers,
JSON and its white space, the manifest and the recipe are hit as well. A flip counts as seen where
verification says no, or that it cannot read what is there. The same for flips that a new manifest
vouches for, for information: then nothing but the numbers themselves can tell.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from common import RECIPES, ROOT, Line, finish, parser, quantize_to, workplace
from quantcli.checkpoint.manifest import encode_manifest
from quantcli.core.errors import QuantError
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions

MANIFEST = "quantcli_manifest.json"


@dataclass(frozen=True)
class Flip:
    """One bit of one file."""

    file: Path
    place: int
    which: int

    def __str__(self) -> str:
        return f"bit {self.which} of byte {self.place} of {self.file.name}"


def flips(folder: Path, count: int, seed: int) -> Iterator[Flip]:
    """Seeded places."""
    draw = random.Random(seed)
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    sizes = [path.stat().st_size for path in files]
    for number in range(count):
        file = draw.choice(files) if number % 2 else draw.choices(files, sizes)[0]
        yield Flip(file, draw.randrange(file.stat().st_size), draw.randrange(8))


def seen(folder: Path, flip: Flip, *, sealed: bool = False) -> bool:
    """Whether verification sees it; all is as it was afterwards.

    sealed: a manifest of what is there now is written first.
    """
    manifest = folder / MANIFEST
    before, listed = flip.file.read_bytes(), manifest.read_bytes()
    after = bytearray(before)
    after[flip.place] ^= 1 << flip.which
    flip.file.write_bytes(after)
    if sealed:
        table = json.loads(listed)
        entry = {"bytes": len(after), "sha256": hashlib.sha256(after).hexdigest()}
        table["files"][flip.file.relative_to(folder).as_posix()] = entry
        manifest.write_bytes(encode_manifest(table))
    try:
        return not verify(VerifyOptions(folder, full=True)).ok
    except QuantError:
        return True
    finally:
        manifest.write_bytes(listed)
        flip.file.write_bytes(before)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--flips", type=int, default=10_000)
    arguments.add_argument("--sealed", type=int, default=1_000, help="flips with a new manifest")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--model", type=Path, default=ROOT / "tests" / "golden" / "data" / "model")
    arguments.add_argument("--recipe", default="w8a8_dynamic")
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        out = folder / "out"
        recipe = RECIPES / f"{options.recipe}.yaml"
        quantize_to(out, recipe, options.model, overrides=("max_shard=1MB",))
        hit: Counter[str] = Counter()
        missed = []
        started = time.process_time()
        for flip in flips(out, options.flips, options.seed):
            hit[flip.file.suffix] += 1
            if not seen(out, flip):
                missed.append(str(flip))
        seconds = time.process_time() - started
        good = verify(VerifyOptions(out, full=True)).ok
        others = [f for f in flips(out, options.sealed, options.seed + 1) if f.file.name != MANIFEST]
        alone = sum(seen(out, flip, sealed=True) for flip in others)
    where = ", ".join(f"{count} in {suffix}" for suffix, count in sorted(hit.items()))
    said = [f"{options.flips} flips: {where}", *missed[:5]]
    finish(
        [
            Line("flipped bits that went unseen", len(missed), "", 0, "; ".join(said)),
            Line("false alarms once all is put back", int(not good), "", 0),
            Line("CPU time", seconds, "s", None, f"{1000 * seconds / options.flips:.0f} ms a flip"),
            Line("seen without hashes", alone, "", None, f"of {len(others)}, by the numbers alone"),
        ],
        as_json=options.json,
    )


if __name__ == "__main__":
    main()
