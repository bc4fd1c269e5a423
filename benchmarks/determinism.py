"""The same plan gives the same bytes: for any number of workers, block size and place.

Converts a model with 1, 2 and 8 workers, several block sizes and two output paths in turn, and
compares the sha256 of every file, the manifest among them.
"""

from __future__ import annotations

import itertools
import shutil

from common import RECIPES, Line, finish, hashes, parser, quantize_to, qwen3, workplace, write_model

WORKERS = (1, 2, 8)
BLOCKS = (None, 65_537, 1)  # elements of a row block; None is the default, 1 is row by row


def main() -> None:
    options = parser(__doc__).parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model = folder / "model"
        write_model(model, qwen3(2, hidden=768, vocab=4096))
        places = (folder / "out", folder / "elsewhere" / "another name")
        for recipe in ("w8a8_dynamic", "fp8_dynamic", "w8a16", "vllm_w4a16"):
            seen: list[dict[str, str]] = []
            for workers, block, out in itertools.product(WORKERS, BLOCKS, places):
                path = RECIPES / f"{recipe}.yaml"
                overrides = ("max_shard=8MB",)
                quantize_to(
                    out, path, model, overrides=overrides, workers=workers, block_elements=block
                )
                seen.append(hashes(out))
                shutil.rmtree(out)
            odd = sum(table != seen[0] for table in seen)
            detail = f"{len(seen)} runs, {len(seen[0])} files each"
            lines.append(Line(f"{recipe}: runs with other bytes", odd, "", 0, detail))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
