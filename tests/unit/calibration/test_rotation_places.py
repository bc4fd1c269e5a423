"""Places of rotations: in every family the rotated float model has the same function, or is refused."""

import pytest
import torch

from quantcli.calibration.rotation.find import find_places
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.rotation.rotation import hadamard_rotation, rotated
from quantcli.core.errors import InputError
from tests.replaying import Replayed, make_batches
from tests.tiny_models import FAMILIES, make_multimodal, make_tiny

AFTER = "is a norm whose output is added to the hidden states"
UNREACHED = "is a part of the model that text does not reach"
REFUSED = {
    "gemma2": AFTER, "gemma3": AFTER, "gemma4_text": AFTER, "olmo2": AFTER, "multimodal": AFTER,
    "stablelm": "input_layernorm` is a norm that adds a bias",
    "qwen3_vl_moe": UNREACHED, "qwen3_5_moe": UNREACHED, "step3p7": UNREACHED,
    "dbrx": "norm_1` is a norm that subtracts the mean",
    "muse_spark": "post_attention_residual_gate` applies `mul` to the hidden states",
}  # fmt: skip


def make(folder, family, **options):
    """A tiny model in float32."""
    if family == "multimodal":
        return make_multimodal(folder, dtype=torch.float32)
    return make_tiny(folder, family, dtype=torch.float32, **options)


def logits(path, places=None):
    """What a model puts out, or the rotated one."""
    batches = make_batches(padded=False)[1:]
    change = {}
    if places is not None:
        rotation = hadamard_rotation(places)
        change["changed"] = lambda checkpoint: rotated(checkpoint, places, rotation, untie=True)
    run = Replayed(path, batches, dtype="F32", workers=1, **change)
    run.layers()
    return run.logits()[0]


@pytest.mark.parametrize("family", sorted({*FAMILIES, "gpt_oss"} - {*REFUSED}))
def test_the_function_stays(tmp_path, family):
    path = make(tmp_path / "m", family)
    places = find_places(open_checkpoint(path))
    assert places.heads
    assert places.head == "lm_head.weight"
    assert places.tied == (family == "qwen2")
    before, after = logits(path), logits(path, places)
    assert (after - before).norm() < 1e-5 * before.norm()


@pytest.mark.parametrize("family", sorted(REFUSED))
def test_the_reason_is_given(tmp_path, family):
    path = make(tmp_path / "m", family)
    with pytest.raises(InputError, match="the residual stream cannot be rotated") as refused:
        find_places(open_checkpoint(path))
    assert REFUSED[family] in str(refused.value)
