"""Reports of verifications that nobody ran, healthy ones and faulty ones; reading pages."""

import html.parser
import random

from quantcli.planning.outliers import keep_advice, verdict

KINDS = {
    "self_attn.q_proj": (1024, 1024), "self_attn.k_proj": (256, 1024), "self_attn.v_proj": (256, 1024),
    "self_attn.o_proj": (1024, 1024), "mlp.gate_proj": (3072, 1024), "mlp.up_proj": (3072, 1024),
    "mlp.down_proj": (1024, 3072),
}  # fmt: skip
ATTENTION = {kind: shape for kind, shape in KINDS.items() if "attn" in kind}
EDGES = [(i - 16) / 4 for i in range(33)]
CHECKS = [
    ("headers", "structure", "every weight file has a sound header"),
    ("index", "structure", "the index lists the tensors that are there"),
    ("files", "structure", "what an engine needs next to weights is there"),
    ("values", "full", "no NaN or Inf, scales positive, codes in range"),
    ("sqnr", "against", "each weight is as near to the other model's as its type allows"),
    ("layer outputs", "run", "each layer puts out what the other model's does"),
    ("perplexity", "run", "perplexity on the text has not grown beyond the limit"),
    ("kl", "run", "predictions have not moved beyond the limit"),
]
HOSTILE = (
    "model.layers.1.</script><script>alert(1)</script><img src=x onerror=alert(2)>"
    "\x00\x1b[31m\u202e'\"&]]>"
)


def module(name, shape, sqnr, limit=30.0, rng=random.Random(0)):  # noqa: B008 - one stream for all
    inside = [0 if abs(edge) > 2 or edge == 2 else rng.randint(900, 1100) for edge in EDGES[:-1]]
    ok = sqnr >= limit
    if not ok:
        inside = [count // 2 + 40 for count in inside]
    return {
        "module": name, "label": "W8A8_DYNAMIC", "shape": list(shape), "sqnr_db": sqnr,
        "cosine": 1 - 10 ** (-sqnr / 10) / 2, "max_rel_error": round(rng.uniform(0.003, 0.008), 5),
        "limit_db": limit, "ok": ok,
        "worst_rows": [{"row": rng.randrange(shape[0]), "sqnr_db": sqnr - 8 + i} for i in range(3)],
        "outlier_channels": [{"channel": rng.randrange(shape[1]), "ratio": 31.0 - i} for i in range(2)],
        "edited": "columns x 0.125..16" if name.endswith("q_proj") else None,
        "histogram": {"edges": EDGES, "counts": inside},
        "codes_differ": None, "scale_ratio": [0.998, 1.002],
    }  # fmt: skip


def report(layers=28, experts=0, bad=(), errors=(), notes=("file is not in the manifest",)):
    """A report on a model of `layers` layers; modules whose names contain one of `bad` have failed."""
    rng = random.Random(7)
    modules = []
    for layer in range(layers):
        kinds = {f"model.layers.{layer}.{k}": s for k, s in (ATTENTION if experts else KINDS).items()}
        for expert in range(experts):
            for kind in ("gate_proj", "up_proj", "down_proj"):
                kinds[f"model.layers.{layer}.mlp.experts.{expert}.{kind}"] = (768, 1024)
        for name, shape in kinds.items():
            fails = any(f"{part}." in f"{name}." for part in bad)
            sqnr = rng.uniform(4, 21) if fails else rng.gauss(41.0, 1.0)
            modules.append(module(name, shape, round(sqnr, 2), rng=rng))
    modules.append(module("lm_head", (32000, 1024), 42.5, rng=rng))
    failed = [m for m in modules if not m["ok"]]
    findings = [
        {"check": "sqnr", "severity": "error", "what": f"SQNR is {m['sqnr_db']} dB; the limit is 30 dB",
         "where": m["module"], "fix": "keep the module in float: rules, scheme: keep"}
        for m in failed
    ]  # fmt: skip
    findings += [
        {"check": check, "severity": "error", "what": what, "where": where, "fix": None}
        for check, what, where in errors
    ]
    findings += [
        {"check": "files", "severity": "note", "what": note, "where": "a.txt", "fix": None}
        for note in notes
    ]
    wrong = [f["check"] for f in findings if f["severity"] == "error"]
    outputs = []
    for layer in range(layers):
        fails = any(m["module"].startswith(f"model.layers.{layer}.") for m in failed)
        sqnr = round(40.0 + rng.uniform(-1, 1) - (25 if fails else 0), 2)
        row = {"layer": f"model.layers.{layer}", "sqnr_db": sqnr, "limit_db": 20.0, "ok": sqnr >= 20.0}
        outputs.append(
            {**row, "cumulative_db": min([sqnr - 1, *(o["cumulative_db"] for o in outputs)])}
        )
    windows = []
    for _ in range(20):
        reference = rng.uniform(38, 52)
        windows.append({"reference": reference, "checkpoint": reference * rng.uniform(0.998, 1.004)})
    return {
        "ok": not wrong,
        "checkpoint": "/models/qwen3-w8a8", "format": "ascend", "against": "/models/qwen3",
        "tool": "quantcli 0.1.0", "depths": ["structure", "full", "against", "run"],
        "limits": {"min_sqnr": None, "max_ppl_ratio": 1.01, "max_kl": 0.05},
        "checks": [
            {"name": name, "depth": depth, "about": about, "checked": 123, "failed": wrong.count(name)}
            for name, depth, about in CHECKS
        ],
        "findings": findings,
        "modules": modules,
        "made_by": {"tool": "quantcli 0.1.0 with toy 1.2", "recipe": "target: ascend\n"},
        "sizes": [
            {"label": "W8A8_DYNAMIC", "modules": 197, "weights": 4_000_000, "bytes": 4_100_000},
            {"label": "FLOAT", "modules": 12, "weights": 500_000, "bytes": 1_000_000},
        ],
        "tensors": {"equal": 12, "edited": 4, "quantized": len(modules)},
        "run": {
            "tokens": 10200,
            "ppl": {"reference": 45.43, "checkpoint": 45.47, "ratio": 1.0009, "interval": [1, 1.0018]},
            "kl": {"mean": 0.001, "max": 0.2, "interval": [0.0008, 0.0012]}, "top1_agreement": 0.981,
            "mean_abs_logprob_change": 0.024, "change_interval": [0.022, 0.026],
            "layers": outputs, "windows": windows, "outputs_db": None,
            "moved_tokens": [
                {"window": 3, "position": 17, "token": " Paris", "before": "The capital of France is",
                 "after": ".\nThat", "reference": 0.512, "checkpoint": 0.0345, "change": -2.6974},
            ],
        },
    }  # fmt: skip


def structure():
    """The report where nothing but headers was read."""
    short = report(1)
    depths = {"structure"}
    checks = [check for check in short["checks"] if check["depth"] in depths]
    absent = {
        "modules": [],
        "sizes": [],
        "made_by": None,
        "tensors": None,
        "run": None,
        "against": None,
        "limits": {},
    }
    return {**short, **absent, "depths": ["structure"], "checks": checks}


def hostile():
    """A report in which every name comes from somebody who means harm."""
    made = report(2, bad=["layers.1.mlp.up_proj"])
    made["modules"][0] |= {
        "module": HOSTILE,
        "label": HOSTILE,
        "edited": HOSTILE,
        "ok": False,
        "sqnr_db": 1.0,
    }
    made["modules"][1]["module"] = '<a href="https://evil.example">layers.0</a>'
    made["checkpoint"] = made["against"] = f"/models/{HOSTILE}"
    for finding in made["findings"]:
        finding |= {"what": HOSTILE, "where": HOSTILE, "fix": HOSTILE}
    made["findings"].append(
        {"check": HOSTILE, "severity": "error", "what": HOSTILE, "where": None, "fix": None}
    )
    made["checks"][0] |= {"about": HOSTILE}
    made["run"]["layers"][0] |= {"layer": HOSTILE}
    made["run"]["moved_tokens"][0] |= {"token": HOSTILE, "before": HOSTILE, "after": HOSTILE}
    made["made_by"] = {"tool": HOSTILE, "recipe": f"{HOSTILE}\n{HOSTILE}"}
    made["sizes"][0] |= {"label": HOSTILE}
    return made


def outliers(layers=28, stack="model.layers"):
    """The ranking of `inspect --outliers` for a model with one channel that is too large."""
    rng = random.Random(3)
    modules = []
    for layer in range(layers):
        for kind, shape in KINDS.items():
            ratio = 260.0 if (layer, kind) == (5, "mlp.down_proj") else rng.uniform(1.5, 9.0)
            sqnr = {"int8 per channel": 42.0 - ratio / 10, "fp8 per channel": 31.0 - ratio / 100}
            modules.append(
                {"module": f"{stack}.{layer}.{kind}", "shape": list(shape), "amax_over_rms": 4 + ratio,
                 "kurtosis": ratio / 2, "channel_ratio": ratio, "channel": 77, "sqnr_db": sqnr,
                 "not_finite": None}
            )  # fmt: skip
    operands = {"int8 per channel": ["w8a8_dynamic"], "fp8 per channel": ["fp8_dynamic"]}
    advice = keep_advice(modules)
    return {"path": "/models/x", "ranked_by": "int8 per channel", "operands": operands,
            "modules": modules, "left_out": [], "verdict": verdict(modules, advice),
            "advice": advice}  # fmt: skip


class Elements(html.parser.HTMLParser):
    """The elements of a page with their attributes, and its text.

    text:   outside of scripts, styles and charts; `pre` as it is.
    labels: texts in charts.
    tips:   what the pointer shows there.
    """

    def __init__(self, text):
        super().__init__()
        self.elements, self.text, self.scripts, self.labels, self.tips = [], [], [], [], []
        self.pre, self._inside, self._in_chart = "", "", False
        self.feed(text)
        self.text = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        self._inside = tag
        self._in_chart = self._in_chart or tag == "svg"

    def handle_endtag(self, tag):
        self._inside = ""
        self._in_chart = self._in_chart and tag != "svg"

    def handle_data(self, data):
        if self._in_chart:
            if data.strip():
                (self.tips if self._inside == "title" else self.labels).append(data)
        elif self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text.append(data)
            self.pre += data if self._inside == "pre" else ""

    def all(self, tag):
        return [attributes for name, attributes in self.elements if name == tag]

    def charts(self):
        """The names of all charts, for those who cannot see them."""
        return [a["aria-label"] for a in self.all("svg") if "chart" in a.get("class", "")]
