"""Checkpoints converted here, and what vLLM answers for all of them in one process."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from quantcli.calibration.replay.served import Served, log_probs
from quantcli.calibration.text.dataset import Batch
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from tests.engine.harness import PYTHON, ROOT, Answer, serve, windows
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
    "mixed": (CT, [*KEEP, {"match": "*.down_proj", "scheme": "w8a8_dynamic"},
                   {"match": "*.o_proj", "scheme": "w4a16"},
                   {"match": ["*.gate_proj", "*.up_proj"], "scheme": "w8a8_static"},
                   {"match": ALL, "scheme": "fp8_dynamic"}]),
    "fp8-static": (CT, [{"match": ALL, "scheme": "fp8_static"}]),
    "fp8-tensor": (CT, [{"match": ALL, "scheme": "fp8_tensor"}]),
    "fp8-block": (CT, [{"match": ALL, "scheme": "fp8_block"}]),
}  # fmt: skip
EXPERTS = [{"match": "*.experts.*", "scheme": "keep"}]
GROUPS = {"name": "w4a16", "group_size": 32}
# of tiny random models of other architectures; vLLM's CPU build has no kernels for other experts
FAMILIES: dict[str, dict[str, list[dict[str, object]]]] = {
    family: {"int8-dynamic": [{"match": ALL, "scheme": "w8a8_dynamic"}],
             "fp8-dynamic": [*keep, {"match": ALL, "scheme": "fp8_dynamic"}],
             "w4a16": [*keep, {"match": ALL, "scheme": GROUPS}]}
    for family, keep in (("llama", []), ("qwen2", []), ("qwen3_moe", EXPERTS))
}  # fmt: skip


def convert(folder: Path, model: Path, target: str, rules: list[dict[str, object]]) -> Path:
    """Convert a model; returns the checkpoint's folder."""
    recipe = folder.with_name(folder.name + ".yaml")
    made: dict[str, object] = {"target": target, "rules": rules}
    if "static" in json.dumps(rules):
        made["calibration"] = CALIBRATION
    recipe.write_text(json.dumps(made))
    commands.quantize(commands.plan(recipe, model=str(model), out=folder))
    return folder


def ours(folder: Path, ids: list[list[int]]) -> torch.Tensor:
    """Log-probabilities by quantcli's own arithmetic, as `verify --run` computes them."""
    batches = [Batch(part, None) for part in torch.tensor(ids).split(8)]
    checkpoint = open_checkpoint(folder)
    quantized = "quantization_config" in checkpoint.config
    return torch.cat(log_probs(Served.open(folder) if quantized else checkpoint, batches))


class Trained:
    """The bundled model in all formats: folders, the text, and what vLLM answers."""

    def __init__(self, root: Path) -> None:
        self.ids = windows(MODEL, ROOT / "examples/evaluation.txt", 16, 256)
        self.folders = {"float": MODEL}
        for name, (target, rules) in CONVERTED.items():
            self.folders[name] = convert(root / name, MODEL, target, rules)
        prompts = [window[:24] for window in self.ids[:4]]
        self.answers = serve(self.folders, self.ids, prompts=prompts)

    def answer(self, name: str) -> Answer:
        """AssertionError with vLLM's words where it refused."""
        answer = self.answers[name]
        assert isinstance(answer, Answer), answer
        return answer


class Families:
    """Tiny random models of other architectures, float and converted, on random tokens."""

    def __init__(self, root: Path) -> None:
        generator = torch.Generator().manual_seed(0)
        self.ids = torch.randint(3, 128, (8, 64), generator=generator).tolist()
        self.folders = {}
        for family, formats in FAMILIES.items():
            model = make_tiny(root / family, family, hidden_size=128, head_dim=32)
            self.folders[family] = model
            for name, rules in formats.items():
                folder = root / f"{family}-{name}"
                self.folders[folder.name] = convert(folder, model, CT, rules)
        self.answers = serve(self.folders, self.ids)


def _environment() -> None:
    if not PYTHON.exists():
        pytest.fail(f"{PYTHON} is not there: `make test-engine` sets it up")


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    _environment()
    return Trained(tmp_path_factory.mktemp("trained"))


@pytest.fixture(scope="session")
def families(tmp_path_factory: pytest.TempPathFactory) -> Families:
    _environment()
    return Families(tmp_path_factory.mktemp("families"))
