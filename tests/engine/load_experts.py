"""Gives the experts of one layer to vLLM's own loader and writes down the parameters that it fills.

    python load_experts.py REQUEST.json PARAMETERS.safetensors

Runs in the engine's own environment. REQUEST: {"folder": a checkpoint, "experts": the name of the set,
"transposed": whether the family's float checkpoints are [in, out], "shapes": {parameter: shape},
"dtypes": {parameter: dtype of torch}, "loader": the name of a model whose loader is its own, or null}.
No engine is started: the loaders need no more of a layer, or of a model, than what is set here.
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.utils import set_weight_attrs


def layer_of(request: dict) -> RoutedExperts:
    """A layer that is not distributed, with parameters full of NaN or of -1."""
    layer = RoutedExperts.__new__(RoutedExperts)
    nn.Module.__init__(layer)
    experts = request["shapes"]["w13_weight"][0]
    layer.moe_config = SimpleNamespace(
        tp_shard_with_padding=False,
        is_act_and_mul=True,
        moe_parallel_config=SimpleNamespace(tp_size=1, tp_rank=0),
        tp_rank=0,
        tp_size=1,
        num_logical_experts=experts,
        num_experts=experts,
        shared_expert_prefix=None,
        device="cpu",
    )
    layer.expert_map_manager = SimpleNamespace(num_fused_shared_experts=0)
    layer._fused_shared_expert_quantizer = None
    layer.quant_config = SimpleNamespace(get_name=lambda: "compressed-tensors")
    layer.quant_method = object()
    layer.lora_base_layer_prefix = ""
    object.__setattr__(layer, "layer_name", request["experts"])
    layer.is_fused_checkpoint_transposed = request["transposed"]
    names = ("ckpt_gate_proj_name", "gate_proj"), ("ckpt_down_proj_name", "down_proj")
    for name, value in (*names, ("ckpt_up_proj_name", "up_proj")):
        setattr(layer, name, value)
    layer._map_global_expert_id_to_local_expert_id = lambda expert: expert
    layer._loaded_expert_biases = set()
    for name, shape in request["shapes"].items():
        dtype = getattr(torch, request["dtypes"][name])
        empty = torch.full(shape, float("nan") if dtype.is_floating_point else -1, dtype=dtype)
        parameter = nn.Parameter(empty, requires_grad=False)
        layer.register_parameter(name, parameter)
        kind = {"quant_method": "channel"} if "scale" in name else {}
        set_weight_attrs(parameter, {"weight_loader": layer.weight_loader, **kind})
    return layer


def model_of(request: dict, layer: RoutedExperts) -> nn.Module:
    """A model with that layer alone, whose own loader can run."""
    from vllm.model_executor.models.llama4 import Llama4Model
    from vllm.model_executor.models.step3p5 import Step3p5Model

    kind = {"llama4": Llama4Model, "step3p5": Step3p5Model}[request["loader"]]
    model = kind.__new__(kind)
    nn.Module.__init__(model)
    model.num_experts = model.moe_num_experts = request["shapes"]["w13_weight"][0]
    model.n_redundant_experts = 0
    model.config = SimpleNamespace(num_attention_groups=2, num_hidden_layers=4)
    parent, path = model, f"{request['experts']}.routed_experts".removeprefix("model.").split(".")
    for name in path[:-1]:
        child = nn.Module()
        parent.add_module(name, child)
        parent = child
    parent.add_module(path[-1], layer)
    return model


def main() -> None:
    """Load, and save what there is then."""
    request = json.loads(Path(sys.argv[1]).read_text())
    layer, prefix = layer_of(request), request["experts"] + "."
    for file in sorted(Path(request["folder"]).glob("*.safetensors")):
        tensors = load_file(file)
        own = [name for name in tensors if name.startswith(prefix)]
        if request["loader"] is None:
            list(layer.load_weights((name.removeprefix(prefix), tensors[name]) for name in own))
        else:
            model = model_of(request, layer)
            model.load_weights((name.removeprefix("model."), tensors[name]) for name in own)
    save_file({name: p.detach() for name, p in layer.named_parameters()}, sys.argv[2])


if __name__ == "__main__":
    main()
