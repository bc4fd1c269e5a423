"""Each shipped recipe is run twice: `quantcli reproduce` compares every byte of the checkpoint.

Recipes convert examples/tiny-qwen3, those for mixtures of experts a small random mixture with its
tokenizer, and calibrate on examples/calibration.txt. The second run has another number of workers, and
the text under another name. Schemes that learn do so for --epochs. The value is the number of
differences; the first one is named.
"""

from __future__ import annotations

import shutil
import time
from pathlib import Path

import quantcli
from common import ROOT, Line, finish, parser, workplace
from quantcli.recipe.recipe import load_recipe
from quantcli.recipe.shipped import describe_recipe, shipped_recipes

MODEL = ROOT / "examples" / "tiny-qwen3"
TEXT = ROOT / "examples" / "calibration.txt"


def mixture(folder: Path) -> Path:
    """A mixture of eight experts with random weights, and the tokenizer of the bundled model."""
    import torch
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "moe_intermediate_size": 256}
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 32}
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    config = Qwen3MoeConfig(vocab_size=4096, num_hidden_layers=2, **sizes, **heads, **experts, **ends)
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(MODEL / name, folder)
    return folder


def changes_of(recipe: str, samples: int, length: int, epochs: int) -> dict[str, object]:
    """Changes of a recipe that make it quick."""
    changes: dict[str, object] = {"calibration.samples": samples, "calibration.length": length}
    for number, rule in enumerate(load_recipe(recipe).rules):
        if rule.scheme is not None and "epochs" in type(rule.scheme).model_fields:
            options = {**rule.scheme.model_dump(mode="json"), "epochs": epochs}
            changes[f"rules.{number}.scheme"] = {"name": rule.scheme.name, **options}
    return changes


def compare(recipe: str, model: Path, folder: Path, text: Path, changes: dict[str, object]) -> Line:
    """One recipe: converted, and made again."""
    data = describe_recipe(recipe).calibration
    out, options = folder / recipe, {"set": changes if data else {}, "data": TEXT if data else None}
    began = time.monotonic()
    made = quantcli.quantize(recipe, model=model, out=out, workers=2, **options)
    shutil.rmtree(f"{out}.calibration", ignore_errors=True)
    between = time.monotonic()
    report = quantcli.reproduce(made.out, model, data=text if data else None, workers=1)
    seconds = f"{between - began:.1f} s, again {time.monotonic() - between:.1f} s"
    shutil.rmtree(out)
    detail = report.summary or f"{report.files} files, {report.tensors} tensors; {seconds}"
    return Line(recipe, len(report.differences), "", 0, detail)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--samples", type=int, default=16)
    arguments.add_argument("--length", type=int, default=128)
    arguments.add_argument("--epochs", type=int, default=2)
    arguments.add_argument("--only", nargs="+", metavar="RECIPE")
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        text = folder / "the same text.txt"
        shutil.copy(TEXT, text)
        experts = mixture(folder / "mixture")
        for recipe in options.only or shipped_recipes():
            model = experts if "moe" in recipe else MODEL
            changes = changes_of(recipe, options.samples, options.length, options.epochs)
            lines.append(compare(recipe, model, folder, text, changes))
            if not options.json:
                print(f"{recipe:28}{lines[-1].value}  {lines[-1].detail}", flush=True)
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
