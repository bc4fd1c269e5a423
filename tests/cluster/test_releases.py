"""A release on three nodes: its calibration, checkpoints and verification are those of threads."""

import yaml

from tests.e2e.calibrating import LENGTH, SAMPLES, TEXT, Models
from tests.e2e.conftest import run_cli, snapshot


def test_a_release_has_the_bytes_of_threads(three, tmp_path):
    model = Models(tmp_path / "models")("qwen3")
    (tmp_path / "text.txt").write_text(TEXT)
    table = {
        "model": str(model),
        "calibration": {"data": "text.txt", "samples": SAMPLES, "length": LENGTH},
        "checkpoints": [
            "w8a8_static",
            "w8a16",
            {"recipe": "vllm_int8_dynamic_smooth", "name": "smooth"},
        ],
        "set": {"max_shard": "60KB"},
        "verify": {"full": True, "against": True},
    }
    file = tmp_path / "release.yaml"
    file.write_text(yaml.safe_dump(table))
    results = {}
    for name, option in {"nodes": three.option, "threads": ()}.items():
        result = run_cli("release", file, "--out", tmp_path / name, "--workers", 1, "--json", *option)
        assert result.code == 0, result.err
        checkpoints = result.json["checkpoints"]
        results[name] = [
            (
                each["name"],
                each["status"],
                each["verification"]["not_checked"],
                each["verification"]["ok"],
            )
            for each in checkpoints
        ]
    assert results["nodes"] == results["threads"]
    assert [ok for *_, ok in results["nodes"]] == [True] * 3
    for place in ("nodes", "nodes.calibration"):
        files = snapshot(tmp_path / place)
        assert files == snapshot(tmp_path / place.replace("nodes", "threads"))
        assert len(files) > 8
