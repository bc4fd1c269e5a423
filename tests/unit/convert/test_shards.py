"""The estimate of memory before a run."""

import pytest

from quantcli.commands import quantize as commands
from quantcli.convert.shards import memory_estimate
from quantcli.planning.block import BLOCK_ELEMENTS
from tests.e2e.conftest import make_llama


@pytest.mark.parametrize(
    ("scheme", "other"),
    [
        ("{name: w4a16, group_size: 32}", "{name: w4a16, group_size: 32, clip: none}"),
        ("{name: w4a16, group_size: 32, clip: mse}", "w8a16"),
    ],
)
def test_a_search_for_scales_takes_more_in_torch(tmp_path, monkeypatch, scheme, other):
    monkeypatch.setenv("QUANTCLI_KERNELS", "off")
    model = make_llama(tmp_path / "m", side=64)
    estimates = []
    for number, each in enumerate((scheme, other)):
        recipe = tmp_path / f"{number}.yaml"
        recipe.write_text(f'target: compressed-tensors\nrules: [{{match: "*_proj", scheme: {each}}}]\n')
        plan = commands.plan(recipe, model=str(model), out=tmp_path / "out").plan
        estimates.append(memory_estimate(plan, 3))
    assert 25 * 2**20 < (estimates[0] - estimates[1]) / 3 == 60 * BLOCK_ELEMENTS
