"""Rotated checkpoints from end to end, on a tiny model whose output matrix is tied."""

import json

import pytest

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands import quantize as commands
from quantcli.commands.inspect import inspect
from quantcli.commands.job import JobOptions, to_json
from quantcli.core.errors import InputError
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.e2e.calibrating import LENGTH, SAMPLES, Models, make_bench, tensors
from tests.tiny_models import make_tiny

RECIPE = """\
target: ascend
rotate:
  residual: true
  untie: true
rules:
  - role: [mlp, attention]
    scheme: w8a8_dynamic
"""

LEARNED = f"""\
target: ascend
rotate: {{learn: {{epochs: 1, rate: 0.05}}}}
calibration: {{data: text.txt, samples: {SAMPLES}, length: {LENGTH}, dtype: float32}}
rules:
  - role: [mlp, attention]
    scheme: w4a4_dynamic
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny(tmp_path_factory.mktemp("m") / "model", "qwen2")


@pytest.fixture
def convert(tmp_path, model):
    def job_of(out, *sets, **options):
        recipe = tmp_path / "r.yaml"
        recipe.write_text(RECIPE)
        where = {"model": str(model), "out": tmp_path / out, "overrides": sets}
        return commands.plan(recipe, **where, options=JobOptions(**options))

    return job_of


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_an_output_is_the_same_for_any_number_of_workers(convert, tmp_path, model):
    jobs = [convert("one", workers=1), convert("three", workers=3)]
    for job in jobs:
        commands.quantize(job)
    one, three = content(tmp_path / "one"), content(tmp_path / "three")
    assert one == three
    config, manifest = (json.loads(one[n]) for n in ("config.json", "quantcli_manifest.json"))
    assert config["tie_word_embeddings"] is False
    assert manifest["rotation"]["untied_bytes"] == 128 * 64 * 2
    assert "The model was rotated: residual stream by Hadamard 64" in one["README.md"].decode()
    planned = to_json(jobs[0])
    assert planned["rotation"] == manifest["rotation"]
    assert any("adds 16,384 bytes" in note for note in planned["notes"])
    held = tensors(tmp_path / "one")
    assert bool((held["model.norm.weight"] == 1).all())
    assert "lm_head.weight" in held
    assert {str(held[name].dtype) for name in ("lm_head.weight", "model.norm.weight")} == {
        "torch.bfloat16"
    }
    assert open_checkpoint(tmp_path / "one").config.flag("tie_word_embeddings") is False
    (note,) = [note for note in inspect(str(tmp_path / "one"))["notes"] if "rotated" in note]
    assert note.startswith("rotated: residual stream by Hadamard 64")
    (tmp_path / "one" / "quantcli_manifest.json").write_bytes(one["quantcli_manifest.json"] + b" ")
    assert inspect(str(model))["notes"] == inspect(str(tmp_path / "one"))["notes"]  # it has no seal


def test_another_seed_is_another_output(convert):
    digests = {convert(f"s{seed}", f"rotate.seed={seed}").plan.digest for seed in (0, 1)}
    assert len(digests) == 2


def test_a_tied_model_is_refused_with_the_line(convert, tmp_path):
    with pytest.raises(InputError, match="the output matrix is the embedding's tensor") as refused:
        convert("out", "rotate.untie=false")
    assert f"{tmp_path / 'r.yaml'}" in str(refused.value)
    assert "rotate.untie=true, which adds 16,384 bytes" in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_nothing_to_rotate_is_an_error(convert):
    with pytest.raises(InputError, match="rotates nothing"):
        convert("out", "rotate.residual=false", "rotate.heads=false")


def test_verify_finds_the_rotation_of_an_output(convert, tmp_path, model):
    commands.quantize(convert("out"))
    report = verify(VerifyOptions(tmp_path / "out", full=True, against=str(model)))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert report.checked["rotation"] > 20
    assert report.checked["recomputed"]


def test_learned_matrices_are_kept_with_the_calibration(tmp_path):
    """Another run takes them from there; without the folder verify finds them in the weights."""
    bench = make_bench(tmp_path, Models(tmp_path / "models", num_hidden_layers=2)("qwen3"), LEARNED)
    assert bench.run().code == 0
    assert "learned" in (bench.out / "README.md").read_text()
    assert not [*bench.store.glob("*states-*")]
    other = bench.at("other")
    assert other.run("--calibration", bench.store).code == 0
    assert content(bench.out) == content(other.out)
    for calibration in (None, bench.store):
        options = VerifyOptions(bench.out, against=str(bench.model), calibration=calibration)
        report = verify(options)
        assert [f for f in report.findings if f.severity == "error"] == []
        assert bool(report.checked.get("recomputed")) == bool(calibration)


def test_norms_of_a_rotated_model_are_smoothed(tmp_path):
    """Norms are float32 ones there, and a calibration in bfloat16 divides them."""
    recipe = LEARNED.replace("rotate: {learn: {epochs: 1, rate: 0.05}}", "rotate: {heads: false}")
    recipe = recipe.replace("float32", "bfloat16").replace("w4a4", "w8a8") + "smooth: {within: 1}\n"
    bench = make_bench(tmp_path, Models(tmp_path / "models", num_hidden_layers=1)("qwen3"), recipe)
    done = bench.run()
    assert done.code == 0, done.err
    norm = tensors(bench.out)["model.layers.0.input_layernorm.weight"]
    assert not bool((norm == 1).all())
    report = verify(VerifyOptions(bench.out, full=True, against=str(bench.model)))
    assert [f for f in report.findings if f.severity == "error"] == []
