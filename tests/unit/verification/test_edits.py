"""Which norm a matrix was multiplied for, told under the noise of 4 bits."""

from contextlib import contextmanager
from dataclasses import dataclass

import pytest
import torch

from quantcli.verification.edits import Candidate, choose


@dataclass
class Rows:
    """A weight in memory, read by rows."""

    tensor: torch.Tensor

    def weight(self, start, count):
        return self.tensor[start : start + count].clone()


def pair(before, after):
    @contextmanager
    def opened(tensor):
        yield Rows(tensor)

    return (lambda: opened(before)), (lambda: opened(after))


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
        found = choose([pair(weight, made)], 128, known)
        assert found is not None
        assert found.producer == truth.producer


def test_none_where_nothing_has_changed():
    weight = torch.randn(64, 32, generator=torch.Generator().manual_seed(0))
    wide = Candidate("norm", torch.linspace(0.5, 2, 32))
    found = choose([pair(weight, weight + 0.01)], 32, [wide])
    assert found is not None
    assert found.producer == ""
