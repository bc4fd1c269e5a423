"""The job files of docs/cluster.md: their syntax, and the options and fields that they name."""

import re
import shlex
import subprocess

import typer
import yaml

from quantcli.cli.app import app
from tests.pages import ROOT

PAGE = (ROOT / "docs" / "cluster.md").read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def commands() -> list[list[str]]:
    """All command lines of quantcli on the page."""
    (job,) = map(yaml.safe_load, blocks("yaml"))
    texts = [job["spec"]["entrypoint"]]
    for block in blocks("bash"):
        texts += re.findall(r"quantcli (?:quantize) .*", block)
    return [shlex.split(text.removeprefix("quantcli ")) for text in texts]


def test_shell_blocks_parse():
    assert len(blocks("bash")) == 7
    for block in blocks("bash"):
        done = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")


def test_options_of_the_commands_exist():
    group = typer.main.get_command(app)
    assert len(commands()) == 5
    for words in commands():
        words = words[1:] if words[0] == "quantcli" else words
        options = {name for param in group.commands[words[0]].params for name in param.opts}
        assert {word for word in words if word.startswith("--")} <= options
        assert words[words.index("--executor") + 1].startswith("ray")


def test_the_ray_job_has_what_the_operator_needs():
    (job,) = map(yaml.safe_load, blocks("yaml"))
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    cluster = job["spec"]["rayClusterSpec"]
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    images = {container["image"] for g in groups for container in g["template"]["spec"]["containers"]}
    assert len(groups) == 2
    assert len(images) == 1
    for group in groups:
        spec = group["template"]["spec"]
        volumes = {volume["name"] for volume in spec["volumes"]}
        assert {m["name"] for c in spec["containers"] for m in c["volumeMounts"]} == volumes
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())
