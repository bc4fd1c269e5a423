"""model_free.py MODEL OUT SCHEME: convert a model with llm-compressor's model_free_ptq, on the CPU.

It takes shards one by one, as quantcli does, with no module of the model. SCHEME is a preset of
compressed-tensors: FP8_DYNAMIC, W8A8, W4A16. Every linear of the decoder is quantized; two shards at a
time, one for each core.
"""

import os
import sys

from llmcompressor import model_free_ptq


def main(model: str, out: str, scheme: str) -> None:
    """Convert, and save in the compressed-tensors format."""
    workers = len(os.sched_getaffinity(0))
    ignore = ["lm_head", "re:.*embed_tokens"]
    model_free_ptq(model, out, scheme=scheme, ignore=ignore, max_workers=workers, device="cpu")


if __name__ == "__main__":
    main(*sys.argv[1:])
