"""Builds vLLM's own class for each draft, loads its checkpoint, and writes its parameters down.

    python load_drafts.py REQUEST.json FOLDER

Runs in the engine's own environment. REQUEST: {"target": a float checkpoint that all drafts are for,
"drafts": {name: {"folder", "method"}}}. FOLDER/NAME.safetensors: the parameters after loading, of
floats full of NaN before, of integers full of -1. FOLDER/answers.json: {name: {"schemes": {module that
vLLM built: name of its scheme, or of its method}} or {"error": words}}. No engine is started.
"""

import json
import os
import sys
import traceback
from pathlib import Path

os.environ |= {
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",
}


def config_of(target: str, draft: dict):
    """What vLLM makes of the arguments of a server with speculative decoding."""
    from vllm.engine.arg_utils import EngineArgs

    asked = {"model": draft["folder"], "method": draft["method"], "num_speculative_tokens": 2}
    arguments = EngineArgs(
        model=target,
        skip_tokenizer_init=True,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=64,
        speculative_config=asked,
    )
    return arguments.create_engine_config()


def load(target: str, draft: dict) -> tuple[dict, dict]:
    """The parameters of a draft as vLLM fills them, and what it built for each module."""
    import torch
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    config = config_of(target, draft)
    of_draft = config.speculative_config.draft_model_config
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        model = initialize_model(config, model_config=of_draft)
        for parameter in model.parameters():
            parameter.data.fill_(float("nan") if parameter.is_floating_point() else -1)
        loader = get_model_loader(config.load_config)
        model.load_weights(loader.get_all_weights(of_draft, model))
    schemes = {}
    for name, module in model.named_modules():
        method = getattr(module, "quant_method", None)
        found = getattr(module, "scheme", None) or method
        if found is not None:
            schemes[name] = type(found).__name__
    return {name: p.detach().contiguous() for name, p in model.named_parameters()}, schemes


def main() -> None:
    """Load one draft after the other: importing vLLM takes longer than all of them."""
    request, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    from safetensors.torch import save_file
    from vllm.distributed import parallel_state

    parallel_state.init_distributed_environment(
        1, 0, f"file://{folder.resolve()}/rendezvous", 0, backend="gloo"
    )
    from vllm.config import VllmConfig, set_current_vllm_config

    with set_current_vllm_config(VllmConfig()):
        parallel_state.initialize_model_parallel()
    answers = {}
    for name, draft in request["drafts"].items():
        try:
            parameters, schemes = load(request["target"], draft)
            save_file(parameters, folder / f"{name}.safetensors")
            answers[name] = {"schemes": schemes}
        except Exception as error:
            traceback.print_exc()
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
        (folder / "answers.json").write_text(json.dumps(answers))
    os._exit(0)


if __name__ == "__main__":
    main()
