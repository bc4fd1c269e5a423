"""One checkpoint of the zoo with one recipe: converted and verified, or refused, and how."""

from __future__ import annotations

import io
import json
import re
import shutil
import signal
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.zoo.judge import UnknownModelError, linears_of, share_quantized

TEXT = Path(__file__).parents[2] / "examples" / "calibration.txt"
FEW = [part for setting in (f"data={TEXT}", "samples=4", "length=32")
       for part in ("--set", f"calibration.{setting}")]  # fmt: skip
# By column: the recipe, or those for dense models and for mixtures.
COLUMNS: dict[str, tuple[str, str]] = {
    "int8-ascend": ("w8a8_dynamic",) * 2,
    "int8-vllm": ("vllm_int8_dynamic",) * 2,
    "fp8": ("vllm_fp8_dynamic",) * 2,
    "fp8-block": ("vllm_fp8_block",) * 2,
    "w4a16": ("vllm_w4a16",) * 2,
    "static": ("w8a8_static", "w8a8_moe"),
}
CALIBRATED = {"w8a8_static", "w8a8_moe"}
BAR = 95.0  # percent of the weights that engine and scheme can take
# What a refusal says, by the word that stands for it in the table of expectations.
REASONS: dict[str, str] = {
    "dbrx": "reads the experts of DBRX as whole tensors",
    "gpt-oss": "would skip the gates of single experts",
    "groups": r"groups of \d+ columns do not divide",
    "mamba-1": "builds Mamba 1 as float",
    "forward": "the forward of `.*` fails on text",
    "lora": r"begins the name of `.*\.lora_A",
    "named-apart": "cannot be described for this engine",
    "no-class": "has no class for",
    "not-replayed": "cannot be run one by one",
    "own-code": "comes with code of its own",
    "shared-layer": "has no tensor for parameter `.*shared_transformer",
    "stack": "in an order that is not known for the model type",
    "talker": "transformers cannot build this model: 'Qwen3OmniMoeTalker",
    "transposed": "are stored transposed, which this version does not quantize",
    "unlisted": "does not list .* among the families with quantized experts",
    "unreached": "no token reached",
}


@dataclass(frozen=True)
class Outcome:
    """What came of a pair.

    share:   percent of the weights of all linears that are stored quantized; None if it was refused.
    reason:  the key in REASONS of a refusal; "?" for words that are not there.
    wrong:   what must never be: a crash, a checkpoint that does not verify, a file that a refusal left.
    said:    the error in full.
    """

    name: str
    column: str
    share: float | None = None
    reason: str | None = None
    wrong: str | None = None
    said: str = ""

    @property
    def word(self) -> str:
        """The entry in the table of expectations."""
        if self.wrong is not None:
            return "WRONG"
        return str(self.reason) if self.share is None else f"{self.share:.1f}"


def command(*arguments: object) -> tuple[int, str, str]:
    """quantcli in this process: exit code, standard output, standard error."""
    from quantcli.__main__ import main

    out, err = io.StringIO(), io.StringIO()
    before = signal.getsignal(signal.SIGTERM)
    code: Any = 0
    try:
        with redirect_stdout(out), redirect_stderr(err):
            main([str(argument) for argument in arguments])
    except SystemExit as ended:
        code = ended.code or 0
    finally:
        signal.signal(signal.SIGTERM, before)
    return int(code), out.getvalue(), err.getvalue()


def is_mixture(model: Path) -> bool:
    """Whether a checkpoint has experts, by transformers' modules, or by its names."""
    try:
        return "expert" in linears_of(model).values()
    except UnknownModelError:
        index = (model / "model.safetensors.index.json").read_text()
        return ".experts." in index or ".moe." in index


def run_pair(name: str, model: Path, column: str, place: Path) -> Outcome:
    """Convert `model` into a folder in `place`, verify it in full against the model, remove it."""
    recipe = COLUMNS[column][is_mixture(model)]
    out = place / f"{name}-{column}"
    more = FEW if recipe in CALIBRATED else []
    code, printed, said = command("quantize", recipe, "--model", model, "--out", out, "--json", *more)
    try:
        if code == 2:
            return refused(name, column, printed, said, out)
        if code != 0:
            return Outcome(name, column, wrong=f"quantize ended with {code}", said=said)
        plan = json.loads(printed)["plan"]
        code, printed, said = command("verify", out, "--full", "--against", model)
        if code != 0:
            return Outcome(name, column, wrong=f"verify ended with {code}", said=printed + said)
        reached = plan.get("quantizable_pct")
        if reached is not None and reached < BAR:
            what = f"{reached:.1f} % of what can be quantized, with exit 0"
            return Outcome(name, column, wrong=what)
        try:
            share = 100 * share_quantized(model, out)
        except UnknownModelError:
            share = plan["quantized_params_pct"]
        return Outcome(name, column, share)
    finally:
        for left in place.glob(f"{name}-{column}*"):
            shutil.rmtree(left)


def refused(name: str, column: str, printed: str, said: str, out: Path) -> Outcome:
    """A refusal; it is wrong if it came after work."""
    left = sorted(path.name for path in out.parent.glob(f"{out.name}*"))
    if left:
        return Outcome(
            name, column, wrong=f"refused after work, which left {', '.join(left)}", said=said
        )
    error = json.loads(printed)["error"]
    text = " ".join(str(error.get(part) or "") for part in ("what", "where", "fix"))
    reason = next((key for key, words in REASONS.items() if re.search(words, text)), "?")
    return Outcome(name, column, reason=reason, said=said)
