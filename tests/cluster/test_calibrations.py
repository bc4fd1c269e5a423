"""Calibrations on three nodes: the bytes of threads, whatever happens to processes and nodes."""

from __future__ import annotations

import pytest

from quantcli.calibration import session
from quantcli.calibration.spread.crew import ClusterCrew
from tests.cluster.conftest import kill
from tests.e2e.calibrating import LENGTH, Models
from tests.e2e.conftest import run_cli
from tests.unit.calibration.test_spread import CASES, content, write_case


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    return Models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def calibrate(tmp_path, models, monkeypatch):
    """Calibrate by the command line, in a folder; its files, and what was said."""
    monkeypatch.setattr(session, "BATCH_TOKENS", LENGTH)

    def calibrated(case, folder, *more):
        recipe, model = write_case(tmp_path, case), models(CASES[case][1])
        out = tmp_path / folder
        result = run_cli("calibrate", recipe, "--model", model, "--out", out, "--workers", 1, *more)
        assert result.code == 0, result.err
        return content(out), result.err

    return calibrated


@pytest.mark.parametrize("case", ["smoothed, padded", "codes", "codes on quantized inputs", "learned"])
def test_three_nodes_give_the_bytes_of_threads(case, three, calibrate, when_begun):
    places = when_begun(lambda place: False)
    files, said = calibrate(case, "nodes", *three.option)
    assert files == calibrate(case, "threads")[0]
    assert len({place.node for place in places}) == 3
    assert said.count("layer 4/4: ") == 1


@pytest.mark.parametrize(
    ("case", "function", "end"),
    [
        ("averages", "make_pass", "process"),
        ("codes", "forward", "process"),
        ("codes", "measure", "process"),
        ("codes", "measure", "node"),
    ],
)
def test_a_loss_costs_one_request(case, function, end, three, calibrate, when_begun, monkeypatch):
    """Of a pass, of the float pass, or of a layer."""
    real, armed = ClusterCrew.run, [False]

    def run(crew, done_there, requests, **options):
        armed[0] = done_there.__name__ == function
        places.clear()
        return real(crew, done_there, requests, **options)

    def act(place):
        return armed[0] and (kill(place) if end == "process" else three.remove(place.node))

    monkeypatch.setattr(ClusterCrew, "run", run)
    places = when_begun(act)
    files, said = calibrate(case, "nodes", *three.option)
    assert files == calibrate(case, "threads")[0]
    said = next(line for line in said.splitlines() if line.endswith("done again"))
    if end == "process":
        assert "has died: 1 " in said
