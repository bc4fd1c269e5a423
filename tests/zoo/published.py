"""Checkpoints whose published layout differs from what transformers writes: names, stacks, draft
layers, storage formats, and families that transformers does not know."""

from __future__ import annotations

import functools
import json
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from tests.zoo.formats import (
    FP8_BLOCKS,
    INT4_GROUPS,
    Tensors,
    fp8_blocks,
    fp8_tensor,
    int4_groups,
    mxfp4,
)
from tests.zoo.make import FAMILIES, build, save, write_tokenizer
from tests.zoo.parts import EXPERTS, HEADS, HIDDEN, IMAGES, MOE, MROPE, QWEN3_VISION, VISION, text

Config = dict[str, Any]
LAYOUTS: dict[str, Callable[[Path], None]] = {}


def layout(source: str) -> Callable[[Any], Any]:
    """Register a function from tensors and config of the family `source` to those that are written."""

    def register(change: Callable[[Tensors, Config], tuple[Tensors, Config]]) -> Any:
        @functools.wraps(change)
        def write_it(folder: Path) -> None:
            write(folder, *change(*read(source)))

        LAYOUTS[change.__name__] = write_it
        return change

    return register


@functools.lru_cache(maxsize=2)
def _saved(source: str) -> tuple[Tensors, str]:
    with tempfile.TemporaryDirectory() as folder:
        save(build(FAMILIES[source]), Path(folder))
        files = sorted(Path(folder).glob("*.safetensors"))
        tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
        return tensors, (Path(folder) / "config.json").read_text()


def read(source: str) -> tuple[Tensors, Config]:
    """Tensors and config.json that transformers writes for a family."""
    tensors, config = _saved(source)
    return dict(tensors), json.loads(config)


def write(folder: Path, tensors: Tensors, config: Config) -> None:
    """A checkpoint in two files."""
    folder.mkdir(parents=True)
    write_tokenizer(folder)
    names, table = sorted(tensors), {}
    for index, part in enumerate((names[: len(names) // 2], names[len(names) // 2 :])):
        file = f"model-0000{index + 1}-of-00002.safetensors"
        own = {name: tensors[name].clone().contiguous() for name in part}
        save_file(own, folder / file, metadata={"format": "pt"})
        table |= dict.fromkeys(part, file)
    total = sum(tensor.nbytes for tensor in tensors.values())
    index_table = {"metadata": {"total_size": total}, "weight_map": table}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index_table))
    (folder / "config.json").write_text(json.dumps(config, indent=1))


def matrix(*shape: int, seed: int = 0) -> Tensor:
    """A drawn matrix."""
    drawn = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (drawn * shape[-1] ** -0.5).to(torch.bfloat16)


def ones(count: int) -> Tensor:
    """The weight of a norm."""
    return torch.ones(count, dtype=torch.bfloat16)


def renamed(tensors: Tensors, *pairs: tuple[str, str]) -> Tensors:
    """With every pattern in every name replaced, in their order."""
    out = {}
    for name, tensor in tensors.items():
        for pattern, to in pairs:
            name = re.sub(pattern, to, name)
        out[name] = tensor
    return out


def remote(config: Config, model_type: str, architecture: str, module: str) -> Config:
    """With the classes of a repository's own code."""
    auto = {"AutoConfig": f"configuration_{module}.Config",
            "AutoModelForCausalLM": f"modeling_{module}.{architecture}"}  # fmt: skip
    return config | {"model_type": model_type, "architectures": [architecture], "auto_map": auto}


# -- draft layers ---------------------------------------------------------------------------------


def next_token_layer(tensors: Tensors, last: int) -> Tensors:
    """With a layer after the last that drafts tokens, as DeepSeek and GLM publish it."""
    old, new = f"model.layers.{last}.", f"model.layers.{last + 1}."
    out = {new + n.removeprefix(old): t.clone() for n, t in tensors.items() if n.startswith(old)}
    out[f"{new}eh_proj.weight"] = matrix(HIDDEN, 2 * HIDDEN)
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        out[f"{new}{norm}.weight"] = ones(HIDDEN)
    out[f"{new}embed_tokens.weight"] = tensors["model.embed_tokens.weight"].clone()
    out[f"{new}shared_head.head.weight"] = tensors["lm_head.weight"].clone()
    return tensors | out


def qwen_draft(tensors: Tensors, layer: str) -> Tensors:
    """With a draft model of one layer under `mtp.`, as Qwen3-Next and Qwen3.5 publish it."""
    own = {n.removeprefix(layer): t.clone() for n, t in tensors.items() if n.startswith(layer)}
    out = {f"mtp.layers.0.{name}": tensor for name, tensor in own.items()}
    out["mtp.fc.weight"] = matrix(HIDDEN, 2 * HIDDEN)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        out[f"mtp.{norm}.weight"] = ones(HIDDEN)
    return tensors | out


@layout("deepseek_v3")
def deepseek_v3_fp8(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    tensors = fp8_blocks(next_token_layer(tensors, 2), r"embed|head|eh_proj|\.gate\.|norm")
    return tensors, config | {"num_nextn_predict_layers": 1, "quantization_config": FP8_BLOCKS}


@layout("glm4_moe")
def glm4_moe_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return next_token_layer(tensors, 2), config | {"num_nextn_predict_layers": 1}


@layout("qwen3_next")
def qwen3_next_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return qwen_draft(tensors, "model.layers.3."), config


@layout("qwen3_5")
def qwen3_5_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return qwen_draft(tensors, "model.language_model.layers.3."), config


# -- stacks of experts ----------------------------------------------------------------------------


def stacked(tensors: Tensors) -> Tensors:
    """Experts as stacks `gate_up_proj` and `down_proj` without `.weight`, [E, out, in]."""
    experts: dict[str, dict[tuple[int, str], Tensor]] = {}
    out: Tensors = {}
    for name, tensor in tensors.items():
        match = re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name)
        if match:
            experts.setdefault(match[1], {})[int(match[2]), match[3]] = tensor
        else:
            out[name] = tensor
    for prefix, own in experts.items():
        count = 1 + max(expert for expert, _ in own)
        gated = [torch.cat([own[e, "gate"], own[e, "up"]]) for e in range(count)]
        out[f"{prefix}.gate_up_proj"] = torch.stack(gated)
        out[f"{prefix}.down_proj"] = torch.stack([own[e, "down"] for e in range(count)])
    return out


def turned(tensors: Tensors) -> Tensors:
    """With stacks [E, in, out]."""
    ends = (".experts.gate_up_proj", ".experts.down_proj")
    return {n: t.mT.contiguous() if n.endswith(ends) else t for n, t in tensors.items()}


@layout("qwen3_5_moe")
def qwen3_5_moe_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return stacked(qwen_draft(tensors, "model.language_model.layers.3.")), config


@layout("qwen3_5_moe_text")
def qwen3_5_moe_stacks(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return stacked(tensors), config


@layout("qwen3_5_moe")
def qwen3_5_moe_fp8(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    small = r"\.gate\.|shared_expert_gate|in_proj_[ab]\.|conv1d"
    skipped = ["lm_head", "model.visual"]
    skipped += [name.removesuffix(".weight") for name in tensors if re.search(small, name)]
    quantization = FP8_BLOCKS | {"modules_to_not_convert": skipped}
    tensors = fp8_blocks(tensors, f"embed|lm_head|visual|{small}")
    return tensors, config | {"quantization_config": quantization}


@layout("qwen3_vl_moe")
def qwen3_vl_moe_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return turned(tensors), config


@layout("step3p7")
def step3p5(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """The language model alone, under a name that transformers does not know."""
    own = {n: t for n, t in tensors.items() if "vision" not in n and "vit" not in n}
    own = renamed(own, (r"^model\.language_model\.|^language_model\.model\.", "model."))
    own = {n: t for n, t in own.items() if n.startswith(("model.", "lm_head")) and "projector" not in n}
    return own, remote(config["text_config"], "step3p5", "Step3p5ForCausalLM", "step3p5")


@layout("gpt_oss")
def gpt_oss_mxfp4(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    out: Tensors = {}
    for name, tensor in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            out[f"{name}_blocks"], out[f"{name}_scales"] = mxfp4(tensor)
        else:
            out[name] = tensor
    skipped = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    quantization = {"quant_method": "mxfp4", "modules_to_not_convert": skipped}
    return out, config | {"quantization_config": quantization}


# -- quantized checkpoints of others --------------------------------------------------------------


@layout("minimax_m2")
def minimax_m2_fp8(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    quantization = FP8_BLOCKS | {
        "fmt": "float8_e4m3fn",
        "modules_to_not_convert": ["gate", "e_score_correction_bias", "lm_head"],
    }
    tensors = fp8_blocks(tensors, r"embed|lm_head|\.gate\.")
    return tensors, config | {"quantization_config": quantization}


@layout("deepseek_v3")
def kimi_k2_fp8(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    config = remote(config, "kimi_k2", "DeepseekV3ForCausalLM", "deepseek")
    tensors = fp8_blocks(tensors, r"embed|head|\.gate\.|norm")
    return tensors, config | {"quantization_config": FP8_BLOCKS}


@layout("deepseek_v3")
def kimi_k2_int4(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    config = remote(config, "kimi_k2", "DeepseekV3ForCausalLM", "deepseek")
    return int4_groups(tensors, r"\.mlp\.experts\."), config | {"quantization_config": INT4_GROUPS}


@layout("kimi_k25")
def kimi_k25_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return renamed(
        tensors, (r"language_model\.model\.blocks\.", "language_model.model.layers.")
    ), config


@layout("ministral3")
def ministral3_fp8(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    skipped = ["model.vision_tower", "model.multi_modal_projector", "lm_head"]
    quantization = {"quant_method": "fp8", "activation_scheme": "static", "dequantize": False,
                    "weight_block_size": None, "modules_to_not_convert": skipped}  # fmt: skip
    tensors = fp8_tensor(tensors, r"language_model.*_proj\.weight", "_scale_inv", "activation_scale")
    return tensors, config | {"quantization_config": quantization}


@layout("llama")
def modelopt_fp8(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    numbers = {"dynamic": False, "num_bits": 8, "type": "float"}
    group = {"input_activations": numbers, "weights": numbers, "targets": ["Linear"]}
    quantization = {"quant_method": "modelopt", "quant_algo": "FP8", "ignore": ["lm_head"],
                    "config_groups": {"group_0": group},
                    "producer": {"name": "modelopt", "version": "0.37"}}  # fmt: skip
    tensors = fp8_tensor(tensors, r"_proj\.weight", "_scale", "input_scale")
    return tensors, config | {"quantization_config": quantization}


# -- names ----------------------------------------------------------------------------------------


@layout("qwen3")
def qwen3_embedding(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    del tensors["lm_head.weight"]
    return renamed(tensors, (r"^model\.", "")), config | {"tie_word_embeddings": True}


@layout("qwen2")
def qwen2_rm(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """A reward model, with a head of two linears."""
    del tensors["lm_head.weight"]
    tensors |= {"score.0.weight": matrix(HIDDEN, HIDDEN), "score.2.weight": matrix(1, HIDDEN)}
    tensors |= {f"score.{i}.bias": ones(n) * 0 for i, n in ((0, HIDDEN), (2, 1))}
    config |= {"architectures": ["Qwen2ForRewardModel"]}
    return tensors, config | {"auto_map": {"AutoModel": "modeling_qwen2_rm.Qwen2ForRewardModel"}}


@layout("deepseek_v4")
def deepseek_v4_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    pairs = (
        (r"^model\.", ""),
        ("embed_tokens", "embed"),
        (r"hc_head\.hc_(fn|base|scale)", r"hc_head_\1"),
    )
    return renamed(tensors, *pairs), config


@layout("llama")
def minicpm4(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    config |= {"scale_emb": 12, "dim_model_base": HIDDEN, "scale_depth": 1.4}
    return tensors, remote(config, "minicpm", "MiniCPMForCausalLM", "minicpm")


@layout("qwen3_moe")
def ling_v2(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Attention with one matrix for q, k and v, and a shared expert."""
    out = renamed(
        {name: tensor for name, tensor in tensors.items() if not re.search(r"[qkv]_proj", name)},
        (r"self_attn\.o_proj", "attention.dense"),
        (r"self_attn\.q_norm", "attention.query_layernorm"),
        (r"self_attn\.k_norm", "attention.key_layernorm"),
        ("embed_tokens", "word_embeddings"),
    )
    for layer in range(3):
        prefix = f"model.layers.{layer}"
        qkv = [tensors[f"{prefix}.self_attn.{name}_proj.weight"] for name in "qkv"]
        out[f"{prefix}.attention.query_key_value.weight"] = torch.cat(qkv)
        out[f"{prefix}.mlp.gate.expert_bias"] = torch.zeros(EXPERTS)
        for name in ("gate", "up", "down"):
            own = tensors[f"{prefix}.mlp.experts.0.{name}_proj.weight"].clone()
            out[f"{prefix}.mlp.shared_experts.{name}_proj.weight"] = own
    return out, remote(config, "bailing_moe", "BailingMoeV2ForCausalLM", "bailing_moe_v2")


@layout("llama")
def internlm2(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Names of InternLM2: `wqkv`, whose rows stand by head of k and v, `wo`, `w1`, `w2`, `w3`."""
    out = renamed(
        {name: tensor for name, tensor in tensors.items() if not re.search(r"[qkv]_proj", name)},
        (r"self_attn\.o_proj", "attention.wo"), (r"mlp\.gate_proj", "feed_forward.w1"),
        (r"mlp\.up_proj", "feed_forward.w3"), (r"mlp\.down_proj", "feed_forward.w2"),
        ("input_layernorm", "attention_norm"), ("post_attention_layernorm", "ffn_norm"),
        ("embed_tokens", "tok_embeddings"), (r"^lm_head", "output"),
    )  # fmt: skip
    for layer in range(3):
        q, k, v = (tensors[f"model.layers.{layer}.self_attn.{n}_proj.weight"] for n in "qkv")
        grouped = [q.view(2, -1, HIDDEN), k.view(2, -1, HIDDEN), v.view(2, -1, HIDDEN)]
        qkv = torch.cat(grouped, 1).reshape(-1, HIDDEN)
        out[f"model.layers.{layer}.attention.wqkv.weight"] = qkv
    return out, remote(config, "internlm2", "InternLM2ForCausalLM", "internlm2")


@layout("llama")
def baichuan(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """`W_pack` holds q, k and v."""
    out = {name: tensor for name, tensor in tensors.items() if not re.search(r"[qkv]_proj", name)}
    for layer in range(3):
        prefix = f"model.layers.{layer}.self_attn"
        q = tensors[f"{prefix}.q_proj.weight"]
        out[f"{prefix}.W_pack.weight"] = torch.cat([q, q.roll(1, 0), q.roll(2, 0)])
    config |= {"num_key_value_heads": 4}
    return out, remote(config, "baichuan", "BaichuanForCausalLM", "baichuan")


@layout("phi3")
def chatglm(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Names of ChatGLM: matrices fused as in Phi-3, under `transformer.encoder`."""
    out = renamed(
        tensors,
        (r"^model\.layers", "transformer.encoder.layers"),
        (r"self_attn\.qkv_proj", "self_attention.query_key_value"),
        (r"self_attn\.o_proj", "self_attention.dense"), (r"mlp\.gate_up_proj", "mlp.dense_h_to_4h"),
        (r"mlp\.down_proj", "mlp.dense_4h_to_h"),
        (r"^model\.embed_tokens", "transformer.embedding.word_embeddings"),
        (r"^model\.norm", "transformer.encoder.final_layernorm"),
        (r"^lm_head", "transformer.output_layer"),
    )  # fmt: skip
    config |= {"ffn_hidden_size": config["intermediate_size"], "num_layers": 3,
               "multi_query_attention": True, "multi_query_group_num": 2}  # fmt: skip
    return out, remote(config, "chatglm", "ChatGLMForConditionalGeneration", "chatglm")


@layout("gemma3_mm")
def gemma3_pub(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    return renamed(tensors, (r"^vision_tower\.", "vision_tower.vision_model.")), config


# -- towers in layouts of their own ---------------------------------------------------------------


def vision_tower(prefix: str) -> Tensors:
    """Two layers of attention and an MLP over 128 channels, as SigLIP has them."""
    side, wide = VISION["hidden_size"], VISION["intermediate_size"]
    patches = matrix(side, 3 * 14 * 14).view(side, 3, 14, 14)
    out = {
        f"{prefix}.embeddings.patch_embedding.weight": patches,
        f"{prefix}.embeddings.position_embedding.weight": matrix(4, side),
    }
    for layer in range(2):
        path = f"{prefix}.encoder.layers.{layer}"
        shapes = {f"self_attn.{name}_proj": (side, side) for name in ("q", "k", "v", "out")}
        shapes |= {"mlp.fc1": (wide, side), "mlp.fc2": (side, wide)}
        for seed, (name, shape) in enumerate(shapes.items()):
            out[f"{path}.{name}.weight"] = matrix(*shape, seed=seed + 10 * layer)
            out[f"{path}.{name}.bias"] = ones(shape[0]) * 0
        for norm in ("layer_norm1", "layer_norm2"):
            out[f"{path}.{norm}.weight"] = ones(side)
    return out


@layout("qwen2")
def minicpmv(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """MiniCPM-V: `llm.`, `vpm.` and `resampler.`."""
    out = renamed(tensors, ("^", "llm.")) | vision_tower("vpm")
    out |= {
        "resampler.query": matrix(16, HIDDEN),
        "resampler.kv_proj.weight": matrix(HIDDEN, 128),
        "resampler.attn.in_proj_weight": matrix(3 * HIDDEN, HIDDEN),
        "resampler.attn.in_proj_bias": ones(3 * HIDDEN) * 0,
        "resampler.attn.out_proj.weight": matrix(HIDDEN, HIDDEN),
        "resampler.proj": matrix(HIDDEN, HIDDEN, seed=1),
    }
    config |= {"vision_config": {"model_type": "siglip_vision_model", **VISION}, "query_num": 16}
    return out, remote(config, "minicpmv", "MiniCPMV", "minicpmv")


@layout("phi3")
def phi4mm(tensors: Tensors, config: Config) -> tuple[Tensors, Config]:
    """Phi-4-multimodal: a tower among the embeddings, and adapters next to each linear."""
    tower = "model.embed_tokens_extend.image_embed"
    out = tensors | vision_tower(f"{tower}.img_processor")
    out |= {f"{tower}.img_projection.0.weight": matrix(HIDDEN, 128),
            f"{tower}.img_projection.2.weight": matrix(HIDDEN, HIDDEN)}  # fmt: skip
    for name, weight in tensors.items():
        if name.endswith("_proj.weight"):
            module, (n, k) = name.removesuffix(".weight"), weight.shape
            del out[name]
            out[f"{module}.base_layer.weight"] = weight
            for adapter in ("vision", "speech"):
                out[f"{module}.lora_A.{adapter}.weight"] = matrix(16, k)
                out[f"{module}.lora_B.{adapter}.weight"] = matrix(n, 16)
    return out, remote(config, "phi4mm", "Phi4MMForCausalLM", "phi4mm")


def _qwen3_omni(folder: Path) -> None:
    """Qwen3-Omni: a thinker as transformers writes it, a talker and a vocoder that it cannot build."""
    import transformers

    audio = {"d_model": 128, "encoder_layers": 2, "encoder_attention_heads": 4, "encoder_ffn_dim": 256,
             "output_dim": HIDDEN, "downsample_hidden_size": 64, "num_mel_bins": 128}  # fmt: skip
    config = transformers.Qwen3OmniMoeConfig(thinker_config={
        "text_config": text(HEADS, MOE, MROPE), "vision_config": dict(QWEN3_VISION),
        "audio_config": audio, **IMAGES})  # fmt: skip
    from tests.zoo.make import draw

    model = transformers.Qwen3OmniMoeThinkerForConditionalGeneration(config.thinker_config)
    draw(model.to(torch.bfloat16))
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        thinker = load_file(Path(place) / "model.safetensors")
    tensors = {f"thinker.{name}": tensor for name, tensor in thinker.items()}
    talker, _ = read("qwen3_moe")
    tensors |= renamed(talker, ("^lm_head", "codec_head"), ("^", "talker."))
    vocoder, _ = read("qwen3")
    own = {n: t for n, t in vocoder.items() if n.startswith(("model.layers", "model.norm"))}
    tensors |= renamed(own, (r"^model\.", "code2wav.pre_transformer."))
    config.dtype = torch.bfloat16
    table = json.loads(config.to_json_string(use_diff=False))
    write(folder, tensors, table | {"architectures": ["Qwen3OmniMoeForConditionalGeneration"]})


def _mistral_consolidated(folder: Path) -> None:
    """Mistral's own file next to transformers' files: the same weights twice."""
    tensors, config = read("mistral")
    write(folder, tensors, config)
    own = renamed(
        tensors,
        (r"^model\.", ""), (r"self_attn\.([qkvo])_proj", r"attention.w\1"),
        (r"mlp\.gate_proj", "feed_forward.w1"), (r"mlp\.up_proj", "feed_forward.w3"),
        (r"mlp\.down_proj", "feed_forward.w2"), ("embed_tokens", "tok_embeddings"),
        ("lm_head", "output"),
    )  # fmt: skip
    save_file(own, folder / "consolidated.safetensors")
    (folder / "params.json").write_text(json.dumps({"dim": HIDDEN, "n_layers": 3}))


def _modelopt_file(folder: Path) -> None:
    """ModelOpt's own description, as a file next to config.json."""
    modelopt = LAYOUTS_BY_DECORATOR["modelopt_fp8"]
    modelopt(folder)
    table = {"quant_algo": "FP8", "kv_cache_quant_algo": "FP8", "exclude_modules": ["lm_head"]}
    described = {"producer": {"name": "modelopt", "version": "0.37"}, "quantization": table}
    (folder / "hf_quant_config.json").write_text(json.dumps(described))


def _other_dtype(dtype: torch.dtype) -> Callable[[Path], None]:
    def write_it(folder: Path) -> None:
        tensors, config = read("llama")
        tensors = {name: tensor.to(dtype) for name, tensor in tensors.items()}
        write(folder, tensors, config | {"dtype": str(dtype).removeprefix("torch.")})

    return write_it


LAYOUTS_BY_DECORATOR = dict(LAYOUTS)
LAYOUTS |= {
    "modelopt_fp8": _modelopt_file,
    "qwen3_omni": _qwen3_omni,
    "mistral_consolidated": _mistral_consolidated,
    "llama_float16": _other_dtype(torch.float16),
    "llama_float32": _other_dtype(torch.float32),
}
