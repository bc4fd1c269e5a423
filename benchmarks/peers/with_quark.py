"""with_quark.py MODEL OUT SCHEME: convert a model with AMD Quark from file to file, on the CPU.

It takes shards one by one, as quantcli does, with no module of the model. SCHEME is a name of Quark's
templates, such as ptpc_fp8: fp8 per channel and token.
"""

import sys

from quark.torch import LLMTemplate, ModelQuantizer


def main(model: str, out: str, scheme: str) -> None:
    """Convert, and save in Quark's format."""
    quantizer = ModelQuantizer(LLMTemplate.get("qwen3").get_config(scheme=scheme))
    quantizer.direct_quantize_checkpoint(model, out, device="cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
