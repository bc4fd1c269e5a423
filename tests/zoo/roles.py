"""Roles of modules against the modules that transformers builds, for every model type that it knows.

    python -m tests.zoo.roles [model types]

A model of each type's default config, without weights, gives the names and shapes of a checkpoint. The
run fails if less than 95 % of the weights of linears outside of towers and draft layers have a role in
the layers of the language model, or if an embedding, router, head or convolution has such a role.
"""

from __future__ import annotations

import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from quantcli.checkpoint.checkpoint import scan_checkpoint
from quantcli.checkpoint.roles import BODY, roles_of
from quantcli.sources.stacked import split_experts
from tests.zoo.judge import LINEARS, UnknownModelError, judge, model_types, write_headers

LEAST = 95.0
# Model types with a smaller share, and why that is right.
LESS = {
    "blt": "projections between its encoder and its decoder are outside of layers",
    "fnet": "the head's transform and the pooler of a model with two layers",
    "fsmt": "its head is called output_projection",
    "ibert": "the judge does not know its class of linears, and judges its head alone",
    "jetmoe": "its attention experts are refused",
    "mobilebert": "the head's transform of a model with few layers",
    "modernvbert": "what joins its tower is called connector and proj",
    "nemotron_h_omni": "the head of a model with few layers",
    "neomme": "projections of patches are outside of layers",
    "qwen2_5_omni": "the head of a model with few layers",
    "roc_bert": "a projection of embeddings of a model with few layers",
    "squeezebert": "its layers are convolutions",
    "tipsv2_text_model": "in_proj_weight of torch's attention has no module of its own",
}


@dataclass(frozen=True)
class Compared:
    """The share of linear weights in the layers, in percent, and what has a role there and is none."""

    share: float
    wrong: list[str]


def compare(folder: Path) -> Compared:
    """The roles of a checkpoint against the judge."""
    checkpoint = split_experts(scan_checkpoint(folder))
    roles = roles_of(checkpoint)
    stacks = {
        stack.spec.name: roles[name.removesuffix(".weight")]
        for name, stored in checkpoint.tensors.items()
        if (stack := getattr(stored, "stack", None)) is not None
    }
    total = body = 0
    wrong = []
    for name, judged in judge(folder).items():
        if name.endswith("shared_expert.gate_proj.weight"):
            continue  # a default config may have as many experts as an expert has rows
        role = stacks.get(name) or roles.get(name.removesuffix(".weight")) or roles.get(name)
        if judged.kind in LINEARS:
            if role not in {"tower", "mtp"}:
                total += judged.count
                body += judged.count if role in BODY else 0
        elif role in BODY and judged.kind in {"embedding", "router", "conv", "head"}:
            wrong.append(f"{name}: {judged.kind}, not {role}")
    return Compared(100 * body / total if total else 100.0, wrong)


def compare_type(model_type: str) -> Compared:
    """The same for a model type's default config with few layers."""
    with tempfile.TemporaryDirectory() as place:
        write_headers(model_type, Path(place))
        return compare(Path(place))


def main() -> None:
    """Compare all; exit code 1 if one is not as it should be."""
    bad = 0
    for model_type in sys.argv[1:] or model_types():
        try:
            found = compare_type(model_type)
        except UnknownModelError as error:
            print(f"{model_type:28} not built: {error!s:.60}")
            continue
        fault = bool(found.wrong) or (found.share < LEAST and model_type not in LESS)
        bad += fault
        said = "; ".join(found.wrong[:3]) or LESS.get(model_type, "")
        print(f"{model_type:28} {found.share:5.1f} % {'WRONG ' if fault else ''}{said}", flush=True)
    sys.exit(bool(bad))


if __name__ == "__main__":
    main()
