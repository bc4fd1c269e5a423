"""verify finds a rotation in the weights, and what does not fit it."""

import pytest

from quantcli.calibration.rotation.find import find_places
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.commands.quantize import plan, quantize
from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.rotating import orthogonal, save_rotated
from tests.tiny_models import make_tiny

LAYER = "model.layers.1"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model, and the places of its rotation."""
    path = make_tiny(tmp_path_factory.mktemp("rotated") / "model", "qwen3")
    return path, find_places(open_checkpoint(path))


def examine(model, folder, recipe="w8a8_dynamic", change=lambda tensors, source: None, **options):
    """The report on a checkpoint of the rotated model, against the model itself."""
    path, places = model
    turned = save_rotated(path, folder / "turned", places, change)
    quantize(plan(recipe, model=str(turned), out=folder / "out", **options))
    return verify(VerifyOptions(folder / "out", full=True, against=str(path)))


@pytest.mark.parametrize("scheme", ["w8a8_dynamic", "w4a4_dynamic"])
def test_a_rotation_is_found(model, tmp_path, scheme):
    report = examine(model, tmp_path, overrides=(f"rules.0.scheme={scheme}",))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert report.checked["rotation"] > 20
    assert (
        min(module.sqnr_db for module in report.modules)
        > {"w8a8_dynamic": 38, "w4a4_dynamic": 12}[scheme]
    )


def unrotated(tensors, source):
    """A reader that was left out."""
    tensors[f"{LAYER}.mlp.up_proj.weight"] = source[f"{LAYER}.mlp.up_proj.weight"]


def transposed(tensors, source):
    """A writer in the basis of the transposed matrix."""
    turn = orthogonal(64)
    weight = source[f"{LAYER}.mlp.down_proj.weight"].double()
    tensors[f"{LAYER}.mlp.down_proj.weight"] = (turn @ weight).bfloat16()


def unfolded(tensors, source):
    """A norm that keeps its weights, which its readers do not have."""
    norm = f"{LAYER}.post_attention_layernorm.weight"
    tensors[norm] = source[norm]
    for name in ("gate_proj", "up_proj"):
        weight = source[f"{LAYER}.mlp.{name}.weight"].double()
        tensors[f"{LAYER}.mlp.{name}.weight"] = (weight @ orthogonal(64)).bfloat16()


def other_head(tensors, source):
    """Values of one kv head that are turned once more."""
    weight = tensors[f"{LAYER}.self_attn.v_proj.weight"]
    weight[16:] = (orthogonal(16, 99).T @ weight[16:].double()).bfloat16()


def plain_head(tensors, source):
    """An output matrix that is not rotated."""
    tensors["lm_head.weight"] = source["lm_head.weight"]


def skewed(tensors, source):
    """An embedding times a matrix that is not orthogonal."""
    tensors["model.embed_tokens.weight"][:, 3] *= 1.5


@pytest.mark.parametrize(("change", "where"), [
    (unrotated, f"{LAYER}.mlp.up_proj"), (transposed, f"{LAYER}.mlp.down_proj"),
    (unfolded, f"{LAYER}.post_attention_layernorm.weight"), (other_head, f"{LAYER}.self_attn.v_proj"),
    (plain_head, "lm_head.weight"), (skewed, "model.embed_tokens.weight"),
])  # fmt: skip
def test_what_does_not_fit_is_named(model, tmp_path, change, where):
    report = examine(model, tmp_path, change=change)
    errors = [f for f in report.findings if f.severity == "error"]
    assert any(f"`{where}`" in str(finding.where) for finding in errors)
    if change is not skewed:
        assert len(errors) < 5


def test_what_cannot_be_rotated_is_no_rotation(tmp_path):
    """Another embedding of a model with norms behind its sublayers."""
    path = make_tiny(tmp_path / "model", "olmo2")
    quantize(plan("w8a8_dynamic", model=str(path), out=tmp_path / "out"))
    other = make_tiny(tmp_path / "other", "olmo2", seed=1)
    report = verify(VerifyOptions(tmp_path / "out", against=str(other)))
    assert any(f.check == "rotation" and "cannot be rotated" in f.what for f in report.findings)
