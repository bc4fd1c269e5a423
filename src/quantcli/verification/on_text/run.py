"""Both models run on text, layer by layer from disk, and their outputs compared."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import Tensor

from quantcli.calibration.replay.served import (
    Forward,
    Served,
    ServedCache,
    decibels,
)
from quantcli.calibration.text.dataset import model_limits, tokenizer_of
from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.core.errors import InputError
from quantcli.core.events import Progress
from quantcli.core.findings import Finding, failed, noted
from quantcli.core.numerics import LATENTS
from quantcli.targets.layouts import StoredModule
from quantcli.verification.limits import Limits
from quantcli.verification.on_text.corpus import Corpus
from quantcli.verification.on_text.engine import Engine
from quantcli.verification.on_text.figures import FINER, Outputs, Predictions, by_text
from quantcli.verification.on_text.reports import Figures, LayerReport, RunReport, ServedReport
from quantcli.verification.on_text.tasks import MOST_POSITIONS, Scorer, TaskSource, run_tasks
from quantcli.verification.on_text.trace import Tracer
from quantcli.verification.outcome import Report
from quantcli.verification.reference import Reference
from quantcli.verification.structure import Structure

_OWN = 1  # batches on which a layer's own error is measured
# Bounds that a sound int8 or fp8 conversion keeps, for limits that neither user nor recipe set.
MAX_PPL_RATIO = 1.05
MAX_KL = 0.1  # nats per token, on average
# dB of a layer's own output on the same inputs; a random layer whose inputs are fp4 keeps 7 to 10
LEAST_LAYER_SQNR = 8.0
LEAST_WITH_FP4_INPUTS = 5.0
_FULL = "verify with --full, which names numbers that are not finite"


@dataclass(frozen=True)
class Extras:
    """What a run does next to the comparison.

    traced: modules to trace. engine: a server that has answered. trust: whether the model's code may
            run.
    tasks:  of lm-evaluation-harness. documents: of each task; None: all.
    """

    traced: Sequence[str] = ()
    engine: Engine | None = None
    trust: bool = False
    tasks: Sequence[TaskSource] = ()
    documents: int | None = None


def verify_run(
    structure: Structure,
    reference: Reference,
    corpus: Corpus,
    workers: int,
    progress: Progress,
    extras: Extras,
) -> None:
    """Run both models; findings and figures go to the report, and defaults to limits that are None.

    Everything around the quantized modules is computed in the checkpoint's `Served.dtype`. Memory: one
    layer of each model; hidden states are on disk.
    """
    report, engine, trust = structure.report, extras.engine, extras.trust
    assert structure.stored is not None
    assert structure.target is not None
    report.depths.append("run")
    ours = Served(structure.stored, structure.target)
    report.add(noted("layer outputs", note) for note in ours.notes)
    other: Checkpoint | Served = reference.checkpoint
    if reference.stored is not None and reference.target is not None:
        other = Served(reference.stored, reference.target)
    with TemporaryDirectory(prefix="quantcli-") as folder:
        models = []
        progress.phase("building both models, without their weights")
        for number, model in enumerate((other, ours)):
            states = Path(folder) / str(number)
            states.mkdir()
            models.append(
                Forward(
                    model,
                    corpus.batches,
                    states,
                    dtype=ours.dtype,
                    workers=workers,
                    trust_remote_code=trust,
                )
            )
        for forward in models:
            forward.report_to(progress)
        counts = [len(model.skeleton.layers) for model in models]
        if counts[0] != counts[1]:
            report.add([_other_model("numbers of layers", *counts)])
            return
        predicts = models[0].skeleton.predicts_text
        follows = predicts and not models[0].skeleton.two_stacks
        if not follows and (engine is not None or extras.tasks):
            what = "--served and --tasks need a model that predicts what follows a text"
            fix = "leave out --served and --tasks"
            raise InputError(what, where=str(reference.checkpoint.path), fix=fix)
        least = _least_sqnr(structure.stored.modules.values())
        tokenizer = tokenizer_of(reference.checkpoint.path, trust_remote_code=trust)
        tracer = Tracer(ours, reference, corpus, tokenizer.texts)
        tracer.find(extras.traced, models[1])
        layers = _layers(report, models[0], models[1], least, progress, tracer)
        if layers is None:
            return
        sums = Predictions(ahead=0 if models[0].skeleton.two_stacks else 1)
        outputs = Outputs(least)
        progress.phase("predicting tokens" if predicts else "computing outputs")
        for expected, actual, batch, text in zip(
            models[0].logits(), models[1].logits(), corpus.batches, corpus.texts, strict=True
        ):
            if expected.shape != actual.shape:
                report.add([_other_model("numbers of outputs", expected.shape[-1], actual.shape[-1])])
                return
            (sums if predicts else outputs).add(expected, actual, batch, text)
            if engine is not None:
                engine.add(expected, actual, batch, text)
    report.count("layer outputs", len(layers))
    if ours.cache is not None:
        report.add(_cache_findings(ours.cache))
        report.count("rounded cache", len(ours.cache.sqnr()))
    traces = tracer.reports
    named = [*zip(corpus.names, corpus.sha256, strict=True)]
    if not predicts:
        report.run = outputs.windows.report(named, layers, traces)
        report.add([*_layer_findings(layers), *outputs.findings(report.run)])
        report.count("outputs", outputs.numbers)
        return
    ratio = structure.limits.most("max_ppl_ratio", MAX_PPL_RATIO)
    kl = structure.limits.most("max_kl", MAX_KL)
    report.limits = report.limits.model_copy(update={"max_ppl_ratio": ratio, "max_kl": kl})
    served = None if engine is None else engine.report(named)
    report.run = sums.windows.report(named, layers, traces, served, lambda: sums.moved(tokenizer.texts))
    if extras.tasks:
        positions = model_limits(reference.checkpoint.text_config)[0] or MOST_POSITIONS
        scorers = [
            Scorer(model, tokenizer, positions, ours.dtype, workers, trust, progress)
            for model in (other, ours)
        ]
        scores = run_tasks(extras.tasks, scorers, extras.documents)
        report.run = replace(report.run, tasks=scores)
    report.add([*_layer_findings(layers), *_findings(report.run, report, structure.limits)])
    if served is not None:
        report.add(_served_findings(served, report))
        report.count("served", served.tokens)
    report.count("perplexity", report.run.tokens)
    report.count("kl", report.run.tokens)


def _layers(
    report: Report,
    reference: Forward,
    ours: Forward,
    least: float,
    progress: Progress,
    tracer: Tracer,
) -> list[LayerReport] | None:
    """Each layer's SQNR: on the other model's inputs, and on its own, with all errors so far. least: in
    dB.

    None if the checkpoint cannot be run to its end, which is reported then.
    """
    batches = range(len(reference.specs))
    names = [name for name, _ in reference.skeleton.layers]
    tokens = sum(math.prod(spec.shape[:2]) for spec in reference.specs)
    progress.begin_layers(len(names), 0, tokens)
    layers = []
    for index, name in enumerate(names):
        progress.begin_layer(name, index, passes=2)
        for model in (reference, ours):
            model.enter(index)
        tracer.layer(index, reference, ours, progress)
        progress.phase("checkpoint")
        try:
            own = ours.layer(index, reference.states, batches[:_OWN])
        except InputError as error:  # NaN or Inf
            report.count("layer outputs", len(names))
            report.add([failed("layer outputs", error.what, report.checkpoint, _FULL)])
            return None
        progress.phase("reference")
        reference.layer(index)
        expected, actual = reference.states, ours.states
        sqnr = _sqnr((expected.get(batch), own[batch]) for batch in own)
        cumulative = _sqnr((expected.get(batch), actual.get(batch)) for batch in batches)
        layers.append(LayerReport(name, round(sqnr, 3), round(cumulative, 3), least, sqnr >= least))
        progress.layer(name, index)
    return layers


# Of the dB of a type. Scales are of other text: what passes their range is clipped.
_CACHE_SHARE = 0.6


def _cache_findings(cache: ServedCache) -> Iterator[Finding]:
    """Scales with which keys or values have a larger error than their type explains."""
    least = _CACHE_SHARE * cache.cache.element.sqnr_db
    for (layer, part), sqnr in cache.sqnr().items():
        if not sqnr >= least:
            side = "keys" if part == "k_scale" else "values"
            side = "latents" if cache.cache == LATENTS else side
            what = (
                f"{side} come out of the cache with {sqnr:.3f} dB, at least {least:g} dB are expected"
            )
            fix = (
                "its scale is of another layer or model, or was measured on other text: measure it anew"
            )
            yield failed("rounded cache", what, f"`{layer}`, {part}", fix)


def _sqnr(pairs: Iterable[tuple[Tensor, Tensor]]) -> float:
    """SQNR in dB of the second tensors of some pairs against the first ones."""
    signal = noise = 0.0
    for expected, actual in pairs:
        x = expected.double()
        signal += float(x.square().sum())
        noise += float((actual.double() - x).square().sum())
    return decibels(signal, noise)


def _least_sqnr(modules: Iterable[StoredModule]) -> float:
    """What a layer of a checkpoint with such modules keeps at least, in dB."""
    inputs = (module.numerics.input for module in modules if module.numerics)
    fp4 = any(operand is not None and operand.dtype == "fp4_e2m1" for operand in inputs)
    return LEAST_WITH_FP4_INPUTS if fp4 else LEAST_LAYER_SQNR


def _other_model(what: str, expected: int, ours: int) -> Finding:
    text = f"the models have different {what}, {expected} and {ours}: they cannot be run side by side"
    return failed("layer outputs", text, None, "give the model that the checkpoint was made from")


def _layer_findings(layers: Iterable[LayerReport]) -> Iterator[Finding]:
    for layer in layers:
        if not layer.ok:
            what = f"puts out {layer.sqnr_db} dB on the other model's inputs, at least "
            what += f"{layer.limit_db:g} dB are expected"
            yield failed("layer outputs", what, f"`{layer.layer}`", FINER)


def _findings(run: RunReport, report: Report, limits: Limits) -> Iterator[Finding]:
    """Errors of texts on which a limit is passed."""
    most_ratio, most_kl = report.limits.max_ppl_ratio, report.limits.max_kl
    for place, figures in by_text(run):
        assert figures.ppl is not None
        assert figures.kl is not None
        ratio, kl = figures.ppl.ratio, figures.kl.mean
        if most_ratio is not None and not ratio <= most_ratio:
            what = f"perplexity is {ratio:.4f} times the other model's, the limit is {most_ratio:g}"
            hint = limits.hint("max_ppl_ratio", ratio.__le__)
            yield failed("perplexity", what, place, FINER + hint)
        if most_kl is not None and not kl <= most_kl:
            what = f"mean KL divergence is {kl:.4f} nats per token, the limit is {most_kl:g}"
            hint = limits.hint("max_kl", kl.__le__)
            yield failed("kl", what, place, FINER + hint)


def _served_findings(served: ServedReport, report: Report) -> Iterator[Finding]:
    """Errors of texts on which a server passes a limit that the checkpoint has."""
    most_ratio, most_kl = report.limits.max_ppl_ratio, report.limits.max_kl
    fix = "see `run`: if the checkpoint is within the limits there, the server computes otherwise"
    texts: list[tuple[str, Figures]] = [(f", on `{text.text}`", text) for text in served.texts]
    for place, figures in texts if len(texts) > 1 else [("", served)]:
        if most_ratio is not None and figures.ppl is not None and not figures.ppl.ratio <= most_ratio:
            what = f"perplexity is {figures.ppl.ratio:.4f} times the other model's, the limit is "
            yield failed("served", f"{what}{most_ratio:g}{place}", served.url, fix)
        if most_kl is not None and figures.kl is not None and not figures.kl.mean <= most_kl:
            what = f"mean KL divergence is at least {figures.kl.mean:.4f} nats per token, the limit is "
            yield failed("served", f"{what}{most_kl:g}{place}", served.url, fix)
