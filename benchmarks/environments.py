"""Environments of other producers, and whatever else is made once and kept: see `Stages`."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

PEERS = Path(__file__).parent / "peers"
TORCH = "torch==2.13.0"
ENVIRONMENTS = {
    "model": (TORCH, "transformers==5.23.0", "gguf==0.19.0", "accelerate==1.15.0"),
    "llm-compressor": (
        TORCH, "llmcompressor==0.14.0.1", "transformers==5.17.0", "compressed-tensors==0.19.0",
    ),
    "quark": (TORCH, "amd-quark==0.13", "transformers==5.24.0", "accelerate==1.15.0"),
    "auto-round": (TORCH, "auto-round==0.16.1", "transformers==5.24.0", "compressed-tensors==0.19.0"),
    "msmodelslim": (  # it is run from its sources; these are its requirements
        TORCH, "transformers==4.51.3", "accelerate==1.15.0", "easydict==1.13", "einops==0.8.1",
        "pydantic==2.12.5", "pygtrie==2.5.0", "requests", "scipy==1.16.3", "wcmatch==10.1",
    ),
}  # fmt: skip


class Stages:
    """A folder with every stage that is done. A stage is made under another name, then renamed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def keyed(self, kind: str, name: str, key: str, make: Callable[[Path], None]) -> Path:
        """As `stage`, once for each key; the results of other keys are deleted."""
        made = self.folder / kind / f"{name.replace(':', '.')}-{key}"
        if not made.exists():
            say(f"  making {kind} {name}")
            self.stage(made, make)
            for other in made.parent.iterdir():
                if other != made and other.name.rpartition("-")[0] == made.name.rpartition("-")[0]:
                    (other.unlink if other.is_symlink() else partial(shutil.rmtree, other))()
        return made

    def stage(self, made: Path, make: Callable[[Path], None]) -> Path:
        """The path that `make` writes, if it does not exist."""
        if not made.exists():
            made.parent.mkdir(exist_ok=True)
            with TemporaryDirectory(prefix="making-", dir=made.parent) as scratch:
                out = Path(scratch) / "out"
                make(out)
                out.rename(made)
        return made

    def environment(self, name: str, alone: str | None = None) -> Path:
        """The Python of an environment. alone: a package to install without its requirements."""

        def make(out: Path) -> None:
            log, pip = out.with_suffix(".log"), (out / "bin" / "python", "-m", "pip", "install")
            run(log, sys.executable, "-m", "venv", out)
            run(log, *pip, *ENVIRONMENTS[name])
            if alone is not None:
                run(log, *pip, "--no-deps", alone)

        made = self.keyed("environment", name, digest([ENVIRONMENTS[name], alone]), make)
        return made / "bin" / "python"


def say(text: str) -> None:
    """Progress, aside from the result."""
    print(text, file=sys.stderr, flush=True)


def digest(value: Any) -> str:
    """Of anything that is JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


def run(log: Path, *command: str | Path) -> None:
    """Run a command to its end. RuntimeError with the end of its output if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    words = [str(word) for word in command]
    with log.open("w") as stream:
        code = subprocess.run(
            words, stdout=stream, stderr=subprocess.STDOUT, env=environment, cwd=log.parent, check=False
        ).returncode
    if code:
        raise RuntimeError(log.read_text(errors="replace")[-2000:] or f"exit code {code}")
