"""What data-driven recipes gain on text that they were not calibrated on.

    python benchmarks/generalisation.py [--model DIR | --smollm2] [--text NAME CALIBRATION JUDGED]...
                                        [--only NAME...] [--samples 64] [--tokens 10240] [--json]

Every recipe that needs a text is calibrated on each text in turn and judged on all, by the engine's
arithmetic as `quantcli verify --run` has it, next to the data-free recipe for the same modules in the
same format. JUDGED are other parts of a text than CALIBRATION. Given are the mean change of a token's
log-probability (nats) with both, the difference with the 95 % interval of a paired bootstrap over
windows, and how much of the gain on the calibrated text is kept on others. Exit code 1 if a recipe is
worse than its sibling on any text, beyond the interval.

Texts without --text: Shakespeare of examples/, and Python's manual, the first half of which is
calibrated on. Model: examples/tiny-qwen3; --smollm2: SmolLM2-135M-Instruct, as in pretrained.py, in
groups of 64. What is done stays in --dir, as there.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np

from common import ROOT, parser
from environments import say
from pretrained import interval, last_line
from pretrained_stages import COLUMNS, LENGTH, Array, Cache, Subject, prose
from quantcli.recipe.shipped import find_recipe, shipped_recipes

CHANGE, KL = COLUMNS.index("change"), COLUMNS.index("kl")
INT4_LINEARS = Subject(
    "w4a4_dynamic", variant="all", sets=("rules.0.scheme=w4a4_dynamic", "rules.0.optional=true")
)
# recipes that need a text, and those that do the same without. Static formats need one; of them,
# smoothing is judged next to the same without smoothing.
SIBLINGS = {
    "w4a16_gptq": Subject("vllm_w4a16"),
    "w4a16_awq": Subject("vllm_w4a16"),
    "w4a16_awq_gptq": Subject("vllm_w4a16"),
    "w8a8_dynamic_smooth": Subject("w8a8_dynamic"),
    "w8a8_static_smooth": Subject("w8a8_static", variant="unsmoothed", sets=("smooth=null",)),
    "vllm_int8_dynamic_smooth": Subject("vllm_int8_dynamic"),
    "fp8_dynamic_clip": Subject("fp8_dynamic"),
    "vllm_fp8_dynamic_clip": Subject("vllm_fp8_dynamic"),
    "w4a4_flatquant": Subject("w4a4_dynamic"),
    "w4a4_flatquant_tp1": INT4_LINEARS,
    "mxfp4_flatquant": Subject("mxfp4"),
}
# formats that store what a text measures; they are judged next to the nearest one that does not
STATIC = {
    "w8a8_static": Subject("w8a8_dynamic"),
    "vllm_int8_static": Subject("vllm_int8_dynamic"),
    "fp8_static": Subject("fp8_dynamic"),
    "vllm_fp8_static": Subject("vllm_fp8_dynamic"),
    "modelopt_fp8": Subject("fp8_dynamic"),
    "modelopt_nvfp4": Subject("modelopt_nvfp4a16"),
    "vllm_nvfp4": Subject("vllm_nvfp4a16"),
    "modelopt_mixed": Subject("modelopt_nvfp4a16"),
    "w8a8_dynamic_c8": Subject("w8a8_dynamic"),
    "vllm_fp8_dynamic_kv": Subject("vllm_fp8_dynamic"),
}
MIXTURES = {"vllm_w4a8_moe", "w4a16_moe", "w4a8_moe", "w8a8_moe"}  # refuse a dense model
# options that need a text, of recipes that do not
OPTIONS = [
    (
        Subject(
            "vllm_w4a16",
            variant="clip-inputs",
            sets=("rules.0.scheme={name: w4a16, group_size: auto, clip: inputs}",),
        ),
        "vllm_w4a16",
    ),
    (
        Subject(
            "w4a16_gptq",
            variant="learned",
            sets=("rules.0.scheme={name: w4a16, group_size: auto, weight_rounding: learned}",),
        ),
        "vllm_w4a16",
    ),
]
G64 = {"vllm_w4a16", "w4a16_gptq", "w4a16_awq", "w4a16_awq_gptq"}  # SmolLM2 has no groups of 128


@dataclass(frozen=True)
class Pair:
    """A subject that needs a text, and the one without; static: the format needs it."""

    subject: Subject
    sibling: Subject
    static: bool = False


@dataclass(frozen=True)
class Source:
    """A text: what is calibrated on, and what is judged."""

    name: str
    calibration: Path
    judged: Path


@dataclass(frozen=True)
class Result:
    """Windows of each judged text, of a subject that one text calibrated and of its sibling."""

    pair: Pair
    calibrated: str
    scores: dict[str, tuple[Array, Array]]

    def difference(self, text: str, column: int = CHANGE) -> list[float]:
        """Mean and interval, on one text; negative if the data helped."""
        ours, without = self.scores[text]
        found: list[float] = interval((ours - without)[:, [column]])[:, 0].tolist()
        return found

    def kept(self, text: str) -> float:
        """The gain on a text over that on text like the calibrated one."""
        return self.difference(text)[0] / self.difference(self.calibrated)[0]

    def verdict(self, text: str) -> str:
        """On one text."""
        _, low, high = self.difference(text)
        return "worse" if low > 0 else "better" if high < 0 else "equal"


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(dir=ROOT / "build" / "generalisation")
    arguments.add_argument("--model", type=Path, default=ROOT / "examples" / "tiny-qwen3")
    arguments.add_argument("--smollm2", action="store_true", help="instead of --model")
    arguments.add_argument(
        "--text", nargs=3, action="append", metavar=("NAME", "CALIBRATION", "JUDGED")
    )
    arguments.add_argument("--on", nargs="+", metavar="NAME", help="calibrate on these texts alone")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these recipes; * is allowed")
    arguments.add_argument("--samples", type=int, default=64, help="of 256 tokens, to calibrate on")
    arguments.add_argument("--tokens", type=int, default=40 * LENGTH, help="of each judged text")
    options = arguments.parse_args()
    folder: Path = options.dir.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sources = [Source(name, Path(a).resolve(), Path(b).resolve()) for name, a, b in options.text or ()]
    sources = sources or [
        Source("shakespeare", ROOT / "examples/calibration.txt", ROOT / "examples/evaluation.txt"),
        manual(folder),
    ]
    model = None if options.smollm2 else options.model.resolve()
    results: list[Result] = []
    failed: dict[str, str] = {}
    for source in sources:
        if options.on and source.name not in options.on:
            continue
        cache = Cache(folder, source.calibration, model, options.samples)
        texts = {each.name: cache.text(each.judged, options.tokens // LENGTH) for each in sources}
        for pair in pairs(options.only, small=options.smollm2):
            variant = "-".join(filter(None, [pair.subject.variant, f"on-{source.name}"]))
            subject = replace(pair.subject, variant=variant)
            say(f"{subject.name}")
            try:
                ours, without = cache.checkpoint(subject), cache.checkpoint(pair.sibling)
                scores = {
                    name: (cache.scores(ours, text), cache.scores(without, text))
                    for name, text in texts.items()
                }
            except Exception as error:  # a line of the result
                failed[subject.name] = last_line(error)
                say(f"  cannot: {failed[subject.name]}")
                continue
            results.append(Result(pair, source.name, scores))
            say(f"  {in_words(results[-1])}")
    finish(results, failed, as_json=options.json)


def manual(folder: Path) -> Source:
    """Prose that every Python has."""
    paragraphs = prose()
    half = len(paragraphs) // 2
    parts = folder / "manual-calibration.txt", folder / "manual-judged.txt"
    for part, text in zip(parts, (paragraphs[:half], paragraphs[half:]), strict=True):
        part.write_text("\n\n".join(text))
    return Source("manual", *parts)


def pairs(only: list[str] | None, *, small: bool) -> list[Pair]:
    """All that the command line asks for. SystemExit for a recipe that needs a text and is not here."""
    by_data = {name for name in shipped_recipes() if "\ncalibration:" in find_recipe(name).read_text()}
    known = SIBLINGS.keys() | STATIC.keys() | MIXTURES
    if by_data - known:
        raise SystemExit(f"no sibling is named for {', '.join(sorted(by_data - known))}")
    found = [Pair(Subject(name), sibling) for name, sibling in SIBLINGS.items()]
    found += [Pair(subject, Subject(sibling)) for subject, sibling in OPTIONS]
    found += [Pair(Subject(name), sibling, static=True) for name, sibling in STATIC.items()]
    if only is not None:
        found = [each for each in found if any(fnmatchcase(each.subject.name, word) for word in only)]
    return [Pair(grouped(p.subject), grouped(p.sibling), p.static) for p in found] if small else found


def grouped(subject: Subject) -> Subject:
    """In groups of 64, if it has groups."""
    if subject.what not in G64:
        return subject
    return replace(subject, sets=(*subject.sets, "rules.0.scheme.group_size=64"))


def in_words(result: Result) -> str:
    """On each text: the change with and without data, and the verdict."""
    words = []
    for text, (ours, without) in result.scores.items():
        means = ours[:, CHANGE].mean(), without[:, CHANGE].mean()
        words.append(f"{text} {means[0]:.4f} / {means[1]:.4f} {result.verdict(text)}")
    return "; ".join(words)


def finish(results: Sequence[Result], failed: dict[str, str], *, as_json: bool) -> None:
    """Print the result and exit with 1 if data makes a recipe worse anywhere."""
    rows = []
    for result in results:
        for text, (ours, without) in result.scores.items():
            rows.append(
                {
                    "recipe": result.pair.subject.name, "sibling": result.pair.sibling.name,
                    "static": result.pair.static, "calibrated": result.calibrated, "judged": text,
                    "change": float(ours[:, CHANGE].mean()),
                    "without": float(without[:, CHANGE].mean()),
                    "difference": result.difference(text), "kl": result.difference(text, KL),
                    "kept": result.kept(text), "verdict": result.verdict(text),
                }
            )  # fmt: skip
    ok = not failed and all(row["static"] or row["verdict"] != "worse" for row in rows)
    if as_json:
        print(json.dumps({"ok": ok, "rows": rows, "failed": failed}))
        sys.exit(0 if ok else 1)
    print(
        "| recipe | without data | calibrated on | judged on | change | without | difference | kept | |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for row in rows:
        mean, low, high = np.array(row["difference"])
        kept = "" if row["judged"] == row["calibrated"] else f"{row['kept']:.2f}"
        cells = (
            row["recipe"], row["sibling"], row["calibrated"], row["judged"], f"{row['change']:.4f}",
            f"{row['without']:.4f}", f"{mean:+.4f} ({low:+.4f} to {high:+.4f})", kept, row["verdict"],
        )  # fmt: skip
        print("|", " | ".join(cells), "|")
    for name, error in failed.items():
        print(f"cannot: {name}: {error}")
    sys.exit(0 if ok else 1)


if __name__ == "__main__":
    main()
