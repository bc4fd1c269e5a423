"""Schemes, targets and methods of other people's packages: installed, found, used, named if broken."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.e2e.conftest import make_llama
from tests.rewritten import rewrite

SUFFIXES = ("weight", "weight_scale", "weight_global_scale")
Q = "model.layers.0.self_attn.q_proj"
PLUGIN = Path(__file__).parents[1] / "plugin"
RECIPE = """\
target: toy-tensors
rules:
  - {match: "*_proj", scheme: {name: pow2, spare_bits: 1}}
"""


def install(source: Path, folder: Path) -> Path:
    """Build and install a package of this machine into a folder, without a network."""
    words = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    run = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    run += ["--target", str(folder), str(source)]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("plugin")
    return install(shutil.copytree(PLUGIN, root / "source"), root / "site")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("model") / "m", layers=2, side=64)


def quantcli(site: Path | None, *words: object) -> subprocess.CompletedProcess[str]:
    path = [str(site)] if site else []
    path += [p for p in (os.environ.get("PYTHONPATH"),) if p]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    run = [sys.executable, "-m", "quantcli", *map(str, words)]
    return subprocess.run(run, capture_output=True, text=True, check=False, env=env)


def test_an_installed_package_is_found_and_used(site: Path, model: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    done = quantcli(site, "quantize", recipe, "--model", model, "--out", out)
    assert done.returncode == 0, done.stderr
    scale = load_file(out / "model-00001-of-00001.safetensors")[
        "model.layers.0.self_attn.q_proj.weight_scale"
    ]
    assert bool((scale.log2() == scale.log2().round()).all())
    manifest = json.loads((out / "quantcli_manifest.json").read_text())
    assert manifest["tool"]["packages"] == {"toy-quant": "1.2"}
    assert manifest["target"] == "toy-tensors"

    support = quantcli(site, "inspect", "--support", "--json")
    cells = {(c["scheme"], c["target"]): c for c in json.loads(support.stdout)["support"]}
    assert cells["pow2", "ascend"]["label"] == "W8A8_DYNAMIC"
    assert cells["w8a8_dynamic", "toy-tensors"]["label"] == "int8 W8A8 dynamic"


def test_an_installed_calibration_method(site: Path, model: Path, tmp_path: Path) -> None:
    recipe, text = tmp_path / "recipe.yaml", tmp_path / "text.txt"
    text.write_text("To be, or not to be.\n" * 40)
    scheme = "{match: '*_proj', scheme: w8a8_dynamic}"
    data = "calibration: {data: text.txt, samples: 2, length: 8}"
    recipe.write_text(f"target: ascend\nrules: [{scheme}]\n{data}\nmethods: [equalize]\n")
    plan = ("quantize", recipe, "--model", model, "--out", tmp_path / "out", "--plan")
    done = quantcli(site, *plan)
    assert done.returncode == 0, done.stderr
    assert "runs first: clips of 14 modules and equalization from 2 samples" in done.stdout
    done = quantcli(None, *plan)
    assert done.returncode == 2
    assert "unknown method `equalize`" in done.stderr
    assert "recipe.yaml:4" in done.stderr


def test_a_checkpoint_names_the_packages_that_made_it(site: Path, model: Path, tmp_path: Path) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE.replace("toy-tensors", "compressed-tensors"))
    quantcli(site, "quantize", recipe, "--model", model, "--out", out)
    check = ("verify", out, "--full", "--against", model, "--json")
    report = json.loads(quantcli(site, *check).stdout)
    assert report["ok"]
    assert next(c["checked"] for c in report["checks"] if c["name"] == "recomputed") == 2 * 14 + 3
    # without the package the numbers cannot be computed again, and verify says so
    report = json.loads(quantcli(None, *check).stdout)
    assert any("unknown scheme `pow2`" in text for text in report["not_checked"]), report

    newer = shutil.copytree(site, tmp_path / "newer")
    info = next(newer.glob("toy_quant-*.dist-info")) / "METADATA"
    info.write_text(info.read_text().replace("Version: 1.2", "Version: 1.3"))
    report = json.loads(quantcli(newer, *check).stdout)
    notes = [finding["what"] for finding in report["findings"]]
    made = "quantcli 0.1.0 with toy-quant 1.2 made the checkpoint; quantcli 0.1.0 with toy-quant 1.3"
    assert any(note.startswith(made) for note in notes), notes


def test_an_error_in_an_installed_package_is_its_authors(
    site: Path, model: Path, tmp_path: Path
) -> None:
    recipe, broken = tmp_path / "recipe.yaml", shutil.copytree(site, tmp_path / "broken")
    recipe.write_text(RECIPE)
    file = broken / "toy_quant" / "pow2.py"
    file.write_text(
        file.read_text().replace("values = rows.float()", "values = torch.ones(2) @ rows[0]")
    )
    run = ("quantize", recipe, "--model", model, "--out", tmp_path / "out", "--json")
    done = quantcli(broken, *run)
    assert done.returncode == 70
    assert "pow2.py" in done.stderr
    assert "this is a bug in toy-quant 1.2: please report the lines above" in done.stderr
    assert json.loads(done.stdout)["exit_code"] == 70
    assert not list(tmp_path.glob("out*"))


def test_scales_of_two_levels(site: Path, model: Path, tmp_path: Path) -> None:
    """Scales of two levels in a format that only the package knows: plan, stream and all checks."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text('target: two-level\nrules: [{match: "*_proj", scheme: nvfp4a16}]\n')
    source = load_file(model / "model.safetensors")
    name = "model.layers.0.self_attn.k_proj"
    source[f"{name}.weight"] *= 3  # siblings of other sizes share a scale
    other = shutil.copytree(model, tmp_path / "model")
    save_file(source, other / "model.safetensors", metadata={"format": "pt"})
    done = quantcli(site, "quantize", recipe, "--model", other, "--out", out)
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.safetensors")
    made = load_file(file)
    forms = {s: (made[f"{name}.{s}"].dtype, tuple(made[f"{name}.{s}"].shape)) for s in SUFFIXES}
    n, k = source[f"{name}.weight"].shape
    assert forms == {
        "weight": (torch.uint8, (n, k // 2)),
        "weight_scale": (torch.float8_e4m3fn, (n, k // 16)),
        "weight_global_scale": (torch.float32, (1,)),
    }
    siblings = [f"model.layers.0.self_attn.{letter}_proj" for letter in "qkv"]
    amax = max(float(source[f"{each}.weight"].abs().max()) for each in siblings)
    for each in siblings:
        assert float(made[f"{each}.weight_global_scale"]) == pytest.approx(amax / (6 * 448), rel=1e-6)
    largest = made[f"{name}.weight_scale"].float().max()
    assert float(largest) == 448

    check = ("verify", out, "--full", "--against", other, "--json")
    report = json.loads(quantcli(site, *check).stdout)
    assert report["ok"], report["findings"]
    assert next(c["checked"] for c in report["checks"] if c["name"] == "recomputed") == 3 * 14 + 3
    assert {module["label"] for module in report["modules"]} == {"two-level"}
    assert all(18 < module["sqnr_db"] < 24 for module in report["modules"])
    assert all(module["limit_db"] == 9 for module in report["modules"])


def test_codes_as_columns_under_names_of_their_own(site: Path, model: Path, tmp_path: Path) -> None:
    """Only their target knows such a checkpoint: it is shown, decoded, packed and packed back."""
    recipe, out, other = tmp_path / "recipe.yaml", tmp_path / "out", tmp_path / "gptq"
    recipe.write_text('target: columns\nrules: [{match: "*_proj", scheme: w8a16}]\n')
    done = quantcli(site, "quantize", recipe, "--model", model, "--out", out)
    assert done.returncode == 0, done.stderr
    report = json.loads(quantcli(site, "verify", out, "--full", "--against", model, "--json").stdout)
    assert report["ok"], report["findings"]
    found = json.loads(quantcli(site, "inspect", out, "--json").stdout)["quantization"]
    assert (found["format"], found["modules"]) == ("columns", 14)
    done = quantcli(site, "pack", out, "--target", "gptq", "--out", other)
    assert done.returncode == 0, done.stderr
    done = quantcli(site, "pack", other, "--target", "columns", "--out", tmp_path / "back")
    assert done.returncode == 0, done.stderr
    (file,) = out.glob("*.safetensors")
    assert file.read_bytes() == (tmp_path / "back" / file.name).read_bytes()
    recipe.write_text('target: ascend\nrules: [{match: "*_proj", scheme: w8a8_dynamic}]\n')
    done = quantcli(site, "quantize", recipe, "--model", out, "--out", tmp_path / "again", "--plan")
    assert "decoded from columns int8 columns: 14 modules" in done.stdout, done.stdout + done.stderr
    # without the package nothing is quantized there, and the manifest knows why
    alone = quantcli(None, "verify", out)
    assert alone.returncode == 2
    assert "`columns` is the target in its manifest, and no such target is installed" in alone.stderr
    assert "made by quantcli 0.1.0 with toy-quant 1.2" in alone.stderr


@pytest.fixture(scope="module")
def two_level(site: Path, model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with scales of two levels."""
    folder = tmp_path_factory.mktemp("two-level")
    recipe, out = folder / "recipe.yaml", folder / "out"
    recipe.write_text('target: two-level\nrules: [{match: "*_proj", scheme: nvfp4a16}]\n')
    done = quantcli(site, "quantize", recipe, "--model", model, "--out", out, "--no-checksum")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize(
    ("suffix", "code", "place", "said"),
    [
        ("weight_scale", 0x7F, "[3, 1]", "a scale is not a positive number: code 0x7F"),
        ("weight_scale", 0x00, "[3, 1]", "a scale is not a positive number: code 0x00"),
        ("weight_scale", 0xB8, "[3, 1]", "a scale is not a positive number: code 0xB8"),
        ("weight_global_scale", float("nan"), "[0]", "a scale is not a positive number: nan"),
        ("weight_global_scale", -1.0, "[0]", "a scale is not a positive number: -1"),
    ],
)
def test_damaged_scales_of_two_levels(
    site: Path, two_level: Path, tmp_path: Path, suffix: str, code: float, place: str, said: str
) -> None:
    out = shutil.copytree(two_level, tmp_path / "out")
    (file,) = out.glob("*.safetensors")
    made = load_file(file)
    name = f"model.layers.1.mlp.down_proj.{suffix}"
    tensor = made[name].view(torch.uint8) if suffix == "weight_scale" else made[name]
    tensor[(3, 1) if suffix == "weight_scale" else 0] = code
    rewrite(file, made)
    report = json.loads(quantcli(site, "verify", out, "--full", "--json").stdout)
    (error,) = (finding for finding in report["findings"] if finding["severity"] == "error")
    assert (error["check"], error["what"], error["where"]) == ("values", said, f"`{name}`{place}")


def test_an_interrupted_run_does_not_go_on_with_another_version(
    site: Path, model: Path, tmp_path: Path
) -> None:
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out"
    recipe.write_text(RECIPE)
    run = ("quantize", recipe, "--model", model, "--out", out)
    plans = []
    for version in ("1.2", "1.3"):
        other = shutil.copytree(site, tmp_path / version)
        info = next(other.glob("toy_quant-*.dist-info")) / "METADATA"
        info.write_text(info.read_text().replace("Version: 1.2", f"Version: {version}"))
        plans.append(json.loads(quantcli(other, *run, "--plan", "--json").stdout)["plan"]["digest"])
    assert plans[0] != plans[1]


BROKEN = {
    "import": ("toy_quant.nowhere:Pow2", "cannot be loaded: ModuleNotFoundError"),
    "class": (
        "toy_quant.pow2:Literal",
        "is not a class that derives from quantcli.schemes.base",
    ),
    "name": ("toy_quant.pow2:Pow2", "is a class with the name 'pow2', not `other`"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_a_broken_package_is_named(site: Path, model: Path, tmp_path: Path, kind: str) -> None:
    value, message = BROKEN[kind]
    broken = shutil.copytree(site, tmp_path / "site")
    entries = next(broken.glob("toy_quant-*.dist-info")) / "entry_points.txt"
    name = "other" if kind == "name" else "pow2"
    entries.write_text(f"[quantcli.schemes]\n{name} = {value}\n")
    done = quantcli(broken, "quantize", "w8a8_dynamic", "--model", model, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert message in done.stderr
    assert "package toy-quant 1.2" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.glob("out*"))


def test_a_name_that_is_taken(site: Path, model: Path, tmp_path: Path) -> None:
    taken = shutil.copytree(site, tmp_path / "site")
    text = (taken / "toy_quant" / "pow2.py").read_text()
    (taken / "toy_quant" / "pow2.py").write_text(text.replace('"pow2"', '"w8a8_dynamic"'))
    entries = next(taken.glob("toy_quant-*.dist-info")) / "entry_points.txt"
    entries.write_text("[quantcli.schemes]\nw8a8_dynamic = toy_quant.pow2:Pow2\n")
    done = quantcli(taken, "quantize", "w8a8_dynamic", "--model", model, "--out", tmp_path / "out")
    assert done.returncode == 3, done.stderr
    assert "two classes are named `w8a8_dynamic`" in done.stderr
    assert "uninstall toy-quant" in done.stderr


def toy8(folder: Path, **damage: torch.Tensor) -> Path:
    """A llama whose q_proj is stored in the format of the package."""
    make_llama(folder, side=64)
    tensors = load_file(folder / "model.safetensors")
    weight = tensors.pop(f"{Q}.weight").float()
    steps = weight.abs().amax(1, keepdim=True) / 127
    tensors[f"{Q}.codes"] = ((weight / steps).round() + 128).to(torch.uint8)
    tensors[f"{Q}.steps"] = steps
    save_file({**tensors, **damage}, folder / "model.safetensors")
    (folder / "toy8.json").write_text("{}")
    return folder


def test_a_source_format_of_a_package(site: Path, tmp_path: Path) -> None:
    model, out = toy8(tmp_path / "toy8"), tmp_path / "out"
    done = quantcli(site, "quantize", "vllm_int8_dynamic", "--model", model, "--out", out)
    assert done.returncode == 0, done.stderr
    assert "decoded from toy8 (toy-quant 1.2): 1 module\n" in done.stdout
    assert not (out / "toy8.json").exists()
    stored = load_file(out / "model-00001-of-00001.safetensors")
    source = load_file(model / "model.safetensors")
    # the same largest code in each row: int8 finds the codes of the source again
    assert torch.equal(stored[f"{Q}.weight"].int() + 128, source[f"{Q}.codes"].int())
    checked = quantcli(site, "verify", out, "--full", "--against", model)
    assert checked.returncode == 0, checked.stdout


def test_damage_of_a_packages_format(site: Path, tmp_path: Path) -> None:
    model = toy8(tmp_path / "toy8", **{f"{Q}.steps": torch.ones(64)})
    done = quantcli(site, "quantize", "vllm_int8_dynamic", "--model", model, "--out", tmp_path / "out")
    assert done.returncode == 2
    assert f"`{Q}.steps`" in done.stderr
    assert "has F32 [64, 1]" in done.stderr
