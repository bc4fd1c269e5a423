from __future__ import annotations

import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from quantcli.__main__ import main
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.inspection import TensorGroup, fold, inspect_checkpoint, tied_embeddings
from quantcli.checkpoint.spec import TensorSpec
from quantcli.core.errors import InputError
from tests.builders import INDEX, make_model, tensor

BF16 = tensor("BF16", 2, 2)


def folded(*names: str) -> list[tuple[str, int]]:
    groups = fold([TensorSpec(name, "BF16", (2, 2)) for name in names])
    return [(group.name, group.count) for group in groups]


@pytest.mark.parametrize(
    ("numbers", "span"),
    [
        ([7], "7"),
        ([0, 1], "{0..1}"),
        ([0, 2], "{0,2}"),
        ([3, 0, 1, 2], "{0..3}"),
        ([0, 1, 2, 5, 7, 8], "{0..2,5,7..8}"),
        ([0, 2, 4, 6, 8, 10], "{0,2,4,6,8,10}"),
        ([0, 2, 4, 6, 8, 10, 12], "{0,2,4,6,8,...,12}"),
        (list(range(0, 100, 3)), "{0,3,6,9,12,...,99}"),
        ([9, 10, 11], "{9..11}"),
    ],
)
def test_fold_shows_ranges_and_gaps(numbers: list[int], span: str) -> None:
    names = [f"layers.{number}.up.weight" for number in numbers]
    assert folded(*names) == [(f"layers.{span}.up", len(numbers))]


def test_fold_with_several_numbers() -> None:
    names = [f"layers.{n}.experts.{e}.w1.weight" for n in range(1, 3) for e in (0, 1, 2, 5)]
    assert folded(*names) == [("layers.{1..2}.experts.{0..2,5}.w1", 8)]


def test_fold_leaves_other_digits_alone() -> None:
    assert folded("w1.weight", "layers.0.w2.bias", "h.1", "2.x.weight", "a..b") == [
        ("2.x", 1),
        ("a..b", 1),
        ("h.1", 1),
        ("layers.0.w2.bias", 1),
        ("w1", 1),
    ]


def test_fold_survives_names_that_look_folded() -> None:
    assert folded("a.{}.1.x.weight", "a.{}.2.x.weight") == [("a.{}.{1..2}.x", 2)]
    assert folded("a.{}.x", "a.1.x", "a.{0..3}.y") == [("a.{}.x", 1), ("a.{0..3}.y", 1), ("a.1.x", 1)]


def test_fold_keeps_dtypes_and_shapes_apart_and_adds_bytes() -> None:
    specs = [
        TensorSpec("l.0.w.weight", "BF16", (2, 3)),
        TensorSpec("l.1.w.weight", "BF16", (2, 3)),
        TensorSpec("l.2.w.weight", "F32", (2, 3)),
        TensorSpec("l.3.w.weight", "BF16", (3, 2)),
    ]
    assert fold(specs) == [
        TensorGroup("l.{0..1}.w", 2, "BF16", (2, 3), 24),
        TensorGroup("l.2.w", 1, "F32", (2, 3), 24),
        TensorGroup("l.3.w", 1, "BF16", (3, 2), 12),
    ]


def test_fold_sorts_by_name_whatever_the_numbers() -> None:
    assert folded("l.0.b", "l.1.a", "l.1.b", "l.2.a", "embed", "norm") == [
        ("embed", 1),
        ("l.{1..2}.a", 2),
        ("l.{0..1}.b", 2),
        ("norm", 1),
    ]


UNTIED = "no lm_head, though config.json says untied"
STORED = "tied in config.json, yet lm_head is stored"


@pytest.mark.parametrize(
    ("stored", "config", "said"),
    [
        (True, {}, "no"),
        (True, {"tie_word_embeddings": False}, "no"),
        (True, {"tie_word_embeddings": True}, STORED),
        (True, {"text_config": {"tie_word_embeddings": True}}, STORED),
        (False, {}, "yes"),
        (False, {"tie_word_embeddings": True}, "yes"),
        (False, {"tie_word_embeddings": False}, UNTIED),
        (False, {"text_config": {"tie_word_embeddings": False}}, UNTIED),
        (False, {"tie_word_embeddings": True, "text_config": {"tie_word_embeddings": False}}, "yes"),
    ],
)
def test_tied_embeddings(tmp_path: Path, stored: bool, config: Any, said: str) -> None:
    names = ["embed.weight", *(["language_model.lm_head.weight"] if stored else [])]
    model = make_model(tmp_path, {"model.safetensors": dict.fromkeys(names, BF16)}, config=config)
    assert tied_embeddings(open_checkpoint(model)) == said


@pytest.fixture
def model(tmp_path: Path) -> Path:
    """Two layers in two shards, one of them with quantized codes."""
    layer = "model.layers.{}.down_proj.weight"
    shards = {
        "model-00001-of-00002.safetensors": {
            "model.embed.weight": tensor("F32", 4, 2),
            layer.format(0): BF16,
        },
        "model-00002-of-00002.safetensors": {
            layer.format(1): BF16,
            "lm_head.weight": tensor("I8", 4, 2),
        },
    }
    config = {"model_type": "tiny", "architectures": ["TinyForCausalLM"]}
    files = {"README.md": "abc", "extra.gguf": "x"}
    return make_model(tmp_path / "model", shards, config=config, index=True, files=files)


def test_the_whole_account(model: Path) -> None:
    account = inspect_checkpoint(open_checkpoint(model))
    assert json.loads(json.dumps(account)) == account
    assert account == {
        "path": str(model),
        "model_type": "tiny",
        "architectures": ["TinyForCausalLM"],
        "draft": None,
        "tensors": 4,
        "parameters": 24,
        "bytes": 56,
        "shards": ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"],
        "dtypes": {
            "BF16": {"tensors": 2, "parameters": 8, "bytes": 16},
            "F32": {"tensors": 1, "parameters": 8, "bytes": 32},
            "I8": {"tensors": 1, "parameters": 8, "bytes": 8},
        },
        "tied_embeddings": "no",
        "quantization": {
            "format": "unnamed, I8",
            "modules": 1,
            "evidence": "`lm_head.weight` I8 [4, 2]",
        },
        "kv_cache": None,
        "groups": [
            {"name": "lm_head", "count": 1, "dtype": "I8", "shape": [4, 2], "bytes": 8, "role": "head"},
            {
                "name": "model.embed",
                "count": 1,
                "dtype": "F32",
                "shape": [4, 2],
                "bytes": 32,
                "role": "embedding",
            },
            {
                "name": "model.layers.{0..1}.down_proj",
                "count": 2,
                "dtype": "BF16",
                "shape": [2, 2],
                "bytes": 16,
                "role": "router",
            },
        ],
        "other_files": {"README.md": 3, "config.json": 60},
        "left_out": {"extra.gguf": "the same weights in another format"},
        "problems": [],
        "notes": [],
    }


@pytest.mark.parametrize(
    ("config", "model_type", "architectures"),
    [
        ({}, None, []),
        ({"model_type": "\x1b[2J", "architectures": ["\x1b[2J", "Good"]}, None, ["Good"]),
    ],
)
def test_words_of_config_json_are_shown_only_where_they_are_words(
    tmp_path: Path, config: Any, model_type: str | None, architectures: list[str]
) -> None:
    account = inspect_checkpoint(open_checkpoint(make_model(tmp_path, config=config)))
    assert (account["model_type"], account["architectures"]) == (model_type, architectures)


@pytest.mark.parametrize(
    ("config", "what"),
    [
        ({"model_type": ["qwen3"]}, "model_type` should be text, not a list"),
        ({"model_type": 5}, "model_type` should be text, not the number 5"),
        (
            {"architectures": "Lone"},
            "architectures` should be a list of texts, not text: it is 'Lone'",
        ),
        (
            {"architectures": [None]},
            "architectures` should be a list of texts, not one of other things",
        ),
        ({"text_config": "\x1b[2J"}, "text_config` should be an object, not text: it is '\\x1b[2J'"),
    ],
)
def test_cli_refuses_values_of_another_type(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], config: Any, what: str
) -> None:
    model = make_model(tmp_path, config=config)
    code, _, err = run(capsys, str(model))
    assert code == 2
    assert err.startswith(f"error: config.json: `{what}")
    assert f"\n  --> {model / 'config.json'}\n  fix: " in err


@pytest.mark.parametrize(
    ("glob", "names"),
    [
        ("lm_head.weight", ["lm_head.weight"]),
        ("lm_head", ["lm_head.weight"]),
        ("*.down_proj", ["model.layers.0.down_proj.weight", "model.layers.1.down_proj.weight"]),
        ("model.layers.1.*", ["model.layers.1.down_proj.weight"]),
        ("*.[01].*", ["model.layers.0.down_proj.weight", "model.layers.1.down_proj.weight"]),
    ],
)
def test_tensors_lists_what_the_glob_matches(model: Path, glob: str, names: list[str]) -> None:
    matches = inspect_checkpoint(open_checkpoint(model), glob)["matches"]
    assert [match["name"] for match in matches] == names


def test_a_match_says_where_its_data_is(model: Path) -> None:
    (match,) = inspect_checkpoint(open_checkpoint(model), "lm_head")["matches"]
    assert match == {
        "name": "lm_head.weight",
        "dtype": "I8",
        "shape": [4, 2],
        "bytes": 8,
        "shard": "model-00002-of-00002.safetensors",
    }


@pytest.mark.parametrize(
    ("glob", "fix"),
    [
        ("lm_haed.weight", "closest names: `lm_head.weight`, `model.embed.weight`"),
        ("LM_HEAD", "patterns match the whole name"),
        ("zzz", "patterns match the whole name"),
    ],
)
def test_a_glob_that_matches_nothing_is_refused(model: Path, glob: str, fix: str) -> None:
    with pytest.raises(InputError) as caught:
        inspect_checkpoint(open_checkpoint(model), glob)
    error = caught.value
    assert (error.what, error.where, error.fix) == ("no tensor matches", f"--tensors {glob}", fix)


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """`main` sets a handler."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as left:
        main(["inspect", *arguments])
    out, err = capsys.readouterr()
    return int(left.value.code or 0), out, err


def test_cli_shows_folded_modules(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(model))
    assert (code, err) == (0, f"next: quantcli verify {model} --full\n")
    assert "model.layers.{0..1}.down_proj  2 x BF16 [2, 2]  16 bytes" in out
    assert "model         tiny (TinyForCausalLM)" in out
    assert "elements      24 in 4 tensors" in out  # codes and scales are no parameters
    assert "left out      extra.gguf: the same weights in another format" in out
    assert "suspicious" not in out


def test_cli_json_is_one_document(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, str(model), "--json")
    assert (code, err) == (0, "")
    contents = inspect_checkpoint(open_checkpoint(model))
    assert json.loads(out) == json.loads(out) | {"ok": True, "exit_code": 0, **contents}


def test_cli_tensors(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, str(model), "--tensors", "lm_*")
    assert code == 0
    assert len(out.splitlines()) == 2
    assert "lm_head.weight" in out
    code, out, err = run(capsys, str(model), "--tensors", "x", "--json")
    assert code == 2
    assert json.loads(out)["error"]["what"] == "no tensor matches"
    assert "error: no tensor matches" in err


def test_cli_says_what_is_suspicious_and_exits_1(
    model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (model / "model-00002-of-00002.safetensors").unlink()
    (model / "config.json").unlink()
    code, out, err = run(capsys, str(model))
    assert (code, err) == (1, "")
    what = "shard `model-00002-of-00002.safetensors` is missing (listed in the index)"
    assert out.splitlines()[-2:] == [
        f"suspicious    {what} ({model}); fetch the model again",
        f"suspicious    model has no config.json ({model}); fetch the whole model folder",
    ]
    assert "model         unknown (no architecture named)" in out
    code, out, err = run(capsys, str(model), "--json")
    assert (code, err) == (1, "")
    assert json.loads(out)["problems"][0] == {
        "what": what,
        "where": str(model),
        "fix": "fetch the model again",
    }


def test_cli_refusal_is_one_document_too(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / INDEX).write_text("[]")
    code, out, err = run(capsys, str(model), "--json")
    assert code == 2
    problem = f"{INDEX} must hold a JSON object"
    assert json.loads(out) == {
        "ok": False,
        "schema_version": 1,
        "error": {"what": problem, "where": str(model / INDEX), "fix": "fetch the file again"},
        "exit_code": 2,
    }
    assert err == f"error: {problem}\n  --> {model / INDEX}\n  fix: fetch the file again\n"


def test_cli_survives_a_hostile_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = {"model_type": "\x1b[2J", "architectures": ["\x1b[2J"], "text_config": {"\x1b[2J": []}}
    model = make_model(tmp_path / "model", config=hostile, files={"\x1b[2J": "", "\udcff": ""})
    for flags in ([], ["--json"]):
        code, out, err = run(capsys, str(model), *flags)
        assert code == 0
        assert "\x1b" not in out + err


def test_a_scale_of_the_cache_is_named_before_an_offset(tmp_path: Path) -> None:
    names = [f"model.layers.0.self_attn.k_proj.kv_cache_{part}" for part in ("offset", "scale")]
    model = make_model(tmp_path, {"model.safetensors": dict.fromkeys(names, BF16)})
    cache = inspect_checkpoint(open_checkpoint(model))["kv_cache"]
    assert cache == {"tensors": 2, "example": names[1]}


def test_inspect_imports_neither_torch_nor_the_hub(model: Path) -> None:
    code = (
        "import sys\n"
        "from quantcli.__main__ import main\n"
        "try:\n"
        f"    main(['inspect', {str(model)!r}])\n"
        "except SystemExit as left:\n"
        "    assert not left.code, left.code\n"
        "heavy = ('torch', 'numpy', 'huggingface_hub', 'transformers', 'safetensors')\n"
        "sys.stderr.write(repr([name for name in heavy if name in sys.modules]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "TinyForCausalLM" in done.stdout
    assert done.stderr.splitlines()[-1] == "[]"
