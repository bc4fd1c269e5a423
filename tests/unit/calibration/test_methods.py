"""What methods say of themselves: for which schemes, with how much memory, in which order."""

import pytest

from quantcli.calibration.methods.hessians import HESSIANS_NBYTES, INPUTS_NBYTES, fitting
from quantcli.calibration.methods.learning import Learning
from quantcli.calibration.methods.ranges import Ranges
from quantcli.calibration.methods.rounding import Rounding
from quantcli.calibration.methods.smoothing import Smoothing
from quantcli.calibration.replay.taps import Matrix
from quantcli.core.errors import MachineError
from quantcli.recipe.methods import methods_for, recipe_methods
from quantcli.schemes.fp8_static import Fp8Static
from quantcli.schemes.w4a4_flatquant import W4A4FlatQuant
from quantcli.schemes.w4a16 import W4A16
from quantcli.schemes.w8a8_dynamic import W8A8Dynamic
from quantcli.schemes.w8a8_static import W8A8Static

GPTQ = W4A16(weight_rounding="gptq")
CLIPPED = W8A8Dynamic(clip="inputs")


@pytest.mark.parametrize(
    ("scheme", "methods", "results"),
    [
        (W8A8Dynamic(), (), []),
        (CLIPPED, ("ranges",), ["clips"]),
        (Fp8Static(), ("ranges",), ["ranges"]),
        (W8A8Static(clip="inputs"), ("ranges",), ["ranges", "clips"]),
        (GPTQ, ("rounding",), ["codes"]),
        (W8A8Static(weight_rounding="gptq"), ("ranges", "rounding"), ["ranges", "codes"]),
        (W4A4FlatQuant(), ("learning", "rounding"), ["transforms"]),
        (W4A4FlatQuant(weight_rounding="nearest"), ("learning",), ["transforms"]),
    ],
)
def test_schemes_name_the_methods_that_make_their_stats(scheme, methods, results):
    assert scheme.methods == methods
    assert scheme.needs_data == bool(methods)
    assert [m.name for m in methods_for([Smoothing()], [scheme])] == ["smooth", *methods]
    found = [result for method in (Ranges(), Rounding(), Learning()) for result in method.uses(scheme)]
    assert found == results


def test_only_clips_can_do_without_tokens():
    assert not Ranges().must_be_reached(CLIPPED)
    assert Ranges().must_be_reached(Fp8Static())
    assert Rounding().must_be_reached(GPTQ)


def test_memory_of_rounding():
    """4 k^2 bytes a sum of products, 12 k^2 for the widest while it is factorized, twice if inputs are
    rounded; other schemes take none."""
    weights = [(GPTQ, 64), (GPTQ, 128), (W8A8Dynamic(), 4096)]
    assert Rounding().nbytes(weights) == 12 * 128**2 + 4 * (64**2 + 128**2)
    assert Rounding().nbytes([(W4A4FlatQuant(), 128)]) == 24 * 128**2 + 2 * 4 * 128**2
    assert Rounding().nbytes([(W8A8Dynamic(), 4096)]) == 0
    many = [(GPTQ, 8192)] * 100
    assert Rounding().nbytes(many) == 12 * 8192**2 + HESSIANS_NBYTES
    assert Learning().nbytes(weights) == Smoothing().nbytes(weights) == 0
    # inputs of a batch of 2048 tokens in float32, for each worker
    assert Rounding().worker_nbytes(weights) == 4 * 2048 * (64 + 128)
    assert Rounding().worker_nbytes(many) == INPUTS_NBYTES
    assert Rounding().worker_nbytes([(GPTQ, 65536)]) == 4 * 2048 * 65536
    assert Rounding().worker_nbytes([(W8A8Dynamic(), 4096)]) == 0


def test_runs_of_rounding_fit_the_memory():
    """256 experts that read 4096 inputs: 16 runs of 64 MiB each; fewer if more inputs are kept."""
    experts = {Matrix("experts", number): [f"experts.{number}"] for number in range(256)}
    for tokens, each in ((64, 16), (2048, 8), (2**20, 1)):
        runs = list(fitting(experts, lambda modules: 4096, lambda leader, n=tokens: n))
        assert [len(run) for run in runs] == [each] * (256 // each)
        assert [leader for run in runs for leader in run] == list(experts)
        assert all(4 * 4096**2 * len(run) <= HESSIANS_NBYTES for run in runs)
        assert each == 1 or all(4 * 4096 * tokens * len(run) <= INPUTS_NBYTES for run in runs)


def test_a_step_of_learning_is_two_batches():
    schemes = [W8A8Dynamic(), W4A4FlatQuant(batch=4), W4A4FlatQuant(batch=3)]
    assert Learning().batch_tokens(schemes, 100) == 200
    assert Learning().batch_tokens(schemes[:1], 100) is Smoothing().batch_tokens(schemes, 100) is None
    assert (Learning.hidden_states, Smoothing.hidden_states) == (1, 0)


class Asks(W8A8Dynamic):
    """Asks for a method of a package that is not there. It has no name of its own."""

    @property
    def methods(self):
        return ("elsewhere",)


class AsksForSmoothing(W8A8Dynamic):
    """Asks for a method of recipes, whose options it could not give."""

    @property
    def methods(self):
        return ("smooth",)


@pytest.mark.parametrize("scheme", [Asks(), AsksForSmoothing()])
def test_a_method_that_is_not_there(scheme):
    with pytest.raises(MachineError, match="the scheme `w8a8_dynamic` needs the calibration method"):
        methods_for([], [scheme])
    assert "smooth" in recipe_methods()


def test_recipes_name_no_method_of_schemes():
    assert not {"learning", "ranges", "rounding"} & recipe_methods().keys()
