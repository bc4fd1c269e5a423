"""Peak memory of GPTQ for the experts of a layer, above that of a calibration without GPTQ.

The sums of products of all inputs of 128 experts that read 2048 columns each would be 2.2 GB. They are
found in runs over the samples that hold 1 GiB of them at most. The bar is the bound in docs/recipe.md.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from common import QUANTCLI, ROOT, Line, finish, measure, parser, qwen3_moe, workplace, write_model
from quantcli.calibration.methods.hessians import HESSIANS_NBYTES, INPUTS_NBYTES
from quantcli.checkpoint.spec import TensorSpec

HEAD, VOCABULARY = 128, 16384
RECIPE = """\
target: compressed-tensors
calibration: {{data: {data}, samples: 32, length: 256, all_tokens: {all_tokens}}}
rules:
  - match: "*.experts.*"
    scheme: {{name: w4a16, clip: inputs, weight_rounding: {rounding}}}
"""


def make_model(folder: Path, experts: int, hidden: int, width: int) -> None:
    """A Qwen3-MoE of one layer of random weights, with the tokenizer of the bundled model."""
    _, *specs = qwen3_moe(1, experts, hidden=hidden, width=width)
    more = {"model.embed_tokens": (VOCABULARY, hidden)}
    more |= {f"model.layers.0.self_attn.{name}_norm": (HEAD,) for name in "qk"}
    specs += [TensorSpec(f"{name}.weight", "BF16", shape) for name, shape in more.items()]
    write_model(folder, specs)
    config = {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "torch_dtype": "bfloat16",
        "hidden_size": hidden, "intermediate_size": width, "moe_intermediate_size": width,
        "num_experts": experts, "num_experts_per_tok": 8, "num_hidden_layers": 1,
        "num_attention_heads": hidden // HEAD, "num_key_value_heads": hidden // HEAD // 2,
        "head_dim": HEAD, "vocab_size": VOCABULARY, "max_position_embeddings": 4096,
        "decoder_sparse_step": 1, "tie_word_embeddings": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "examples/tiny-qwen3" / name, folder)


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--experts", type=int, default=128)
    arguments.add_argument("--hidden", type=int, default=2048)
    arguments.add_argument("--width", type=int, default=128)
    arguments.add_argument("--workers", type=int, default=2)
    options = arguments.parse_args()
    lines = []
    with workplace(options.dir) as folder:
        model, recipe = folder / "model", folder / "recipe.yaml"
        make_model(model, options.experts, options.hidden, options.width)
        k = max(options.hidden, options.width)
        bar = HESSIANS_NBYTES + 12 * k * k + options.workers * INPUTS_NBYTES
        bar += 3 * options.experts * options.hidden * options.width  # codes
        all_sums = 4 * options.experts * (options.hidden**2 + options.width**2)
        bare = 0
        for rounding, all_tokens in (("nearest", "false"), ("gptq", "false"), ("gptq", "true")):
            data = ROOT / "examples/calibration.txt"
            recipe.write_text(RECIPE.format(data=data, all_tokens=all_tokens, rounding=rounding))
            command = (*QUANTCLI, "calibrate", recipe, "--model", model, "--out", folder / "store")
            used = measure(*command, "--quiet", "--workers", str(options.workers))
            shutil.rmtree(folder / "store")
            detail = f"{used.wall:.0f} s, CPU {used.cpu:.0f} s"
            if rounding == "nearest":
                bare = used.peak
                lines.append(Line(rounding, bare / 2**20, "MiB", None, f"subtracted; {detail}"))
                continue
            detail += f"; all sums at once: {all_sums / 2**20:,.0f} MiB"
            what = f"{options.experts} experts, all_tokens {all_tokens}"
            lines.append(Line(what, (used.peak - bare) / 2**20, "MiB", bar / 2**20, detail))
    finish(lines, as_json=options.json)


if __name__ == "__main__":
    main()
