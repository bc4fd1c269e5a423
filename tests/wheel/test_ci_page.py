"""The pipelines of docs/ci.md: their shell, run as there, with a stand-in for the Hub."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml

from tests.e2e.conftest import snapshot
from tests.hub_server import Hub, serve
from tests.hub_uploads import Uploads
from tests.pages import ROOT, files
from tests.wheel.installing import OFFLINE, Installed, environment, requirements_of

PAGE = files((ROOT / "docs" / "ci.md").read_text())
GITHUB = yaml.safe_load(PAGE[".github/workflows/quantize.yml"])
GITLAB = yaml.safe_load(PAGE[".gitlab-ci.yml"])
(JOB,) = GITHUB["jobs"].values()
SECRETS = {"HF_TOKEN": "hf_secret"}
EXPRESSIONS = {f"secrets.{name}": value for name, value in SECRETS.items()}


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """It has the bundled model under the name that the page uses."""
    folder = tmp_path_factory.mktemp("hub") / "models"
    shutil.copytree(ROOT / "examples" / "tiny-qwen3", folder / GITHUB["env"]["MODEL"])
    with serve(folder, handler=Uploads) as hub:
        yield hub


@pytest.fixture
def runner(wheel: Path, hub: Hub, tmp_path: Path) -> Installed:
    """A machine with the dependencies of the wheel, and a checkout of a repository as on the page."""
    there = environment(tmp_path, ["pip", *requirements_of(wheel)])
    (there.work / "quantize.yaml").write_text(PAGE["quantize.yaml"])
    shutil.copy(ROOT / "examples" / "evaluation.txt", there.work)
    return there


def run(
    runner: Installed, script: str, hub: Hub, wheel: Path, given: dict
) -> subprocess.CompletedProcess:
    """A script with the variables of a pipeline; the package is the wheel, the Hub the stand-in."""
    variables = {
        "HOME": str(runner.work.parent), "GITHUB_REF_NAME": "v1",
        "GITHUB_STEP_SUMMARY": str(runner.work / "summary.md"),
        **{name: str(value) for name, value in given.items()},
        "PACKAGE": str(wheel), "SAMPLES": "2", "HF_ENDPOINT": hub.address, "HF_HUB_DISABLE_XET": "1",
    }  # fmt: skip
    return runner.shell(script, **OFFLINE, **variables)


def filled(text: str) -> str:
    """The expressions of a workflow, as GitHub fills them in."""
    return re.sub(r"\$\{\{ (\S+) \}\}", lambda match: EXPRESSIONS[match[1]], text)


def github(
    runner: Installed, hub: Hub, wheel: Path, first: str = "Install"
) -> dict[str, subprocess.CompletedProcess]:
    """The steps of the workflow on a tag, from one on; after one has failed, those that always run."""
    done: dict[str, subprocess.CompletedProcess] = {}
    names = [step.get("name") for step in JOB["steps"]]
    for step in JOB["steps"][names.index(first) :]:
        failed = any(ended.returncode for ended in done.values())
        if "run" in step and (not failed or step.get("if") == "always()"):
            given = {name: filled(value) for name, value in step.get("env", {}).items()}
            done[step["name"]] = run(runner, filled(step["run"]), hub, wheel, GITHUB["env"] | given)
    return done


def gitlab(runner: Installed, hub: Hub, wheel: Path) -> list[subprocess.CompletedProcess]:
    """The jobs of the pipeline on a tag, up to the first that fails."""
    done = []
    given = {"CI_PROJECT_DIR": str(runner.work), "CI_COMMIT_TAG": "v1", **SECRETS}
    given["QUANTCLI_KERNELS"] = "off"  # compiled code is kept by the other pipeline
    for name, value in GITLAB["variables"].items():
        given[name] = str(value).replace("$CI_PROJECT_DIR", given["CI_PROJECT_DIR"])
    for stage in GITLAB["stages"]:
        for job in [
            job for job in GITLAB.values() if isinstance(job, dict) and job.get("stage") == stage
        ]:
            done.append(run(runner, "\n".join(job["script"]), hub, wheel, given))
            if done[-1].returncode:
                return done
    return done


def check_reports(runner: Installed) -> None:
    for name in ("plan.json", "verify.json"):
        document = json.loads((runner.work / name).read_text())
        assert (document["ok"], document["schema_version"]) == (True, 1)
    suites = ElementTree.parse(runner.work / "verify.xml").getroot()
    assert sum(int(suite.get("tests")) for suite in suites.iter("testsuite")) > 40
    assert "<html" in (runner.work / "verify.html").read_text()


def check_published(runner: Installed, hub: Hub, name: str) -> None:
    """The Hub has the bytes of the folder, figures in the card; the token is in none of the files."""
    assert "perplexity" in (hub.folder / name / "README.md").read_text().lower()
    published = snapshot(hub.folder / name)
    assert published.pop(".gitattributes")  # of the Hub
    assert published == snapshot(runner.work / "out")
    written = b"".join(path.read_bytes() for path in runner.work.rglob("*") if path.is_file())
    assert not any(secret.encode() in written for secret in SECRETS.values())


def test_github(runner: Installed, hub: Hub, wheel: Path) -> None:
    done = github(runner, hub, wheel)
    assert [step for step, ended in done.items() if ended.returncode] == [], done
    assert list(done) == ["Install", "Check the plan", "Convert", "Verify", "Summary", "Publish"]
    check_reports(runner)
    check_published(runner, hub, GITHUB["env"]["PUBLISH_TO"])
    (artifacts,) = [
        step["with"]["path"].split() for step in JOB["steps"] if "upload" in step.get("uses", "")
    ]
    assert all((runner.work / path).is_file() for path in artifacts)
    assert (runner.work / "summary.md").read_text() == "plan.json passed\nverify.json passed\n"
    (kept,) = [step["with"]["path"].split() for step in JOB["steps"] if "cache" in step.get("uses", "")]
    for folder in kept:
        assert any((runner.work.parent / folder.removeprefix("~/")).iterdir()), folder
    change(runner, "max_kl: 0.05", "max_kl: 0.0000001")
    done = github(runner, hub, wheel, first="Verify")
    assert (done["Verify"].returncode, "Publish" in done) == (1, False)
    assert "verify.json " in (runner.work / "summary.md").read_text()


def test_gitlab_publishes_nothing_if_the_plan_misses_what_is_expected(
    runner: Installed, hub: Hub, wheel: Path
) -> None:
    change(runner, 'output_gib: "<= 1"', 'output_gib: "<= 0.001"')
    (ended,) = gitlab(runner, hub, wheel)
    assert ended.returncode == 1, ended.stderr
    assert "expected output_gib <= 0.001" in ended.stderr
    assert json.loads((runner.work / "plan.json").read_text())["exit_code"] == 1
    assert not (runner.work / "out").exists()
    change(runner, 'output_gib: "<= 0.001"', 'output_gib: "<= 1"')
    shutil.rmtree(hub.folder / GITLAB["variables"]["PUBLISH_TO"], ignore_errors=True)
    quantize, publish = gitlab(runner, hub, wheel)
    assert (quantize.returncode, publish.returncode) == (0, 0), quantize.stderr + publish.stderr
    check_reports(runner)
    check_published(runner, hub, GITLAB["variables"]["PUBLISH_TO"])
    kept = GITLAB["quantize"]["artifacts"]
    for path in [*kept["paths"], kept["reports"]["junit"], *GITLAB["quantize"]["cache"]["paths"]]:
        assert os.path.lexists(runner.work / path), path


def change(runner: Installed, before: str, after: str) -> None:
    """Another line in the recipe."""
    recipe = runner.work / "quantize.yaml"
    text = recipe.read_text()
    assert before in text
    recipe.write_text(text.replace(before, after))
