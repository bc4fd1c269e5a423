"""Checkpoints converted here, and what vLLM answers for all of them in one process."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quantcli.calibration.replay.served import Served, log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from tests.engine.harness import CPU, PYTHON, ROOT, Answer, flags, serve, windows
from tests.tiny_models import make_tiny

MODEL = ROOT / "examples/tiny-qwen3"
CALIBRATION = {"data": str(ROOT / "examples/calibration.txt"), "samples": 32, "length": 128}
CT = "compressed-tensors"
ALL = "*_proj"
KEEP = [{"match": ["*.0.self_attn.*", "*.5.mlp.*"], "scheme": "keep"}]
# target and rules, of the trained model
CONVERTED: dict[str, tuple[str, list[dict[str, object]]]] = {
    "int8-dynamic": (CT, [{"match": ALL, "scheme": "w8a8_dynamic"}]),
    "int8-static": (CT, [{"match": ALL, "scheme": "w8a8_static"}]),
    "int8-symmetric": (CT, [{"match": ALL, "scheme": {"name": "w8a8_static", "symmetric": True}}]),
    "fp8-dynamic": (CT, [{"match": ALL, "scheme": "fp8_dynamic"}]),
    "w4a16": (CT, [{"match": ALL, "scheme": "w4a16"}]),
    "w4a16-channel": (CT, [{"match": ALL, "scheme": {"name": "w4a16", "group_size": "channel"}}]),
    "w4a16-asymmetric": (CT, [{"match": ALL, "scheme": {"name": "w4a16", "symmetric": False}}]),
    "mixed": (CT, [*KEEP, {"match": "*.down_proj", "scheme": "w8a8_dynamic"},
                   {"match": "*.o_proj", "scheme": "w4a16"},
                   {"match": ["*.gate_proj", "*.up_proj"], "scheme": "w8a8_static"},
                   {"match": ALL, "scheme": "fp8_dynamic"}]),
    "fp8-static": (CT, [{"match": ALL, "scheme": "fp8_static"}]),
    "fp8-tensor": (CT, [{"match": ALL, "scheme": "fp8_tensor"}]),
    "fp8-block": (CT, [{"match": ALL, "scheme": "fp8_block"}]),
    "mxfp8": (CT, [{"match": ALL, "scheme": "mxfp8"}]),
    "nvfp4": (CT, [{"match": ALL, "scheme": "nvfp4"}]),
    "nvfp4a16": (CT, [{"match": ALL, "scheme": "nvfp4a16"}]),
    "mxfp4": (CT, [{"match": ALL, "scheme": "mxfp4"}]),
    "mxfp4-fp8": (CT, [{"match": ALL, "scheme": "mxfp4_fp8"}]),
}  # fmt: skip
# recipes for gptq, which also make a compressed-tensors file each: kinds by name, a head, whole rows
SAME: dict[str, list[dict[str, object]]] = {
    "mixed": [*KEEP, {"match": "*.down_proj", "scheme": {"name": "w4a16", "group_size": "channel"}},
              {"match": ALL, "scheme": {"name": "w4a16", "group_size": 32}}],
    "head": [{"match": [ALL, "lm_head"], "scheme": {"name": "w4a16", "group_size": 64}}],
}  # fmt: skip
EXPERTS = [{"match": "*.experts.*", "scheme": "keep"}]
MAMBA = [{"match": "*.mamba.*", "scheme": "keep"}]  # no kernel for their odd number of rows
GROUPS = {"name": "w4a16", "group_size": 32}
# of tiny random models of other architectures; vLLM's CPU build has no kernels for other experts
Formats = dict[str, list[dict[str, object]]]
FAMILIES: dict[str, Formats] = {
    family: {"int8-dynamic": [{"match": ALL, "scheme": "w8a8_dynamic"}],
             "fp8-dynamic": [*keep, {"match": ALL, "scheme": "fp8_dynamic"}],
             "w4a16": [*keep, {"match": ALL, "scheme": GROUPS}]}
    for family, keep in (("llama", []), ("qwen2", []), ("qwen3_moe", EXPERTS),
                         ("granitemoe", EXPERTS), ("granitemoehybrid", [*EXPERTS, *MAMBA]))
}  # fmt: skip
# The loader of this family does not say which parameters it has filled from single experts.
# Source: vllm 0.32.0, model_executor/models/granitemoehybrid.py:473-512.
UNTRACKED = ("granitemoehybrid-int8-dynamic",)


def convert(folder: Path, model: Path, target: str, rules: list[dict[str, object]]) -> Path:
    """Convert a model; returns the checkpoint's folder."""
    recipe = folder.with_name(folder.name + ".yaml")
    made: dict[str, object] = {"target": target, "rules": rules}
    if any(name in json.dumps(rules) for name in ("static", '"nvfp4"')):
        made["calibration"] = CALIBRATION
    recipe.write_text(json.dumps(made))
    commands.quantize(commands.plan(recipe, model=str(model), out=folder))
    return folder


def ours(folder: Path, ids: list[list[int]], dtype: str | None = None) -> torch.Tensor:
    """Log-probabilities by quantcli's own arithmetic, as `verify --run` computes them.

    dtype: of all but the quantized modules; None: as `verify --run` would.
    """
    batches = [Batch(part, None) for part in torch.tensor(ids).split(8)]
    checkpoint = open_checkpoint(folder)
    quantized = "quantization_config" in checkpoint.config
    model = Served.open(folder) if quantized else checkpoint
    dtype = dtype or (model.dtype if isinstance(model, Served) else "F32")
    return torch.cat(log_probs(model, batches, dtype=dtype))


Tensors = dict[str, torch.Tensor]


def damage(folder: Path, source: Path, change: Callable[[Tensors], Tensors]) -> Path:
    """A copy of a checkpoint with its tensors changed."""
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix == ".safetensors":
            save_file(change(load_file(file)), folder / file.name, metadata={"format": "pt"})
        elif "index" not in file.name:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


DAMAGED = "model.layers.3.mlp.down_proj.weight_scale"
DAMAGES: dict[str, Callable[[Tensors], Tensors]] = {
    "doubled": lambda tensors: {k: v * 2 if k == DAMAGED else v for k, v in tensors.items()},
    "lost": lambda tensors: {k: v for k, v in tensors.items() if k != DAMAGED},
}


def text(count: int = 16) -> list[list[int]]:
    """Windows that the bundled model answers for: token ids, 256 each."""
    return windows(MODEL, ROOT / "examples/evaluation.txt", count, 256)


class Trained:
    """The bundled model in all formats, and damaged: folders, the text, and what vLLM answers."""

    def __init__(self, root: Path) -> None:
        self.ids = text()
        self.folders = {"float": MODEL}
        for name, (target, rules) in CONVERTED.items():
            self.folders[name] = convert(root / name, MODEL, target, rules)
        for name, change in DAMAGES.items():
            self.folders[name] = damage(root / name, self.folders["int8-dynamic"], change)
        prompts = [window[:24] for window in self.ids[:4]]
        self.answers = serve(self.folders, self.ids, prompts=prompts)

    def answer(self, name: str) -> Answer:
        """AssertionError with vLLM's words where it refused."""
        answer = self.answers[name]
        assert isinstance(answer, Answer), answer
        return answer


class Twice:
    """The bundled model by recipes of SAME, each as gptq and as compressed-tensors; float experts."""

    def __init__(self, root: Path) -> None:
        self.ids = text(4)
        folders = {}
        for name, rules in SAME.items():
            for target in (CT, "gptq"):
                folders[f"{name}-{target}"] = convert(root / f"{name}-{target}", MODEL, target, rules)
        folders["int8"] = convert(root / "int8", MODEL, "gptq", [{"match": ALL, "scheme": "w8a16"}])
        self.answers = serve(folders, self.ids)
        experts = make_tiny(root / "experts", "qwen3_moe", hidden_size=128, head_dim=32)
        rules = [*EXPERTS, {"match": ALL, "scheme": GROUPS}]
        families = {t: convert(root / f"experts-{t}", experts, t, rules) for t in (CT, "gptq")}
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(3, 128, (4, 32), generator=generator).tolist()
        self.experts = serve(families, ids)


class Families:
    """Tiny random models of other architectures, float and converted, on random tokens."""

    def __init__(
        self, root: Path, families: Mapping[str, Formats] = FAMILIES, cpu: CPU = "pinned"
    ) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 128, (8, 64), generator=generator).tolist()
        self.folders = {}
        for family, formats in families.items():
            model = make_tiny(root / family, family, hidden_size=128, head_dim=32)
            self.folders[family] = model
            for name, rules in formats.items():
                folder = root / f"{family}-{name}"
                self.folders[folder.name] = convert(folder, model, CT, rules)
        self.answers = serve(self.folders, self.ids, cpu=cpu, untracked=UNTRACKED)


@pytest.fixture(scope="session")
def environment() -> None:
    """What all tests here need, or none of them can say anything."""
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is not there: `make test-engine` sets it up")
    if "avx512_vnni" not in flags():
        pytest.fail("this CPU has no AVX-512 with VNNI, with which these tests let vLLM compute")


@pytest.fixture(scope="session")
def trained(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def twice(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Twice:
    return Twice(tmp_path_factory.mktemp("twice"))


@pytest.fixture(scope="session")
def families(environment: None, tmp_path_factory: pytest.TempPathFactory) -> Families:
    return Families(tmp_path_factory.mktemp("families"))
