"""Release files: what they say, and where they are wrong."""

import pytest

from quantcli.core.errors import InputError
from quantcli.recipe.recipe import load_recipe
from quantcli.recipe.release import RELEASE, read_release
from quantcli.recipe.written import read_recipe

WHOLE = """\
model: org/name
output: out/{name}-x
calibration: {data: text.txt, samples: 8}
set: {max_shard: 2GB}
checkpoints:
  - w8a8_static
  - recipe: own.yaml
    name: mine
    set:
      calibration.samples: 4
      rules.0.match: "*_proj"
      calibration.data: other.txt
    out: s3://bucket/mine
verify: {full: true, against: true, run: true, data: text.txt, tp: 2}
"""


def read(tmp_path, text):
    path = tmp_path / "release.yaml"
    path.write_text(text)
    return read_release(path)


def test_a_whole_file(tmp_path):
    (tmp_path / "own.yaml").write_text("")
    written = read(tmp_path, WHOLE)
    first, second = written.entries
    assert (first.name, first.recipe, first.out) == ("w8a8_static", "w8a8_static", None)
    assert (second.name, second.recipe) == ("mine", str(tmp_path / "own.yaml"))
    assert list(first.overrides) == ['max_shard="2GB"']
    assert list(second.overrides) == [
        'max_shard="2GB"',
        "calibration.samples=4",
        'rules.0.match="*_proj"',
        f'calibration.data="{tmp_path / "other.txt"}"',
    ]
    data = f'calibration.data="{tmp_path / "text.txt"}"'
    assert list(written.calibration) == [data, "calibration.samples=8"]
    assert written.place(first, "a/b") == "a/b/w8a8_static"
    assert written.place(first, "hf://org/{name}-x") == "hf://org/w8a8_static-x"
    assert written.place(second, "a/b") == "s3://bucket/mine"
    assert [entry.name for entry in written.only(["mine"])] == ["mine"]
    assert written.only([]) == written.entries
    assert written.file.verify.tp == "2"


def test_changes_reach_recipes_as_those_of_the_command_line_do(tmp_path):
    text = "checkpoints: [{recipe: w8a8_static, set: {rules.0.match: '*x', calibration.seed: 3}}]"
    (entry,) = read(tmp_path, text).entries
    recipe = read_recipe(entry.recipe, entry.overrides)
    assert recipe.file.rules[0].match == ["*x"]
    assert recipe.file.calibration.seed == 3
    assert recipe.document.is_overridden("calibration", "seed")
    assert not recipe.document.is_overridden("calibration", "data")


def test_a_whole_block_has_its_text_next_to_the_file(tmp_path):
    text = "checkpoints: [{recipe: w8a8_static, set: {calibration: {data: x.txt, samples: 2}}}]"
    (entry,) = read(tmp_path, text).entries
    block = read_recipe(entry.recipe, entry.overrides).file.calibration
    assert (block.data, block.samples) == (str(tmp_path / "x.txt"), 2)


@pytest.mark.parametrize("key", ["rules.7.scheme", "calibration.samples"])
def test_an_error_in_a_change_names_its_line(tmp_path, key):
    text = f"checkpoints:\n  - recipe: w8a8_static\n    set:\n      {key}: many\n"
    (entry,) = read(tmp_path, text).entries
    with pytest.raises(InputError) as caught:
        read_recipe(entry.recipe, entry.overrides)
    assert caught.value.where == f"{tmp_path / 'release.yaml'}:4"


@pytest.mark.parametrize(
    ("text", "what", "line"),
    [
        ("", "the release file is empty", 1),
        ("checkpoints: []", "`checkpoints`: must not be empty", 1),
        ("model: x", "key `checkpoints` is missing", 1),
        ("checkpoints: [a]\nverfy: {}", "unknown key `verfy`", 2),
        ("checkpoints:\n- recipe: a\n  nam: b", "unknown key `checkpoints.0.nam`", 3),
        ("checkpoints: [a]\nverify: {full: 1}", "`verify.full`: expected true or false", 2),
        ("checkpoints: [a]\nverify: {against: 1}", "`verify.against`: expected true, false, or a", 2),
        ("checkpoints: [a]\nverify: {tp: true}", "`verify.tp`: expected text", 2),
        ("checkpoints: [a]\ncalibration: {samples: 0}", "`calibration.samples`", 2),
        ("checkpoints:\n- {recipe: a, name: a/b}", "`checkpoints.0.name`: expected a name", 2),
        ("checkpoints:\n- {recipe: a, name: a.partial}", "`checkpoints.0.name`: expected a name", 2),
        ("checkpoints:\n- '.yaml'", "`.yaml` cannot name a folder", 2),
        ("checkpoints:\n- a\n- a", "two checkpoints are named `a`", 3),
        ("checkpoints:\n- {recipe: a, set: {x: .inf}}", "`x` is not a finite number", 2),
        ("checkpoints:\n- {recipe: a, set: {x=y: 1}}", "`x=y` is not a key of a recipe", 2),
    ],
)
def test_errors_name_their_line(tmp_path, text, what, line):
    with pytest.raises(InputError) as caught:
        read(tmp_path, text)
    assert caught.value.what.startswith(what)
    assert caught.value.where == f"{tmp_path / 'release.yaml'}:{line}"
    assert caught.value.fix or line != 1


def test_a_misspelt_key_and_name_have_the_closest_one(tmp_path):
    with pytest.raises(InputError, match="did you mean `checkpoints`"):
        read(tmp_path, "checkpoint: [a]")
    with pytest.raises(InputError, match=r"no checkpoint is named `fp9`[\s\S]*did you mean `fp8`"):
        read(tmp_path, "checkpoints: [{recipe: a, name: fp8}]").only(["fp9"])


def test_what_is_not_a_release_file(tmp_path):
    with pytest.raises(InputError, match="is a recipe, not a release file"):
        read_release("w8a8_static")
    with pytest.raises(InputError, match="does not exist"):
        read_release(tmp_path / "none.yaml")
    with pytest.raises(InputError, match="is a directory"):
        read_release(tmp_path)


def test_a_mapping_is_a_release_too():
    written = read_release({"checkpoints": ["w8a8_static"]})
    assert written.entries[0].where == f"{RELEASE}, `checkpoints.0`"
    with pytest.raises(InputError, match="unknown key `x`"):
        read_release({"checkpoints": ["a"], "x": 1})


@pytest.mark.parametrize("path", ["~nobody-of-this-name/text.txt", "a" * 5000])
def test_paths_that_no_system_has(path: str) -> None:
    """They are named when they are read; until then they are text."""
    release = read_release(
        {"checkpoints": [{"recipe": path, "name": "a"}], "calibration": {"data": path}}
    )
    assert release.entries[0].recipe == path
    assert release.calibration[0] == f'calibration.data="{path}"'
    recipe = {"target": "ascend", "rules": [{"match": "*", "scheme": "w8a8_static"}]}
    assert load_recipe({**recipe, "calibration": {"data": path}}).data_path() == path
