"""The examples of docs/python.md run, and type checkers see the types of what they call."""

import json
import re

import pytest
from mypy import api

import quantcli
from tests.e2e.conftest import run_cli
from tests.pages import ROOT, blocks

PAGE = (ROOT / "docs" / "python.md").read_text()
EXAMPLES = blocks(PAGE, "python")
WRONG = {
    'quantcli.quantize("w8a8_dynamic", workers="two")': 'expected "int | None"',
    'quantcli.verify("out", depth=3)': 'No overload variant of "verify"',
    'quantcli.pack("out", "fp8", out="new", depth=3)': '"depth"',
    'quantcli.plan("w8a8_dynamic", model="m").nonsense': '"Planned" has no attribute "nonsense"',
    'quantcli.inspect("m", outliers=True).tensors': '"Outliers" has no attribute "tensors"',
}


@pytest.fixture(scope="module")
def ran(tmp_path_factory):
    """The folder in which all examples ran, one after the other, and their names."""
    folder = tmp_path_factory.mktemp("python")
    (folder / "examples").symlink_to(ROOT / "examples")
    names = {"__name__": "example"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for number, code in enumerate(EXAMPLES):
            exec(compile(code, f"docs/python.md, example {number}", "exec"), names)
    return folder, names


def test_the_examples_do_what_they_say(ran):
    folder, names = ran
    outs = {"tiny-w8a8", "tiny-ct", "tiny-smooth", "tiny-live", "tiny-ids"}
    assert outs <= {path.name for path in folder.iterdir()}
    assert names["result"].plan.quantized_modules == len(names["report"].modules) == 42
    assert names["converted"].plan.quantized_modules == 42
    assert names["choice"].best in {row["recipe"] for row in names["choice"].recipes}
    weights = [b"".join(f.read_bytes() for f in sorted((folder / out).glob("*.safetensors")))
               for out in ("tiny-w8a8", "tiny-live")]  # fmt: skip
    assert weights[0] == weights[1]
    recipe = (folder / "tiny-ids" / "quantcli_recipe.yaml").read_text()
    assert re.findall(r"samples: (\d+)", recipe) == ["2"]
    assert "data: example_inputs" in recipe


def test_results_are_the_documents_of_the_command_line(ran, monkeypatch):
    folder, names = ran
    monkeypatch.chdir(folder)
    source, moving = "examples/tiny-qwen3", {"disk_free", "memory_needed"}
    planned = quantcli.plan("w8a8_dynamic", model=source, out="new")
    commands = {
        ("inspect", "tiny-w8a8"): names["contents"],
        ("verify", "tiny-w8a8", "--full", "--against", source): names["report"],
        ("quantize", "w8a8_dynamic", "--model", source, "--out", "new", "--plan"): planned,
    }
    for words, result in commands.items():
        document = json.loads(run_cli(*words, "--json").out)
        document = document.get("plan", document)
        data = json.loads(json.dumps(result.to_dict()))
        assert len(data) > 10
        assert {k: document[k] for k in data.keys() - moving} == {
            k: v for k, v in data.items() if k not in moving
        }


def test_type_checkers_see_the_types(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("\n".join([*EXAMPLES, "import quantcli", *WRONG]))
    first = script.read_text().count("\n") + 2 - len(WRONG)
    flags = ["--config-file", str(ROOT / "pyproject.toml"), "--no-warn-unused-configs"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)  # its cache knows the libraries
        output, problems, _ = api.run([*flags, str(script)])
    assert not problems
    found = {int(n): text for n, text in re.findall(r"script\.py:(\d+): error: (.*)", output)}
    ours = {line: text for line, text in found.items() if "untyped function" not in text}
    assert sorted(ours) == [first + number for number in range(len(WRONG))], output
    for number, expected in enumerate(WRONG.values()):
        assert expected in ours[first + number]
