"""The commands that follow a command, as lines to paste: on stderr, not with --quiet or --json."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.remote.address import address_of
from quantcli.cli.output import Output

if TYPE_CHECKING:
    from pathlib import Path

    from quantcli.commands.job import Job
    from quantcli.commands.release.planning import Release
    from quantcli.commands.release.running import MemberOutcome
    from quantcli.planning.plan import Plan


# The words of a command, quoted for a shell. Those in capitals stand for what only the user knows.
Step = list[str]


def shell(*words: object) -> Step:
    """A command of these words."""
    return [shlex.quote(str(word)) for word in words]


def show(out: Output, *steps: Step) -> None:
    """Print the commands."""
    if out.as_json:
        return
    for step in steps:
        out.message(f"next: {' '.join(step)}", command=True)


@contextmanager
def after(out: Output, *steps: Step) -> Iterator[None]:
    """Show the commands after the block, also if the command ends in it."""
    try:
        yield
    finally:
        show(out, *steps)


def typed(out: Output, *more: object, without: str = "") -> Step:
    """This command line again, without an option that takes no value, and with more words."""
    words = [word for word in shlex.split(out.command) if word != without]
    return shell("quantcli", *words, *more)


def after_recipes(name: str | None = None) -> list[Step]:
    """What follows the list of recipes, or the text of one."""
    if name is not None:
        return [shell("quantcli", "quantize", name, "--model", "MODEL", "--plan")]
    return [
        shell("quantcli", "recipes", "show", "NAME"),
        shell("quantcli", "quantize", "NAME", "--model", "MODEL", "--plan"),
    ]


def after_recommend(recipes: Sequence[dict[str, Any]], best: str | None) -> list[Step]:
    """The plan of the first recipe, and its run."""
    commands = [row["command"] for row in recipes if row["recipe"] == best]
    return [step for command in commands[:1] for step in ([command, "--plan"], [command])]


def after_inspect(model: str, contents: dict[str, Any]) -> list[Step]:
    """What follows a look at a checkpoint: a recipe for a float model, proof for a quantized one."""
    if contents["quantization"] is not None:
        return [shell("quantcli", "verify", model, "--full")]
    return [
        shell("quantcli", "recommend", model, "--for", "DEVICE"),
        shell("quantcli", "quantize", "RECIPE", "--model", model, "--plan"),
    ]


def after_outliers(model: str) -> list[Step]:
    """What follows the advice: a recipe to put the rule into, and its plan."""
    return [
        [*shell("quantcli", "recipes", "show", "NAME"), ">", "recipe.yaml"],
        shell("quantcli", "quantize", "recipe.yaml", "--model", model, "--plan"),
    ]


def after_sensitivity(model: str) -> list[Step]:
    """What follows a measurement: a recipe with a budget that spends bytes where they matter."""
    return [shell("quantcli", "quantize", "BUDGET.yaml", "--model", model, "--data", "TEXT")]


def after_calibrate(
    recipe: str, model: str | None, overrides: Sequence[str], folder: Path
) -> list[Step]:
    """The conversion that uses the calibration."""
    named = ("--model", model) if model is not None else ()
    options = [word for override in overrides for word in ("--set", override)]
    words = ("quantcli", "quantize", recipe, *named, *options, "--calibration", folder)
    return [shell(*words)]


def after_quantize(out: Output, job: Job[Plan], model: str | None) -> list[Step]:
    """Proof of the checkpoint, and how to serve it; of a part, the next one and the joining.

    model: as the user named it; None if the recipe does.
    """
    if job.part is not None:
        return list(_after_part(out, job))
    if job.options.parts:
        return [_merge(f"{shlex.quote(str(job.out))}.part-*", job.out)]
    source = model or job.plan.recipe.file.model
    calibration = ("--calibration", job.session.root) if job.session is not None else ()
    verify = shell("quantcli", "verify", job.out, "--full", "--against", source, *calibration)
    return [verify, *_serve(job)]


def after_release(out: Output, release: Release, outcomes: Sequence[MemberOutcome]) -> list[Step]:
    """How to serve each checkpoint; before that proof of them if there was none, or the same command
    again for what is missing."""
    if any(outcome.status == "failed" for outcome in outcomes):
        return [typed(out)]
    there = [outcome for outcome in outcomes if outcome.error is None]
    places = [outcome.member.job.out for outcome in there]
    proof = shell("quantcli", "verify", *places, "--full", "--against", release.model)
    steps = [proof] if there and release.verify is None else []
    return [*steps, *(step for outcome in there if outcome.ok for step in _serve(outcome.member.job))]


def after_pack(job: Job[Any], checkpoint: str) -> list[Step]:
    """Proof of the checkpoint, and how to serve it."""
    return [shell("quantcli", "verify", job.out, "--full", "--against", checkpoint), *_serve(job)]


def _serve(job: Job[Any]) -> list[Step]:
    return [shell(*command.words) for command in job.serve[:1]]


def _after_part(out: Output, job: Job[Plan]) -> Iterator[Step]:
    part = job.part
    assert part is not None
    assert job.out.folder is not None  # no other place takes parts
    folder = job.out.folder
    whole = folder.with_name(folder.name.removesuffix(f".part-{part.number}-of-{part.of}"))
    parts = [type(part)(number, part.of) for number in range(1, part.of + 1)]
    if missing := [p for p in parts if p != part and not p.folder(whole).exists()]:
        given = f"{part.number}/{part.of}"
        other = f"{missing[0].number}/{part.of}"
        again = {given: other, f"--part={given}": f"--part={other}"}
        yield shell("quantcli", *(again.get(word, word) for word in shlex.split(out.command)))
    yield _merge(f"{shlex.quote(str(whole))}.part-*-of-{part.of}", whole)


def _merge(parts: str, whole: object) -> Step:
    """The joining of parts. parts: a pattern, quoted but for its stars."""
    return ["quantcli", "pack", "--merge", parts, *shell("--out", whole)]


def after_merge(out: object) -> list[Step]:
    """Proof of the checkpoint."""
    return [shell("quantcli", "verify", out, "--full")]


def after_verify(out: Output, checkpoint: str, report: dict[str, Any], page: Path | None) -> list[Step]:
    """Deeper proof if only headers were read; else how to serve and publish; of a failure, a page.

    page: the one that was written.
    """
    if not report["ok"]:
        again = [typed(out, "--report", "verify.html")] if page is None else []
        return [*again, shell("quantcli", "inspect", checkpoint)]
    steps = [shell(*shlex.split(command["command"])) for command in report["serve"][:1]]
    if report["depths"] == ["structure"]:
        return [shell("quantcli", "verify", checkpoint, "--full"), *steps]
    if address_of(checkpoint):  # it is published, or on its way
        return steps
    return [*steps, shell("hf", "upload", "ORG/NAME", checkpoint)]


def after_several(out: Output, reports: Sequence[dict[str, Any]], page: Path | None) -> list[Step]:
    """A page of all if none was written, and a look at the first that failed alone."""
    again = [typed(out, "--report", "verify.html")] if page is None else []
    failed = [report["checkpoint"] for report in reports if not report["ok"]]
    return [*again, *(shell("quantcli", "verify", name, "--full") for name in failed[:1])]
