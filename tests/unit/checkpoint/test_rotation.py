"""Orthogonal matrices, and tensors that are rotated while they are read."""

import pickle
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.header import read_header
from quantcli.checkpoint.rotation import orthogonal
from quantcli.checkpoint.rotation.orthogonal import Dense, Hadamard, factors, matrix_of
from quantcli.checkpoint.rotation.places import Heads, Norm, Places
from quantcli.checkpoint.rotation.rotation import Rotation, hadamard_rotation, rotated
from quantcli.checkpoint.rotation.virtual import Rotated
from quantcli.checkpoint.tensors import read_span, read_tensor
from quantcli.core.errors import InputError
from tests.tiny_models import make_tiny


@pytest.mark.parametrize(
    ("size", "rest", "orders"),
    [
        (1, 1, ()), (2, 1, (2,)), (12, 1, (12,)), (20, 1, (20,)), (28, 1, (28,)), (36, 1, (36,)),
        (64, 1, (2,) * 6), (576, 1, (12, 12, 2, 2)), (960, 1, (20, 12, 2, 2)), (50, 25, (2,)),
        (71, 71, ()), (200, 5, (20, 2)),
    ],
)  # fmt: skip
def test_a_size_is_made_of_known_orders(size, rest, orders):
    assert factors(size) == (rest, orders)
    matrix = matrix_of(Hadamard(size, "0")).double()
    assert torch.allclose(matrix @ matrix.T, torch.eye(size, dtype=torch.float64), atol=1e-6)
    if rest == 1:
        assert torch.allclose(matrix.abs(), torch.full_like(matrix, size**-0.5), atol=1e-6)


@pytest.mark.parametrize("size", [48, 71, 142])
def test_a_band_does_not_change_bits(size, monkeypatch):
    """R^T W is the transpose of W^T R, to the last bit, however many rows are computed together."""
    weight = torch.randn(size, 5, generator=torch.Generator().manual_seed(0))
    rotation = Hadamard(size, "1")
    expected = rotation.right(weight.T.contiguous()).T
    assert torch.allclose(expected, matrix_of(rotation).T @ weight, atol=1e-5)
    for elements in (2**23, 5 * 16, 5 * 2, 5):
        monkeypatch.setattr(orthogonal, "_BAND", elements)
        height = rotation.band(5)
        assert height * 5 <= elements
        bands = [
            rotation.left(lambda start, count: weight[start : start + count].clone(), first, 5)
            for first in range(0, size, height)
        ]
        assert torch.equal(torch.cat(bands), expected)


def stored(folder, **tensors):
    save_file(tensors, folder / "t.safetensors")
    return sorted(read_header(folder / "t.safetensors")[0], key=lambda each: each.spec.name)


def test_a_dense_matrix_gives_the_same_rows_in_any_blocks(tmp_path, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    own = torch.linalg.qr(torch.randn(96, 96, generator=generator))[0].contiguous()
    rotation = Dense(stored(tmp_path, r=own)[0], "learned")
    rows = torch.randn(150, 96, generator=generator)
    whole = rotation.right(rows.clone())
    assert torch.allclose(whole, rows @ own, atol=1e-5)
    assert torch.equal(rotation.right(rows[70:75].clone()), whole[70:75])
    assert pickle.loads(pickle.dumps(rotation)).digest == rotation.digest
    columns = rows.T.contiguous()
    monkeypatch.setattr(orthogonal, "_BAND", 150 * 64)
    height = rotation.band(150)
    bands = [
        rotation.left(lambda start, count: columns[start : start + count], first, 150)
        for first in range(0, 96, height)
    ]
    assert len(bands) == 3
    assert torch.allclose(torch.cat(bands), own.T @ columns, atol=1e-5)


def test_rows_of_heads_are_rotated_and_others_are_not(tmp_path):
    """q, k and v in one matrix, which reads the stream."""
    generator = torch.Generator().manual_seed(0)
    fused, bias = torch.randn(20, 12, generator=generator), torch.randn(20, generator=generator)
    bias_stored, fused_stored = stored(tmp_path, b=bias, w=fused)
    r, own = Hadamard(12, "r"), Hadamard(4, "o")
    how = {"kind": "rotated", "left": own, "heads": (8, 16)}
    place = fused_stored.spec, fused_stored.file, fused_stored.offset
    tensor = Rotated(*place, source=fused_stored, right=r, **how)
    expected = fused @ matrix_of(r)
    for row in (8, 16):
        expected[row : row + 4] = matrix_of(own).T @ expected[row : row + 4]
    found = read_tensor(tensor)
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.equal(read_span(tensor, 9, 8), found[9:17])
    del how["left"]
    place = bias_stored.spec, bias_stored.file, bias_stored.offset
    vector = read_tensor(Rotated(*place, source=bias_stored, right=own, **how))
    for row in (8, 16):
        bias[row : row + 4] = bias[row : row + 4] @ matrix_of(own)
    assert torch.allclose(vector, bias, atol=1e-6)


def places(**changes):
    norm, head = Norm("model.norm.weight"), "lm_head.weight"
    found = Places(64, ("model.embed_tokens.weight",), {head: norm}, (), (), (norm,), (), head, True)
    return replace(found, **changes)


def test_a_tied_head_is_refused_or_gets_a_tensor(tmp_path):
    path = make_tiny(tmp_path / "m", "qwen2")
    checkpoint = open_checkpoint(path)
    rotation = hadamard_rotation(places())
    with pytest.raises(InputError, match="the output matrix is the embedding's tensor") as refused:
        rotated(checkpoint, places(), rotation)
    assert "rotate.untie=true" in str(refused.value)
    turned = rotated(checkpoint, places(), rotation, untie=True)
    assert turned.config.flag("tie_word_embeddings") is False
    assert turned.tensors["lm_head.weight"].kind
    assert turned.fingerprint == checkpoint.fingerprint
    assert turned.rotation["untied_bytes"] == checkpoint.tensors["model.embed_tokens.weight"].nbytes


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"writers": ("nothing.weight",)}, "`nothing.weight`"),
        ({"writers": ("model.layers.0.mlp.up_proj.weight",), "hidden": 24}, "24 wide"),
        ({"heads": (Heads("model.layers.0.self_attn.v_proj", (0, 990), "x", 2, 16),)}, "1006 rows"),
    ],
)
def test_places_that_do_not_fit_are_refused(tmp_path, changes, what):
    checkpoint = open_checkpoint(make_tiny(tmp_path / "m", "qwen2"))
    there = places(readers={}, norms=(), embeddings=(), tied=False, head=None, **changes)
    with pytest.raises(InputError, match="a rotation needs this tensor") as refused:
        rotated(checkpoint, there, hadamard_rotation(there))
    assert what in str(refused.value)


def test_a_rotation_is_known_by_its_numbers():
    there = places(heads=(Heads("v", (0,), "o", 1, 16),))
    first = hadamard_rotation(there)
    assert first.digest == hadamard_rotation(there).digest
    others = [
        hadamard_rotation(there, seed=1), hadamard_rotation(there, heads=False),
        hadamard_rotation(there, residual=False), Rotation(Hadamard(64, "0 residual")),
    ]  # fmt: skip
    assert first.digest not in {other.digest for other in others}
    assert len({other.digest for other in others}) == 3
