"""`quantcli quantize`: its options and its output."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal

from quantcli.cli import next as following
from quantcli.cli import options
from quantcli.cli.calibrate import show_experts
from quantcli.cli.conversion import convert, show_job
from quantcli.cli.output import Output
from quantcli.core.cluster.executor import THREADS
from quantcli.core.text import count

if TYPE_CHECKING:
    from quantcli.commands.job import Job
    from quantcli.convert.execute import Written
    from quantcli.core.events import Progress
    from quantcli.planning.plan import Plan


@options.on_screen
def quantize(
    output: Output,
    recipe: options.Recipe,
    model: options.Model = None,
    serve_on: options.For = None,
    out: Annotated[
        str | None,
        typer.Option(metavar="PLACE", help=f"{options.PLACES} [default: MODEL-RECIPE here]."),
    ] = None,
    set_: options.Override = None,
    data: options.Data = None,
    plan: options.PlanOnly = False,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Write part I of N to OUT.part-I-of-N, for `quantcli pack --merge`; `nodes`: each "
            "node of --executor writes one to its own disk.",
        ),
    ] = None,
    workers: options.Workers = None,
    executor: options.Executor = THREADS,
    fresh: options.Fresh = False,
    force: options.Force = False,
    checksum: options.Checksum = True,
    sign: options.Sign = None,
    hash_model: options.HashModel = False,
    calibration: options.Calibration = None,
    device: options.Device = "cpu",
    max_memory: options.MaxMemory = None,
    trust_remote_code: options.Trust = False,
) -> None:
    """Convert a model with a recipe.

    The same command again resumes an interrupted run.

    On several machines: run parts 1/N to N/N with --part, in any order, and join them with
    `quantcli pack --merge`. If the recipe calibrates, all parts need the same --calibration.

    RECIPE `auto` takes the recipe that `quantcli recommend MODEL --for DEVICE` puts first; the first
    one that needs no text, if none is set.
    """
    from quantcli.cli.progress import watch
    from quantcli.commands import job as jobs
    from quantcli.commands import quantize as commands
    from quantcli.commands.budget.spending import Request, without_budget
    from quantcli.commands.recommend import choose

    resources = options.resources_of(device, workers, max_memory, executor, trust=trust_remote_code)
    signer = jobs.signer_of(sign)
    with watch(output) as planning:
        chosen = choose(
            recipe,
            model,
            serve_on,
            jobs.with_text(tuple(set_ or ()), data),
            with_data=calibration is not None,
            progress=planning,
        )
        how = jobs.JobOptions(
            workers,
            fresh,
            force,
            checksum,
            calibration,
            part,
            resources.executor,
            signer,
            hash_model,
            trust_remote_code,
        )
        ordinary = without_budget(
            Request(chosen.recipe, chosen.overrides, model, out, how),
            resources=resources,
            progress=planning,
        )
        job = commands.plan(
            ordinary.recipe,
            model=ordinary.model,
            out=ordinary.out,
            overrides=ordinary.overrides,
            options=ordinary.options,
            progress=planning,
        )

    calibrated: list[Plan] = []

    def run(progress: Progress) -> Written[Plan]:
        written = commands.quantize(job, progress, resources)
        calibrated.append(written.plan)
        notes = (*written.plan.notes, *written.notes)  # the plan's own are on the screen already
        return replace(written, notes=tuple(note for note in notes if note not in job.plan.notes))

    convert(
        output,
        plan,
        show=lambda: show_plan(output, job),
        check=lambda: commands.check(job),
        run=run,
        report=lambda written: jobs.to_json(replace(job, plan=written.plan) if written else job),
        closing=_closing(job),
    )
    for final in calibrated:
        if not job.plan.experts:
            show = partial(show_experts, output, final.experts)
            output.show(show, on_screen=not output.quiet)
    again = [following.typed(output, without="--plan")]
    following.show(output, *(again if plan else following.after_quantize(output, job, model)))


def show_plan(out: Output, job: Job[Plan]) -> None:
    """Print the plan: the effect of each rule, the weights that stay float and why, the cost."""
    plan = job.plan
    rows = []
    for rule in filter(lambda rule: rule.modules, plan.rules):
        sizes = decimal(rule.nbytes_before), decimal(rule.nbytes_after)
        rows.append([f"rules.{rule.number - 1}: {rule.scheme}", rule.label, f"{rule.modules}", *sizes])
    for kept in plan.kept:
        sizes = decimal(kept.nbytes_before), decimal(kept.nbytes)
        rows.append([f"stays: {kept.reason}", "", f"{kept.tensors}", *sizes])
    if plan.cache is not None:
        how = "measured" if plan.cache.measured else "of the source"
        size, layers = decimal(plan.cache_nbytes), f"{len(plan.cache.layers)}"
        rows.append([f"kv_cache: scales {how}", str(plan.cache.cache), layers, "", size])
    columns = ["weights", "engine's name", "count", "before", "after"]
    out.table(columns, rows, {"count", "before", "after"})
    out.line()
    for kept in plan.kept:
        share = f" ({_percent(kept.linears, plan.coverage.linears)} of linear weights)"
        out.line(f"{kept.reason}{share if kept.linears else ''}: {', '.join(kept.names)}")
    show_experts(out, plan.experts)
    out.line()
    before, after = decimal(plan.checkpoint.nbytes), decimal(plan.weight_nbytes)
    out.line(
        f"weights      {before} -> {after} in {count(plan.shards, 'shard')}; "
        f"{plan.quantized_params_pct:.1f} % of {plan.params:,} parameters quantized"
    )
    out.line(
        f"coverage     {plan.coverage.quantizable_pct:.1f} % of what the engine takes with these "
        f"schemes, {plan.coverage.linear_pct:.1f} % of all linear weights"
    )
    for loads_on in dict.fromkeys(f"{r.label}: {r.loads_on}" for r in plan.rules if r.modules):
        out.line(f"loads on     {loads_on}")
    out.line(f"serving in   {'bfloat16' if plan.serving_dtype == 'BF16' else 'float16'}")
    if job.part is not None:
        files = ", ".join(shard.file for shard in job.shards) or "none"
        others = f", and {count(plan.sidecars.keys() | plan.copies.keys(), 'file')} without weights"
        out.line(f"{job.part!s:<13}{files}{others if job.part.carries else ''}")
    facts = [] if job.session is None else [f"calibration  {_calibration_text(job)}"]
    if job.options.executor is not None:
        what = "a part on the disk of each node" if job.options.parts else "shard by shard"
        facts.append(f"runs on      {job.options.executor}, {what}")
    show_job(out, job, *facts)


def _percent(part: int, of: int) -> str:
    """Such as 12.5 %; of a part that rounds to nothing: < 0.1 %."""
    share = 100 * part / of
    return f"{share:.1f} %" if share >= 0.05 else "< 0.1 %"


def _calibration_text(job: Job[Plan]) -> str:
    session = job.session
    assert session is not None
    results = [f"{what} of {count(n, 'module')}" for what, n in session.plan.asked.items() if n]
    if not (results and session.complete):
        results += [result for method in session.plan.recipe.methods for result in method.results]
    what = " and ".join([", ".join(results[:-1]), results[-1]] if results[1:] else results)
    if session.complete:
        edited = (f"; {count(n, 'group')} {how}" for how, n in job.plan.edited.items() if n)
        return f"{session.folder}, {what}{''.join(edited)}"
    done = session.layers_done
    resumes = f", continues after {count(done, 'layer')}" if done else ""
    source = session.source
    memory = decimal(job.memory + session.memory_nbytes(job.options.workers))
    why = f", as {session.reason}" if session.reason else ""
    states = session.states_nbytes(on_cluster=job.options.executor is not None)
    return (
        f"runs first{why}: {what} from {source.samples} samples of {source.length} tokens of "
        f"{source.data}, kept in {session.folder}{resumes}; about {memory} of "
        f"memory, and up to {decimal(states)} of hidden states on disk"
    )


def _closing(job: Job[Plan]) -> tuple[str, str]:
    if job.part is not None:
        return f", {job.part}", "; join all parts with `quantcli pack --merge`"
    if job.options.parts:
        return ", in parts on nodes", "; bring them to one machine, and join them"
    before = job.plan.checkpoint.nbytes
    ratio = job.plan.weight_nbytes / before if before else 1.0
    return f", weights {100 * ratio:.1f} % of the source", ""
