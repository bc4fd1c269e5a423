"""What signatures and the hashes of a model cost.

`quantcli sign` and `verify --identity` of a checkpoint, and W8A8 dynamic with --hash-model over the
same without: CPU seconds of children. Rounds alternate, medians count; what a command costs on a nearly
empty model is taken off. GB are of the checkpoint, and of the model.
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path

from common import (
    QUANTCLI,
    Line,
    Usage,
    conversion,
    finish,
    measure,
    parser,
    qwen3,
    spread,
    workplace,
    write_model,
)

RECIPE = "w8a8_dynamic"


def run(command: str, *words: str | Path) -> Usage:
    """What a command takes."""
    return measure(*QUANTCLI, command, *words)


def commands(model: Path, out: Path, key: Path) -> dict[str, Callable[[], Usage]]:
    """The commands to measure, by name; a later one needs what an earlier one wrote."""

    def convert(*options: str) -> Usage:
        shutil.rmtree(out, ignore_errors=True)
        return run(*conversion(RECIPE, model, out, *options))

    return {
        "plain": convert,
        "hashed": lambda: convert("--hash-model"),
        "sign": lambda: run("sign", out, "--key", key, "--workers", "1", "--force"),
        "structure": lambda: run("verify", out),
        "identity": lambda: run("verify", out, "--identity", key.with_suffix(".pub"), "--workers", "1"),
    }


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rounds", type=int, default=5)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each")
    options = arguments.parse_args()
    with workplace(options.dir) as place:
        key = place / "key.pem"
        openssl = ["openssl", "ecparam", "-name", "prime256v1", "-genkey", "-noout", "-out", key]
        subprocess.run(openssl, check=True)
        public = ["openssl", "ec", "-in", key, "-pubout", "-out", key.with_suffix(".pub")]
        subprocess.run(public, check=True, capture_output=True)
        models = {"empty": place / "empty", "model": place / "model"}
        write_model(models["empty"], qwen3(1, hidden=64, vocab=64))
        write_model(models["model"], qwen3(options.layers))
        used: dict[tuple[str, str], list[Usage]] = {}
        for _ in range(options.rounds):
            for name, model in models.items():
                for what, command in commands(model, place / f"{name}-out", key).items():
                    used.setdefault((name, what), []).append(command())
        nbytes = {
            name: sum(file.stat().st_size for file in (place / name).glob("*.safetensors"))
            for name in ("model", "model-out")
        }

    def cpu(what: str, name: str = "model") -> float:
        return statistics.median(usage.cpu for usage in used[name, what])

    def net(what: str) -> float:
        return cpu(what) - cpu(what, "empty")

    more = net("hashed") - net("plain")
    check = net("identity") - net("structure")
    finish(
        [
            Line("--hash-model, CPU time over the same without", net("hashed") / net("plain"), "x",
                 detail=f"{more:.2f} s more for {nbytes['model'] / 1e9:.2f} GB; with it "
                 + spread([usage.cpu for usage in used["model", "hashed"]])),
            Line("--hash-model", nbytes["model"] / 1e9 / more, "GB per CPU second"),
            Line("sign", nbytes["model-out"] / 1e9 / net("sign"), "GB per CPU second"),
            Line("verify --identity", nbytes["model-out"] / 1e9 / check, "GB per CPU second"),
            Line("sign, nearly empty checkpoint", cpu("sign", "empty"), "s"),
        ],
        as_json=options.json,
    )  # fmt: skip


if __name__ == "__main__":
    main()
