"""vLLM's own classes for drafts build a converted one as its config says, and fill it."""

import json
import subprocess
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load_file

from tests.engine.conftest import CT, convert
from tests.engine.harness import PYTHON, ROOT, kept_environment
from tests.tiny_drafts import VOCABULARY, make_draft
from tests.tiny_models import make_tiny

pytestmark = pytest.mark.engine

ALL = ["*_proj", "*_with_mqa", "fc"]
LATENT = {"match": "*.kv_b_proj", "scheme": "keep", "optional": True}
PARTS = {"match": ["*.down_proj", "*.[qkv]_proj", "fc"], "scheme": "keep"}
GROUPS = {"name": "w4a16", "group_size": 32}
# target and rules; which of these vLLM cannot take is tested with the refusals
FORMATS = {
    "int8": (CT, [LATENT, {"match": ALL, "scheme": "w8a8_dynamic"}]),
    "parts": (CT, [PARTS, {"match": ALL, "scheme": "w8a8_dynamic"}]),
    "mixed": (CT, [{"match": "*.down_proj", "scheme": "fp8_dynamic"},
                   {"match": ALL, "scheme": "w8a8_dynamic"}]),
    "w4a16": (CT, [{"match": ALL, "scheme": GROUPS}]),
    "fp8": ("fp8", [{"match": "*_proj", "scheme": "fp8_tensor"}]),
    "gptq": ("gptq", [{"match": ALL, "scheme": GROUPS}]),
    "gptq-parts": ("gptq", [PARTS, {"match": ALL, "scheme": GROUPS}]),
}  # fmt: skip
LOADED = ("eagle", "eagle3", "eagle3_named", "eagle3_speculators", "eagle3_qwen3", "dflash")
CASES = [(name, form) for name in LOADED for form in FORMATS] + [("eagle3_deepseek", "int8")]
METHODS = {"eagle": "eagle", "dflash": "dflash"}  # others are eagle3
ERROR = {"parts": 0.02, "int8": 0.02, "mixed": 0.06, "fp8": 0.06}  # of weights, of int4 0.2
FUSED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
}
# what a draft shares with its target, and what attention keeps of a cache that is not quantized
SHARED = ("lm_head.weight", "model.embed_tokens.weight", "model.mask_embedding")
SCHEMES = {"int8": "Int8", "fp8": "Fp8", "w4a16": "WNA16", "gptq": "AutoGPTQ", "float": "Unquantized"}


@pytest.fixture(scope="module")
def loaded(environment, tmp_path_factory):
    """Drafts by name and format: the source's tensors, vLLM's parameters, and its schemes."""
    root = tmp_path_factory.mktemp("drafts")
    target = make_tiny(root / "target", "llama", vocab_size=VOCABULARY)
    sources = {name: make_draft(root / name, name) for name in {one for one, _ in CASES}}
    folders = {}
    for name, form in CASES:
        folders[f"{name}-{form}"] = convert(root / f"{name}-{form}", sources[name], *FORMATS[form])
    folders["misnamed"] = misnamed(root / "misnamed", folders["eagle3-parts"])
    drafts = {
        key: {"folder": str(folder), "method": METHODS.get(key.split("-")[0], "eagle3")}
        for key, folder in folders.items()
    }
    request, out = root / "request.json", root / "loaded"
    out.mkdir()
    request.write_text(json.dumps({"target": str(target), "drafts": drafts}))
    script = ROOT / "tests" / "engine" / "load_drafts.py"
    command = [PYTHON, script, request, out]
    done = subprocess.run(command, env=kept_environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    answers = json.loads((out / "answers.json").read_text())
    found = {}
    for key, answer in answers.items():
        assert "error" not in answer, f"{key}: {answer}\n{done.stderr[-3000:]}"
        found[key] = (load_file(out / f"{key}.safetensors"), answer["schemes"])
    return {name: load_file(path / "model.safetensors") for name, path in sources.items()}, found


def misnamed(folder, source):
    """A copy whose `ignore` has the names of tensors, as tools that do not know drafts do."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    names = [f"midlayer.self_attn.{name}_proj" for name in "qkv"]
    config["quantization_config"]["ignore"] = [*names, "midlayer.mlp.down_proj", "model.fc", "lm_head"]
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def unpacked(words, rows):
    """int32 words of eight int4 codes -> codes; eight along the second dimension, or the first."""
    shifts = torch.arange(8, dtype=torch.int32) * 4
    codes = ((words.unsqueeze(-1) >> shifts) & 15) - 8
    return codes.flatten(1) if rows else codes.permute(0, 2, 1).reshape(-1, words.shape[1])


def served(found, module, widths):
    """The numbers that vLLM computes with: float32 [n, k]."""
    if f"{module}.weight_packed" in found:
        codes, scale = unpacked(found[f"{module}.weight_packed"], True), found[f"{module}.weight_scale"]
        return codes.float() * scale.float().repeat_interleave(32, 1)
    if f"{module}.qweight" in found:
        codes, scale = unpacked(found[f"{module}.qweight"], False), found[f"{module}.scales"]
        return (codes.float() * scale.float().repeat_interleave(32, 0)).mT
    weight = found[f"{module}.weight"].float()
    if (scale := found.get(f"{module}.weight_scale")) is None:
        return weight
    if scale.dim() == 1:  # one for each sibling
        scale = torch.cat([scale[i].expand(n) for i, n in enumerate(widths)]).unsqueeze(1)
    return weight * scale


def expected(source, name):
    """Of each module that vLLM builds: the source's weights, one below the other."""
    modules = {}
    for tensor in source:
        module = tensor.removesuffix(".weight").replace("midlayer.", "layers.0.")
        parent, _, last = module.rpartition(".")
        fused = next((key for key, parts in FUSED.items() if last in parts), None)
        if source[tensor].dim() != 2 or last == "embed_tokens":
            continue
        key = f"{parent}.{fused}" if fused else module
        modules[key if last == "lm_head" else f"model.{key}"] = [
            source[tensor.replace(last, part)] for part in FUSED.get(fused, (last,))
        ]
    assert len(modules) >= 5, name
    return modules


@pytest.mark.parametrize(("name", "form"), CASES)
def test_every_linear_is_built_and_filled_as_the_recipe_says(loaded, name, form):
    sources, found = loaded
    parameters, schemes = found[f"{name}-{form}"]
    for module, weights in expected(sources[name], name).items():
        last = module.rpartition(".")[2]
        kept = last in {"down_proj", "qkv_proj", "fc"} if form.endswith("parts") else False
        kept |= last in {"kv_b_proj", "lm_head"} or (form == "fp8" and last == "fc")
        kind = {"parts": "int8", "mixed": "fp8" if last == "down_proj" else "int8"}.get(
            form, form.removesuffix("-parts")
        )
        assert SCHEMES["float" if kept else kind] in schemes[module], module
        widths = [len(weight) for weight in weights]
        numbers, exact = served(parameters, module, widths), torch.cat(weights).float()
        if last == "lm_head":  # vLLM rounds the number of rows up
            numbers = numbers[: len(exact)]
        assert numbers.shape == exact.shape, module
        if kept:
            assert torch.equal(numbers, exact), module
            continue
        for start, stop in pairwise([0, *torch.tensor(widths).cumsum(0).tolist()]):
            error = (numbers[start:stop] - exact[start:stop]).norm() / exact[start:stop].norm()
            assert 1e-4 < float(error) < ERROR.get(form, 0.2), module  # NaN if it was not filled


@pytest.mark.parametrize(("name", "form"), CASES)
def test_no_parameter_is_left_as_the_memory_was(loaded, name, form):
    sources, found = loaded
    for key, value in found[f"{name}-{form}"][0].items():
        if ".attn." in key or (key in SHARED and key.removeprefix("model.") not in sources[name]):
            continue
        empty = value.float().isnan().any() if value.is_floating_point() else (value == -1).all()
        assert not bool(empty), key


def test_names_of_tensors_in_ignore_are_not_enough(loaded):
    """vLLM builds what they name as quantized, and leaves scales empty: the harness sees it."""
    parameters, schemes = loaded[1]["misnamed"]
    for module in ("model.layers.0.self_attn.qkv_proj", "model.layers.0.mlp.down_proj"):
        assert SCHEMES["int8"] in schemes[module]
        assert parameters[f"{module}.weight_scale"].isnan().all()
