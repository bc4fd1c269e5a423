"""Fills models with vLLM's own loaders, without an engine, and compares them with the float model.

    python load_models.py REQUEST.json ANSWERS.json

Runs in the engine's own environment. REQUEST: {name: {"float": folder, form: folder, ..}}. ANSWERS:
{name: {form: an answer}}; an answer is {"class": vLLM's class, "empty": parameters with elements that
no tensor filled, "apart": {parameter: relative error of its worst row} of codes, "changed": float
parameters that are not those of the float model, "untracked": what vLLM says of parameters that the
loader does not report (`enable_weights_track`), or null, "error": null} or {"error": words}. Every
parameter is full of a value that no tensor has before a loader runs.
"""

import gc
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
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29511",
}
import torch

torch.cpu._is_amx_tile_supported = lambda: False
torch.cpu._is_avx512_bf16_supported = lambda: False


EMPTY = 255  # as an exponent NaN
E2M1 = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def poison(model: torch.nn.Module) -> None:
    """NaN in floats, and in codes values that quantcli does not write: -128 and 0x7f7f7f7f."""
    for parameter in model.parameters():
        if parameter.dtype == torch.float8_e4m3fn:
            parameter.data.view(torch.uint8).fill_(0x7F)
        elif parameter.dtype.is_floating_point:
            parameter.data.fill_(float("nan"))
        elif parameter.dtype == torch.uint8:
            parameter.data.fill_(EMPTY)
        else:
            parameter.data.fill_(-128 if parameter.dtype == torch.int8 else 0x7F7F7F7F)


def empty(name: str, parameter: torch.nn.Parameter) -> bool:
    """Whether an element still is as `poison` left it."""
    data = parameter.data
    if data.dtype == torch.float8_e4m3fn:
        return bool((data.view(torch.uint8) == 0x7F).any())
    if data.dtype.is_floating_point:
        return bool(data.isnan().any())
    if data.dtype == torch.uint8:  # of a power of two; each byte of four-bit codes may be stored
        return name.endswith("_scale") and bool((data == EMPTY).any())
    return bool((data == (-128 if data.dtype == torch.int8 else 0x7F7F7F7F)).any())


def load(folder: str, *, tracked: bool = True) -> torch.nn.Module:
    """One checkpoint in vLLM's class, as its loader leaves it; tracked: what it reports is checked."""
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs
    from vllm.model_executor.model_loader import get_model_loader
    from vllm.model_executor.model_loader.utils import initialize_model
    from vllm.utils.torch_utils import set_default_torch_dtype

    arguments = EngineArgs(
        model=folder,
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=128,
        max_num_batched_tokens=4096,
        skip_tokenizer_init=True,
        model_loader_extra_config={"enable_weights_track": tracked},
    )
    config = arguments.create_engine_config()
    with set_current_vllm_config(config), set_default_torch_dtype(torch.bfloat16):
        distribute()
        model = initialize_model(vllm_config=config, model_config=config.model_config)
        poison(model)
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    return model


def answer(model: torch.nn.Module, reference: dict[str, torch.Tensor]) -> dict:
    """What a loaded model holds, next to the parameters of the float model."""
    parameters = {name: parameter.data for name, parameter in model.named_parameters()}
    # of a cache that is not quantized: the engine fills them with ones
    cache = ("_zero_point", "k_scale", "v_scale", "q_scale", "prob_scale")
    left = [n for n, p in model.named_parameters() if not n.endswith(cache) and empty(n, p)]
    apart, changed = {}, []
    for name, expected in reference.items():
        found = parameters.get(name)
        if found is None:
            continue
        if found.dtype == expected.dtype:
            if not torch.equal(found, expected):
                changed.append(name)
        elif f"{name}_scale" in parameters and len(found) == len(expected):
            values = stood_for(found, parameters, name)
            rows = (values - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
            apart[name] = float(rows.max())
    return {"class": type(model).__name__, "empty": left, "apart": apart, "changed": changed,
            "error": None}  # fmt: skip


def stood_for(codes: torch.Tensor, parameters: dict, name: str) -> torch.Tensor:
    """The weights that codes stand for: [.., n, k]. Scales of parts of a fused weight lie in a row."""
    scale, last = parameters[f"{name}_scale"], parameters.get(f"{name}_scale_2")
    values = codes.float()
    if codes.dtype == torch.uint8:
        nibbles = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        values = E2M1[(nibbles & 7).long()] * (1 - 2.0 * (nibbles >> 3))
    if scale.dtype == torch.uint8:
        scale = torch.exp2(scale.float() - 127)
    scale = scale.float().unsqueeze(1) if scale.shape == codes.shape[:1] else scale.float()
    if scale.dim() == codes.dim() and scale.shape[-1] > 1:
        scale = scale.repeat_interleave(values.shape[-1] // scale.shape[-1], -1)
    if last is not None:  # the same for all parts
        assert bool((last == last[..., :1]).all()) or last.dim() == 1
        scale = scale * (last.max() if codes.dim() == 2 else last.view(len(codes), -1)[:, :1, None])
    return values * scale


def distribute() -> None:
    """A world of this one process; its groups depend on the model."""
    from vllm.distributed import (
        destroy_model_parallel,
        ensure_model_parallel_initialized,
        init_distributed_environment,
    )

    if not torch.distributed.is_initialized():
        init_distributed_environment(1, 0, "tcp://127.0.0.1:29511", 0, "gloo")
    destroy_model_parallel()
    ensure_model_parallel_initialized(1, 1)


def main() -> None:
    """One checkpoint after the other: importing vLLM takes longer than loading a few."""
    request = json.loads(Path(sys.argv[1]).read_text())
    import stand_ins
    from vllm.model_executor.layers.quantization import modelopt

    stand_ins.install()
    # nothing is computed here, so that routing and widths that a CPU does not serve are of no interest
    supported = classmethod(lambda *_, **__: (True, None))
    stand_ins.cpu_moe.CPUExpertsInt8.is_supported_config = supported
    for name in ("select_fp8_moe_backend", "select_mxfp8_moe_backend", "select_nvfp4_moe_backend"):
        setattr(modelopt, name, lambda *_, **__: (None, None))
    answers: dict = {}
    for name, folders in request.items():
        answers[name], reference = {}, {}
        for form, folder in folders.items():
            try:
                try:
                    model, untracked = load(folder), None
                except ValueError as error:  # some loaders do not say what they have filled
                    if "were not initialized from checkpoint" not in str(error):
                        raise
                    model, untracked = load(folder, tracked=False), str(error)
                answers[name][form] = answer(model, reference) | {"untracked": untracked}
                if form == "float":
                    reference = {n: p.data for n, p in model.named_parameters()}
                del model
            except (Exception, SystemExit) as error:
                traceback.print_exc()
                answers[name][form] = {"error": f"{type(error).__name__}: {error}"}
            gc.collect()
            if answers[name]["float"]["error"]:
                break
        Path(sys.argv[2]).write_text(json.dumps(answers))
        print(name, {form: one["error"] for form, one in answers[name].items()}, flush=True)


if __name__ == "__main__":
    main()
