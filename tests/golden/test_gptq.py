"""The bytes of gptq checkpoints of a small model, and of compressed-tensors ones that hold the same."""

import hashlib
import json

import pytest

from quantcli.commands import pack as packing
from quantcli.commands import quantize as commands
from tests.golden.test_ascend import DATA

# Without a search for clips no sum of floats decides: every CPU makes these bytes.
SCHEMES = {
    "int8": "w8a16",
    "int4": "{name: w4a16, group_size: 32, clip: none}",
    "int4 channel": "{name: w4a16, group_size: channel, clip: none}",
}
DIGESTS = {  # of config.json and the weight file
    ("int8", "gptq"): "0a94985041f66adb",
    ("int8", "compressed-tensors"): "97455ab7cc2785c7",
    ("int4", "gptq"): "23bd07ed7c4ee10e",
    ("int4", "compressed-tensors"): "110f8991144b21f9",
    ("int4 channel", "gptq"): "75995eb9ac9a9c65",
    ("int4 channel", "compressed-tensors"): "1683e45811ae9e8e",
}


def digest(folder):
    found = hashlib.sha256(json.dumps(json.loads((folder / "config.json").read_text())).encode())
    for file in sorted(folder.glob("*.safetensors")):
        found.update(file.read_bytes())
    return found.hexdigest()[:16]


@pytest.mark.parametrize(("scheme", "target"), DIGESTS)
def test_bytes_are_the_same_on_every_cpu_and_after_packing(tmp_path, scheme, target):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f'target: {target}\nrules: [{{match: "*_proj", scheme: {SCHEMES[scheme]}}}]\n')
    commands.quantize(commands.plan(recipe, model=str(DATA / "model"), out=tmp_path / "out"))
    assert digest(tmp_path / "out") == DIGESTS[scheme, target]
    other = {"gptq": "compressed-tensors", "compressed-tensors": "gptq"}[target]
    packing.pack(packing.plan_pack(str(tmp_path / "out"), other, tmp_path / "other"))
    assert digest(tmp_path / "other") == DIGESTS[scheme, other]
