"""Eight checkpoints of the zoo, one for each kind; `make zoo` runs all."""

from pathlib import Path

import pytest

from tests.zoo import run
from tests.zoo.make import make, names
from tests.zoo.pairs import COLUMNS, REASONS, run_pair

# what transformers says of tiny sizes is not of interest here
pytestmark = pytest.mark.filterwarnings("ignore")

KINDS = {
    "llama": "dense",
    "qwen3_5_moe_pub": "stacks [out, in], a tower, a draft layer, linear attention",
    "granite4_hybrid": "stacks with `.weight`, Mamba 2",
    "deepseek_v3_fp8": "fp8 blocks decoded, latent attention, a draft layer",
    "gpt_oss": "stacks that no engine takes apart",
    "minicpmv": "a family that transformers does not know, with a tower",
    "t5": "an encoder and a decoder",
    "bert": "an encoder with a classifier",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> dict[str, Path]:
    """Each checkpoint once."""
    root = tmp_path_factory.mktemp("zoo")
    return {name: make(name, root / name) for name in KINDS}


@pytest.mark.parametrize("column", COLUMNS)
@pytest.mark.parametrize("name", KINDS)
def test_a_pair_comes_to_what_is_expected(made, tmp_path, name, column):
    outcome = run_pair(name, made[name], column, tmp_path)
    word = run.expectations()[name, column]
    assert run.as_expected(outcome, word), (outcome.word, word, outcome.wrong, outcome.said[-2000:])


def test_the_table_has_every_pair_and_no_other():
    table = run.expectations()
    assert set(table) == {(name, column) for name in names() for column in COLUMNS}


def test_the_table_has_no_word_that_is_not_a_reason():
    """WRONG is a word as well, of which `make zoo` says that it must not be."""
    words = {word for word in run.expectations().values() if not word[0].isdigit()} - {"WRONG"}
    assert words <= set(REASONS)
    assert set(REASONS) <= words  # a reason that nobody gives any more is dead
