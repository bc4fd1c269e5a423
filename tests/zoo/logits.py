"""transformers loads what quantcli has converted, and its outputs are held against the float model's.

    python -m tests.zoo.logits [names] [--recipes R ..] [--models FOLDER]

Both models compute in float32; the quantized one with its weights as they are stored, and with float
inputs: what an engine does to inputs differs between engines. Libraries of their own read the formats:
compressed-tensors, and what transformers has for fp8.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from tests.zoo.judge import class_of
from tests.zoo.pairs import command

# Most relative error of outputs, by recipe: of int8 and fp8 it is the project's bar. int4 has steps of
# an eighth of the largest value of a group.
BARS = {"vllm_int8_dynamic": 0.03, "vllm_fp8_dynamic": 0.03, "vllm_fp8_block": 0.03, "fp8_block": 0.03,
        "vllm_w4a16": 0.15}  # fmt: skip
TOKENS = 48


@dataclass(frozen=True)
class Compared:
    """The relative error of a converted model's outputs. If there is none: None, and the reason."""

    name: str
    recipe: str
    error: float | None
    why: str = ""

    @property
    def word(self) -> str:
        """What a line shows of it."""
        return f"{self.error:.4f}" if self.error is not None else self.why


def load(folder: Path, *, converted: bool = False) -> tuple[Any, dict[str, Any]]:
    """A model in float32, its weights dequantized, and what transformers says of its tensors."""
    import transformers
    from transformers import CompressedTensorsConfig, FineGrainedFP8Config
    from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

    config = transformers.AutoConfig.from_pretrained(folder)
    names = [name for name in config.architectures or [] if hasattr(transformers, name)]
    model_class = getattr(transformers, names[0]) if names else class_of(config)
    options: dict[str, Any] = {"dtype": torch.float32, "output_loading_info": True}
    if converted:
        table = json.loads((folder / "config.json").read_text())["quantization_config"]
        if table["quant_method"] == "fp8":
            block = tuple(table["weight_block_size"])
            options["quantization_config"] = FineGrainedFP8Config(
                weight_block_size=block, dequantize=True
            )
        else:
            options["quantization_config"] = CompressedTensorsConfig(dequantize=True)
    # the library asks for a package that it needs only if it keeps fp8
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment"):
        model, said = model_class.from_pretrained(folder, **options)
    return model.float().eval(), said  # the library dequantizes blocks to bfloat16


def outputs(model: Any) -> torch.Tensor:
    """Logits, or the last hidden states of a model that has none, for drawn tokens: float32."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 100, (2, TOKENS), generator=generator)
    config = model.config
    inputs: dict[str, Any] = {"input_ids": ids}
    if config.model_type == "whisper":
        features = torch.randn(
            2, config.num_mel_bins, 2 * config.max_source_positions, generator=generator
        )
        inputs = {"input_features": features, "decoder_input_ids": ids}
    elif config.is_encoder_decoder:
        inputs["decoder_input_ids"] = ids.flip(0)
    if config.model_type in ("clip", "siglip"):
        side = config.vision_config.image_size
        inputs["pixel_values"] = torch.randn(2, 3, side, side, generator=generator)
    with torch.no_grad():
        found = model(**inputs)
    for key in ("logits", "last_hidden_state", "text_model_output"):
        if (value := getattr(found, key, None)) is not None:
            return getattr(value, "last_hidden_state", value).float()
    raise LookupError(f"{type(model).__name__} gives {', '.join(found)}")


def compare(name: str, model: Path, recipe: str, place: Path, reference: torch.Tensor) -> Compared:
    """Convert a model, and hold its outputs against `reference`, those of the float model."""
    out = place / f"{name}-{recipe}"
    code, _, said = command("quantize", recipe, "--model", model, "--out", out)
    try:
        if code != 0:
            errors = [line for line in said.splitlines() if line.startswith("error: ")]
            return Compared(name, recipe, None, f"quantcli: {' '.join(errors)}"[:160])
        try:
            converted, info = load(out, converted=True)
        except Exception as error:
            return Compared(name, recipe, None, f"transformers: {type(error).__name__}: {error}"[:160])
        for what in ("missing_keys", "mismatched_keys", "unexpected_keys"):
            if info[what]:
                return Compared(name, recipe, None, f"{what}: {sorted(map(str, info[what]))[:3]}")
        error = (outputs(converted) - reference).norm() / reference.norm()
        return Compared(name, recipe, float(error))
    finally:
        shutil.rmtree(out, ignore_errors=True)


def run(name: str, models: Path | None, recipes: list[str]) -> list[Compared]:
    """All recipes on a checkpoint of the zoo."""
    from tests.zoo.make import make

    with tempfile.TemporaryDirectory() as place:
        model = (models or Path(place)) / name
        if not model.is_dir():
            make(name, model)
        try:
            loaded, _ = load(model)
            reference = outputs(loaded)
        except Exception as error:
            why = f"float: {type(error).__name__}: {str(error)[:120]}"
            return [Compared(name, recipe, None, why) for recipe in recipes]
        return [compare(name, model, recipe, Path(place), reference) for recipe in recipes]


def main() -> None:
    """A line for each checkpoint; exit code 1 if an error is above its bar."""
    import transformers

    from tests.zoo.make import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "names", nargs="*", help="checkpoints; all of transformers' own layouts without"
    )
    parser.add_argument("--recipes", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--models", type=Path, help="where the checkpoints are, or are kept")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    above, count = [], 0
    for name in options.names or FAMILIES:
        found = run(name, options.models, options.recipes)
        count += sum(one.error is not None for one in found)
        above += [one for one in found if one.error is not None and not one.error <= BARS[one.recipe]]
        words = [one.word for one in found]
        print(f"{name:24} {words[0] if len(set(words)) == 1 else '  '.join(words)}", flush=True)
    print(f"{count} models loaded and compared, {len(above)} above the bar")
    for one in above:
        print(f"  {one.name} {one.recipe}: {one.word} > {BARS[one.recipe]}")
    raise SystemExit(bool(above))


if __name__ == "__main__":
    main()
