"""Both models on text, as a report holds it. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class LayerReport:
    """A layer's outputs compared with the other model's: SQNR on the same inputs, and on its own."""

    layer: str
    sqnr_db: float
    cumulative_db: float
    limit_db: float
    ok: bool


@dataclass(frozen=True)
class WindowReport:
    """What both models put out on one window of text. Figures of predictions are None without any.

    text:       the number of its text.
    reference, checkpoint: perplexity of the other model, and of the checkpoint.
    kl:         mean KL divergence of predictions, nats per token.
    top1_agreement: share of predictions with the same first choice.
    mean_abs_logprob_change: of the tokens of the text, in nats.
    energy, error: sums of squares of what the other model puts out, and of the difference to it.
    peir:       the largest difference over the range of what the other model puts out.
    Outputs are not known of a server.
    """

    text: int
    reference: float | None
    checkpoint: float | None
    kl: float | None
    top1_agreement: float | None
    mean_abs_logprob_change: float | None
    energy: float | None = None
    error: float | None = None
    peir: float | None = None


@dataclass(frozen=True)
class PerplexityRatio:
    """Perplexity of the other model and of the checkpoint, and the checkpoint's over the other's.

    interval: of the ratio, 95 %, by a bootstrap over windows; None if a text has one window.
    """

    reference: float
    checkpoint: float
    ratio: float
    interval: list[float] | None


@dataclass(frozen=True)
class Divergence:
    """KL divergence of predictions, nats per token. interval: of the mean, as that of perplexity."""

    mean: float
    max: float
    interval: list[float] | None


@dataclass(frozen=True)
class TokenReport:
    """A token of the text whose log-probability moved.

    window, position: its place. before, after: the text around it.
    reference, checkpoint: its probability in the other model and in the checkpoint.
    change: of its log-probability, in nats.
    """

    window: int
    position: int
    token: str
    before: str
    after: str
    reference: float
    checkpoint: float
    change: float


@dataclass(frozen=True)
class SourceReport:
    """One source of a module's error. source: what it is. sqnr_db: of the outputs with it alone."""

    source: str
    sqnr_db: float


@dataclass(frozen=True)
class WorstReport:
    """A channel or a token of a module. number: of the channel; of the token: in all text.

    share: of the error of all channels, or tokens. text: of the token; None for a channel.
    window: of the token; None for a channel.
    """

    number: int
    sqnr_db: float
    share: float
    text: str | None = None
    window: int | None = None


@dataclass(frozen=True)
class TraceReport:
    """Where the error of one module comes from. All SQNR are of its outputs, but for `input_db`.

    numerics:  how it is quantized. edited: how its weights were multiplied before; None: they were not.
    tokens:    that it reads.
    input_db:  SQNR of its inputs, with the errors of all modules before; None if it reads other tokens.
    output_db: with all errors, likewise. alone_db: on the other model's inputs.
    sources:   "earlier modules", "weights" and "inputs", and what clipping and rounding do in both.
               Those that are not known, as of a rotated weight, are left out.
    worst_outputs: its channels with the largest error. worst_inputs: channels of its input whose
               weights bring in the largest error. worst_tokens: those with the largest error.
    """

    module: str
    label: str
    numerics: str
    edited: str | None
    tokens: int
    input_db: float | None
    output_db: float | None
    alone_db: float | None
    sources: list[SourceReport]
    worst_outputs: list[WorstReport]
    worst_inputs: list[WorstReport]
    worst_tokens: list[WorstReport]


@dataclass(frozen=True, kw_only=True)
class Figures:
    """How outputs differ over some windows. Figures of predictions are None if the models make none.

    tokens:      those that are predicted; all of them if the models predict none.
    outputs_db:  SQNR of what the models put out: logits of tokens or classes, or hidden states.
    peir:        the largest difference in a window over the range of the reference there; the mean over
                 windows. Source: TICO, `compute_peir`.
    ..._interval: 95 %, by a bootstrap over windows; None if a text has one window.
    """

    tokens: int
    ppl: PerplexityRatio | None = None
    kl: Divergence | None = None
    top1_agreement: float | None = None
    top1_interval: list[float] | None = None
    mean_abs_logprob_change: float | None = None
    change_interval: list[float] | None = None
    outputs_db: float | None = None
    outputs_interval: list[float] | None = None
    peir: float | None = None
    peir_interval: list[float] | None = None


@dataclass(frozen=True, kw_only=True)
class TextReport(Figures):
    """The figures of one text. text: its name. sha256: (hex) of the text. windows: their number."""

    text: str
    sha256: str
    windows: int


@dataclass(frozen=True, kw_only=True)
class ServedReport(Figures):
    """A running server next to the other model, on the same windows.

    The KL divergence is a lower bound: all tokens that are not candidates count as one.

    url, model: of the server.
    candidates: tokens that it names at each place, at least. covered: the share of the other model's
               probability that they have. Both are None if it names tokens by text; then there are
               neither KL divergence nor first choices.
    replay:    the server next to the checkpoint as it was replayed here.
    """

    url: str
    model: str
    candidates: int | None
    covered: float | None
    replay: Figures
    texts: list[TextReport]


@dataclass(frozen=True)
class TaskReport:
    """A score of a task, by the other model and by the checkpoint.

    metric:   such as "acc"; with its filter, if that is not "none".
    documents: how many were answered.
    change:   checkpoint less reference. interval: of it, 95 %, by a bootstrap over documents on which
              both were scored; None if the metric has no score for each document.
    better:   whether the checkpoint scores better; None if the interval holds zero.
    """

    task: str
    metric: str
    documents: int
    reference: float
    checkpoint: float
    change: float
    interval: list[float] | None
    better: bool | None


@dataclass(frozen=True, kw_only=True)
class RunReport(Figures):
    """Both models on text: figures over all windows, and those of each text.

    windows: the pieces of text that ran, text by text.
    moved_tokens: those whose log-probability moved most, largest change first.
    traces:  of single modules, as they were asked for.
    served:  a running server; None if none was asked.
    tasks:   scores of tasks of lm-evaluation-harness.
    """

    windows: list[WindowReport] = field(default_factory=list)
    layers: list[LayerReport] = field(default_factory=list)
    texts: list[TextReport] = field(default_factory=list)
    moved_tokens: list[TokenReport] = field(default_factory=list)
    traces: list[TraceReport] = field(default_factory=list)
    served: ServedReport | None = None
    tasks: list[TaskReport] = field(default_factory=list)
