"""How far conversions of a pretrained model are from it: shipped recipes and other producers.

    python benchmarks/pretrained.py [--dir CACHE] [--tokens 20480] [--text FILE...] [--data FILE]
                                    [--only NAME...] [--slow] [--json]

The model is SmolLM2-135M-Instruct, a Llama with outlier channels, converted by every recipe for dense
models and by llm-compressor and auto-round in environments of their own. Whatever calibrates does it
on the same windows of --data. All checkpoints are run by the engine's arithmetic, as `quantcli verify
--run` has it, on windows of 256 tokens of each text. Figures are means over windows, with 95 %
intervals of a bootstrap over them: perplexity over the float model's, KL divergence in nats, how
often both models have the same most likely token, how much the log-probability of a text's token
changes. Two producers are compared window by window: ours is ahead if KL or change is smaller beyond
the interval of the difference, and behind if one of them is larger.

Exit code 1 if another producer is ahead without data, or if a bar is missed. What is done stays in
the cache: environments and the model by their versions, checkpoints by the code and options that make
them, scores by checkpoint and text. Delete its folder `scores` if the engine's arithmetic has
changed.

Groups of 128 and blocks of 128 rows do not fit this model (hidden size 576, 192 rows of k_proj): int4
has groups of 64 and 32 here, and fp8 in blocks leaves q, k and v float. Recipes for mixtures of
experts are left out, as they refuse a dense model.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np

from common import ROOT, parser
from environments import say
from pretrained_stages import COLUMNS, LENGTH, Array, Cache, Subject, size
from quantcli.core.errors import QuantError
from quantcli.recipe.shipped import shipped_recipes

RESAMPLES = 10_000


INT4 = {  # schemes of the int4 recipes, without the group size
    "vllm_w4a16": "name: w4a16",
    "vllm_w4a8": "name: w4a8",
    "w4a16_gptq": "name: w4a16, weight_rounding: gptq",
    "w4a16_awq": "name: w4a16",
    "w4a16_awq_gptq": "name: w4a16, weight_rounding: gptq",
}


def int4(recipe: str, group: int, more: str = "", **fields: Any) -> Subject:
    """One of the int4 recipes with another group size. more: an option of its scheme, as in YAML."""
    options = [INT4[recipe], f"group_size: {group}", *filter(None, [more])]
    variant = "-".join([f"g{group}", *more.split(": ")]).rstrip("-")
    return Subject(
        recipe, variant=variant, sets=(f"rules.0.scheme={{{', '.join(options)}}}",), **fields
    )


DATA_FREE = ("int8 dynamic", "fp8 dynamic", "int4 g64")  # cells
LLM_COMPRESSOR, AUTO_ROUND = "llm-compressor", "auto-round"
# Shipped recipes that are not named here are judged as they are.
SUBJECTS = [
    Subject("vllm_int8_dynamic", cell="int8 dynamic"),
    Subject("int8-dynamic", LLM_COMPRESSOR, "int8 dynamic"),
    Subject("int8-dynamic", AUTO_ROUND, "int8 dynamic"),
    Subject("vllm_fp8_dynamic", cell="fp8 dynamic"),
    Subject("vllm_fp8_dynamic_clip"),
    Subject("fp8-dynamic", LLM_COMPRESSOR, "fp8 dynamic"),
    Subject("fp8-dynamic", AUTO_ROUND, "fp8 dynamic"),
    int4("vllm_w4a16", 64, cell="int4 g64"),
    Subject("int4-g64", LLM_COMPRESSOR, "int4 g64"),
    Subject("int4-g64", AUTO_ROUND, "int4 g64"),
    int4("vllm_w4a16", 32),
    int4("vllm_w4a8", 64),
    Subject("vllm_int8_dynamic_smooth", cell="int8 dynamic, smoothed", bar=0.014),
    Subject("w8a8_dynamic_smooth", cell="int8 dynamic, smoothed", bar=0.014),
    Subject("int8-dynamic-smooth", LLM_COMPRESSOR, "int8 dynamic, smoothed"),
    Subject("vllm_int8_static", cell="int8 static", bar=0.050),
    Subject("w8a8_static", cell="int8 static", bar=0.050),
    Subject("int8-static", LLM_COMPRESSOR, "int8 static"),
    Subject("w8a8_static_smooth", cell="int8 static, smoothed", bar=0.030),
    Subject("int8-static-smooth", LLM_COMPRESSOR, "int8 static, smoothed"),
    int4("w4a16_gptq", 64, cell="int4 g64, by data"),
    int4("w4a16_gptq", 32),
    Subject(
        "w4a16_gptq",
        variant="g64-learned",
        sets=("rules.0.scheme={name: w4a16, weight_rounding: learned, group_size: 64}",),
        cell="int4 g64, by data",
        bar=0.11,
    ),
    int4("w4a16_awq", 64, cell="int4 g64, by data"),
    int4("w4a16_awq_gptq", 64, cell="int4 g64, by data"),
    int4("vllm_w4a16", 64, "clip: inputs", cell="int4 g64, by data", bar=0.30),
    Subject("int4-g64-gptq", LLM_COMPRESSOR, "int4 g64, by data"),
    Subject("int4-g64-awq", LLM_COMPRESSOR, "int4 g64, by data"),
    Subject("int4-g64-opt", AUTO_ROUND, "int4 g64, by data", slow=True),
    Subject("int4-g64-sign", AUTO_ROUND, "int4 g64, by data", slow=True),
    *(
        Subject(
            name,
            variant="float-qkv",
            sets=('rules.0={match: ["*.o_proj", "*.mlp.*"], scheme: fp8_block}', "expect=null"),
        )
        for name in ("fp8_block", "vllm_fp8_block")
    ),
    *(  # the head of this model is tied
        Subject(name, variant="untied", sets=("rotate.untie=true",))
        for name in ("w4a4_dynamic_rotated", "w4a4_dynamic_rotated_tp1")
    ),
    Subject("w4a4_flatquant", slow=True),
    Subject("w4a4_flatquant_tp1", slow=True),
]
MIXTURES = {"w8a8_moe", "w8a8_moe_dynamic"}


def main() -> None:
    arguments = parser(__doc__)
    arguments.set_defaults(dir=ROOT / "build" / "pretrained")
    arguments.add_argument("--data", type=Path, default=ROOT / "examples/calibration.txt")
    arguments.add_argument("--text", type=Path, nargs="+", help="[default: two texts]")
    arguments.add_argument("--tokens", type=int, default=20480, help="of each text")
    arguments.add_argument("--only", nargs="+", metavar="NAME", help="these subjects; * is allowed")
    arguments.add_argument("--slow", action="store_true", help="those too that take half an hour each")
    options = arguments.parse_args()
    subjects = chosen(options.only, slow=options.slow)
    cache = Cache(options.dir.resolve(), options.data.resolve())
    texts = [cache.text(file, options.tokens // LENGTH) for file in options.text or cache.own_texts()]
    rows: list[Row] = []
    failed: dict[str, str] = {}
    for number, subject in enumerate(subjects, 1):
        say(f"{number}/{len(subjects)} {subject.name}")
        try:
            folder = cache.checkpoint(subject)
            rows.append(Row(subject, size(folder), [cache.scores(folder, text) for text in texts]))
        except Exception as error:  # one producer's failure is a line of the result
            failed[subject.name] = last_line(error)
            say(f"  cannot: {failed[subject.name]}")
    finish([text.name for text in texts], subjects, rows, failed, as_json=options.json)


def chosen(only: list[str] | None, *, slow: bool) -> list[Subject]:
    """The subjects that the command line asks for."""
    named = {subject.what for subject in SUBJECTS} | MIXTURES
    every = [*SUBJECTS, *(Subject(name) for name in shipped_recipes() if name not in named)]
    if only is None:
        return [subject for subject in every if slow or not subject.slow]
    return [subject for subject in every if any(fnmatchcase(subject.name, word) for word in only)]


def last_line(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, QuantError):
        return f"{error.what} ({error.where})" if error.where else error.what
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


# -- result ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A subject's figures."""

    subject: Subject
    size: tuple[float, float]
    scores: list[Array]  # by text

    @property
    def all(self) -> Array:
        """The windows of all texts."""
        return np.concatenate(self.scores)


def interval(values: Array) -> Array:
    """[windows, columns] -> [mean and 95 % interval, columns]."""
    picks = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    low, high = np.quantile(values[picks].mean(1), (0.025, 0.975), axis=0)
    return np.stack([values.mean(0), low, high])


def figures(values: Array) -> dict[str, list[float]]:
    """Mean and interval of each column; `loss` becomes the perplexity over the float model's."""
    found = dict(zip(COLUMNS, interval(values).T.tolist(), strict=True))
    del found["float"]
    return {"perplexity": [math.exp(value) for value in found.pop("loss")], **found}


def pairs(rows: Sequence[Row]) -> Iterator[dict[str, Any]]:
    """Each of ours with each of the others' of its cell: differences, and the verdict on ours."""
    ours = [row for row in rows if row.subject.cell and row.subject.tool == "quantcli"]
    for mine in ours:
        for other in rows:
            if other.subject.cell != mine.subject.cell or other.subject.tool == "quantcli":
                continue
            lost = dict(zip(COLUMNS, interval(mine.all - other.all).T.tolist(), strict=True))
            differences = [lost["kl"], lost["change"]]
            verdict = "equal"
            if any(low > 0 for _, low, _ in differences):
                verdict = "behind"
            elif any(high < 0 for _, _, high in differences):
                verdict = "ahead"
            yield {
                "cell": mine.subject.cell, "ours": mine.subject.name, "other": other.subject.name,
                "kl": lost["kl"], "change": lost["change"], "verdict": verdict,
            }  # fmt: skip


def finish(
    texts: list[str], subjects: list[Subject], rows: list[Row], failed: dict[str, str], *, as_json: bool
) -> None:
    """Print the result, as markdown tables or as JSON, and exit with 1 if it is not good enough."""
    tables = {name: [row.scores[number] for row in rows] for number, name in enumerate(texts)}
    if len(texts) > 1:
        tables["all texts"] = [row.all for row in rows]
    means = {row.subject.name: float(row.all[:, 0].mean()) for row in rows}
    compared = list(pairs(rows))
    bars = [
        {
            "subject": s.name,
            "kl": means.get(s.name),
            "bar": s.bar,
            "ok": means.get(s.name, 1e9) <= s.bar,
        }
        for s in subjects
        if s.bar is not None
    ]
    behind = [pair for pair in compared if pair["verdict"] == "behind" and pair["cell"] in DATA_FREE]
    ok = not behind and all(bar["ok"] for bar in bars)
    if as_json:
        judged = {
            name: {row.subject.name: figures(values) for row, values in zip(rows, scores, strict=True)}
            for name, scores in tables.items()
        }
        sizes = {row.subject.name: row.size for row in rows}
        document = {"ok": ok, "texts": judged, "sizes": sizes, "pairs": compared, "bars": bars}
        print(json.dumps(document | {"failed": failed}))
    else:
        for name, scores in tables.items():
            print_table(name, rows, scores)
        print_pairs(compared)
        print_bars(bars, failed)
    sys.exit(0 if ok else 1)


def print_table(name: str, rows: Sequence[Row], scores: Sequence[Array]) -> None:
    """The figures on one text."""
    if not rows:
        return
    expected = math.exp(scores[0][:, COLUMNS.index("float")].mean())
    print(f"\n{name}: {len(scores[0])} windows, perplexity of the float model {expected:.3f}\n")
    print(
        "| subject | bits | MB | perplexity over float | KL | top-1 | change |"
        "\n|---|---|---|---|---|---|---|"
    )
    for row, values in zip(rows, scores, strict=True):
        cells = [
            f"{mean:.4f} ({low:.4f} to {high:.4f})" for mean, low, high in figures(values).values()
        ]
        bits, megabytes = row.size
        print("|", " | ".join([row.subject.name, f"{bits:.2f}", f"{megabytes:.0f}", *cells]), "|")


def print_pairs(compared: Sequence[dict[str, Any]]) -> None:
    """Ours against others, over all texts."""
    print(
        "\n| cell | ours | other | difference of KL | of change | ours is |\n|---|---|---|---|---|---|"
    )
    for pair in compared:
        cells = [
            f"{m:+.5f} ({low:+.5f} to {high:+.5f})" for m, low, high in (pair["kl"], pair["change"])
        ]
        print(
            "|", " | ".join([pair["cell"], pair["ours"], pair["other"], *cells, pair["verdict"]]), "|"
        )


def print_bars(bars: Sequence[dict[str, Any]], failed: dict[str, str]) -> None:
    """Bars, and subjects without figures."""
    print("\n| subject | KL | bar | |\n|---|---|---|---|")
    for bar in bars:
        value = "none" if bar["kl"] is None else f"{bar['kl']:.4f}"
        print(f"| {bar['subject']} | {value} | {bar['bar']:g} | {'ok' if bar['ok'] else 'MISSED'} |")
    if failed:
        print("\n| could not be judged | its error |\n|---|---|")
        for name, error in failed.items():
            print(f"| {name} | {error.replace('|', '/')} |")


if __name__ == "__main__":
    main()
