"""Which norm a matrix was multiplied for, told under the noise of 4 bits."""

import pytest
import torch

from quantcli.verification.compare import FittedFactors
from quantcli.verification.edits import Candidate, Edited, check_layer, choose, fit, hidden_columns
from tests.unit.verification.test_compare import pair_of


@pytest.mark.parametrize("noise_db", [14, 16, 25, 40])
@pytest.mark.parametrize("seed", range(3))
def test_the_right_one_of_several_alike(noise_db, seed):
    """Factors of a tenth of an octave, far below the noise of one weight; 200 rows tell them apart."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(200, 128, generator=generator)
    known = [Candidate(name, (torch.randn(128, generator=generator) * 0.1).exp2()) for name in "abc"]
    for truth in known:
        made = weight * truth.columns
        made += torch.randn(200, 128, generator=generator) * made.std() * 10 ** (-noise_db / 20)
        found = choose([pair_of(weight, made)], known)
        assert found is not None
        assert found.producer == truth.producer


def test_none_where_nothing_has_changed():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    wide = Candidate("norm", torch.linspace(0.5, 2, 32))
    found = choose([pair_of(weight, weight + 0.01)], [wide])
    assert found is not None
    assert found.producer == ""


@pytest.mark.parametrize("norm", [0.25, 0.625])
def test_one_factor_of_all_rows_and_columns_may_be_that_of_the_columns(norm):
    """A reader with one factor 2 of all columns, of which fits made columns and rows."""
    rows = FittedFactors(torch.full((8,), 0.5), torch.linspace(1, 2, 16))
    fitted = FittedFactors(torch.full((6,), 2 / norm), torch.full((16,), norm))
    matrices = [Edited("a.v_proj", rows, "a.norm"), Edited("a.o_proj", fitted, "b.norm")]
    assert not list(check_layer(["a.norm", "b.norm"], matrices, {}))
    other = FittedFactors(torch.full((6,), 3 / norm), torch.full((16,), norm))
    matrices[1] = Edited("a.o_proj", other, "b.norm")
    whats = {finding.where: finding.what for finding in check_layer([], matrices, {})}
    assert whats["`a.v_proj`"].startswith("its rows were multiplied")


@pytest.mark.parametrize(("k", "head"), [(64, 64), (128, 16)])
def test_few_columns_under_the_noise_of_4_bits(k, head):
    """Row 5 of 64 was doubled. The reader has half of column 5, or of one column for each head."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(48, k, generator=generator)
    rows = torch.ones(64)
    rows[5] = 2
    columns = (1 / rows).view(-1, 1, head).expand(-1, k // 64, -1).reshape(-1)
    assert int((columns != 1).sum()) == k // 64
    noise = torch.randn(48, k, generator=generator) * 10 ** (-16 / 20)
    found = hidden_columns(pair_of(weight, weight * columns + noise), rows)
    assert found is not None
    assert torch.equal(found, columns)
    assert hidden_columns(pair_of(weight, weight + noise), rows) is None
    assert hidden_columns(pair_of(weight[:, :40], weight[:, :40]), rows) is None


def test_a_reader_may_stand_in_the_next_block():
    """As in BERT: the reader of `self.value` is `output.dense` of the same attention."""
    rows = FittedFactors(torch.tensor([2.0, 1, 1, 4]), torch.ones(4))
    columns = FittedFactors(torch.ones(4), 1 / rows.rows)
    value, reader = Edited("layer.0.attention.self.value", rows, None), "layer.0.attention.output.dense"
    assert not list(check_layer([], [value, Edited(reader, columns, None)], {}))
    other = Edited(reader, FittedFactors(torch.ones(4), columns.columns.flip(0)), None)
    assert len(list(check_layer([], [value, other], {}))) == 2
    far = Edited("layer.0.output.dense", columns, None)
    assert len(list(check_layer([], [value, far], {}))) == 2


def test_linears_may_be_wrapped_one_by_one():
    """As in Moshi: `v_proj.linear` and `o_proj.linear`."""
    rows = FittedFactors(torch.tensor([2.0, 1, 1, 4]), torch.ones(4))
    columns = FittedFactors(torch.ones(4), 1 / rows.rows)
    names = [f"layers.0.self_attn.{name}_proj.linear" for name in "vo"]
    edited = [Edited(names[0], rows, None), Edited(names[1], columns, None)]
    assert not list(check_layer([], edited, {}))


@pytest.mark.parametrize("seed", range(4))
def test_row_factors_within_the_noise_of_few_numbers_are_one(seed):
    """32 rows of 64 numbers at 12 dB: estimates are off by 3 %, one of 32 by 9 % or more. A row that
    was multiplied by more is found all the same, and a damaged row does not hide another."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(32, 64, generator=generator)
    noise = torch.randn(32, 64, generator=generator) * 10 ** (-12 / 20)
    ones = Candidate("", torch.ones(64))
    made = weight + noise
    made[3] -= weight[3] * ((weight[3] @ made[3]) / (weight[3] @ weight[3]) - 0.915)
    assert bool((fit(pair_of(weight, made), ones).rows == 1).all())
    made[7] *= 1.4
    made[8] = torch.randn(64, generator=generator)
    rows = fit(pair_of(weight, made), ones).rows
    assert 1.2 < float(rows[7]) < 1.6
