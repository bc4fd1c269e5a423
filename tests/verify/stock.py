"""Good checkpoints, each made once: by quantcli from tiny models, and by the reference producer."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from quantcli.commands import quantize as commands
from quantcli.commands.job import JobOptions
from tests.e2e.calibrating import RECIPES, ROOT, Models, write_tokenizer
from tests.e2e.conftest import make_llama
from tests.families import make_family
from tests.golden.short import assemble, short_model
from tests.tiny_models import make_tiny

TEXT = ROOT / "examples" / "calibration.txt"
CALIBRATION = f"calibration: {{data: {TEXT}, samples: 4, length: 16}}\n"
FEW = (f"calibration.data={TEXT}", "calibration.samples=4", "calibration.length=16")
# Recipes beside those that come with the tool.
OWN = {
    "static": 'rules: [{match: "*_proj", scheme: {name: w8a8_static, observer: minmax}}]\n',
    "symmetric": 'rules: [{match: "*_proj", scheme: {name: w8a8_static, symmetric: true}}]\n',
    "mix": 'rules: [{match: "*_proj", scheme: {name: w8a8_mix, observer: minmax}}]\n',
    "smooth": 'smooth: {alpha: 0.8, within: 1}\nrules: [{match: "*_proj", scheme: w8a8_mix}]\n',
    "mixed": 'rules:\n  - {match: "*.0.*", scheme: keep}\n  - {match: "*.self_attn.*", scheme: w8a16}\n'
    '  - {match: "*_proj", scheme: w8a8_dynamic}\n',
    "int4": 'rules: [{match: "*_proj", scheme: w4a4_dynamic}]\n',
    "w4a8_experts": """rules:
- {match: "*.experts.*", scheme: {name: w4a8, group_size: channel}}
- {match: "*_proj", scheme: w8a8_dynamic}
""",
    "w4a16_experts": """rules:
- {match: "*.experts.*", scheme: {name: w4a16, group_size: 32}}
- {match: "*_proj", scheme: w8a8_dynamic}
""",
    "head": 'rules: [{match: ["*_proj", lm_head], scheme: w8a8_dynamic}]\n',
    "mlp": 'rules: [{match: "*.mlp.*_proj", scheme: fp8_dynamic}]\n',
    "ct_dynamic": """rules:
- {match: ["*.eh_proj", "*.indexer.*"], scheme: keep, optional: true}
- {match: ["*_proj", "*_with_mqa", "*.experts.*"], scheme: w8a8_dynamic}
""",
    "ct_static": 'rules: [{match: "*_proj", scheme: {name: w8a8_static, observer: minmax}}]\n',
    "ct_symmetric": 'rules: [{match: "*_proj", scheme: {name: w8a8_static, symmetric: true}}]\n',
    "ct_fp8": 'rules: [{match: ["*_proj", "*.experts.*"], scheme: fp8_dynamic}]\n',
    "ct_fp8_static": 'rules: [{match: "*_proj", scheme: {name: fp8_static, observer: minmax}}]\n',
    "ct_w4a16": 'rules: [{match: ["*_proj", "*.experts.*"], scheme: {name: w4a16, group_size: 32}}]\n',
    "ct_asymmetric": """rules:
- match: ["*_proj", "*.experts.*"]
  scheme: {name: w4a16, group_size: 32, symmetric: false}
""",
    "ct_w8a16_groups": 'rules: [{match: "*_proj", scheme: {name: w8a16, group_size: 32}}]\n',
    "ct_zeros": """rules:
- {match: "*_proj", scheme: {name: w4a16, group_size: 32, symmetric: false}}
""",
    "ct_w4a8": 'rules: [{match: "*_proj", scheme: {name: w4a8, group_size: 32}}]\n',
    "ct_w8a16": 'rules: [{match: ["*_proj", lm_head], scheme: w8a16}]\n',
    "gptq_int4": 'rules: [{match: ["*_proj", "*.experts.*"], scheme: {name: w4a16, group_size: 32}}]\n',
    "gptq_int8": 'rules: [{match: "*_proj", scheme: w8a16}]\n',
    "gptq_inputs": 'rules: [{match: "*_proj", scheme: {name: w4a16, group_size: 32, clip: inputs}}]\n',
    "gptq_mixed": """rules:
- {match: "*.0.self_attn.*", scheme: keep}
- {match: "*.experts.*", scheme: w8a16, optional: true}
- {match: ["*.down_proj", lm_head], scheme: {name: w4a16, group_size: channel}, optional: true}
- {match: "*.self_attn.*", scheme: w8a16}
- {match: "*_proj", scheme: {name: w4a16, group_size: 32}, optional: true}
""",
    "dynamic_inputs": 'rules: [{match: "*_proj", scheme: {name: w8a8_dynamic, clip: inputs}}]\n',
    "fp8_inputs": 'rules: [{match: "*_proj", scheme: {name: fp8_dynamic, clip: inputs}}]\n',
    "ct_dynamic_inputs": 'rules: [{match: "*_proj", scheme: {name: w8a8_dynamic, clip: inputs}}]\n',
    "ct_w4a16_inputs": """rules:
- match: ["*_proj", "*.experts.*"]
  scheme: {name: w4a16, group_size: 32, clip: inputs}
""",
    "ct_fp8_inputs": 'rules: [{match: "*_proj", scheme: {name: fp8_dynamic, clip: inputs}}]\n',
    "ct_block_inputs": 'rules:\n  - {match: "*.o_proj", scheme: {name: fp8_block, clip: inputs}}\n'
    '  - {match: "*_proj", scheme: {name: fp8_dynamic, clip: inputs}}\n',
    "ct_mixed": 'rules:\n  - {match: "*.self_attn.o_proj", scheme: fp8_block}\n'
    '  - {match: "*.down_proj", scheme: {name: w4a16, group_size: 32}}\n'
    '  - {match: "*.0.*", scheme: keep}\n  - {match: "*.1.self_attn.*", scheme: fp8_tensor}\n'
    '  - {match: "*.self_attn.*", scheme: fp8_dynamic}\n  - {match: "*_proj", scheme: w8a8_dynamic}\n',
}
OWN |= {
    f"{target}_nvfp4_moe": 'rules: [{match: ["*_proj", "*.experts.*"], scheme: nvfp4}]\n'
    for target in ("ct", "mo")
}
# Schemes of four-bit and eight-bit floats in blocks, on any projection or expert.
OWN |= {
    f"{target}_{scheme}": f'rules: [{{match: ["*_proj", "*.experts.*"], scheme: {scheme}}}]\n'
    for target, schemes in {
        "ct": ("nvfp4", "nvfp4a16", "mxfp4", "mxfp4a16", "mxfp4_fp8", "mxfp8"),
        "mo": ("nvfp4", "nvfp4a16", "mxfp8", "fp8_static"),
    }.items()
    for scheme in schemes
}
# A quantized cache of keys and values, next to quantized weights.
OWN |= {
    f"{target}_kv_{kind}": f'kv_cache: {kind}\nrules: [{{match: "*_proj", scheme: {scheme}}}]\n'
    for target, kind, scheme in (
        ("ct", "fp8", "fp8_dynamic"),
        ("ct", "fp8_per_head", "nvfp4a16"),
        ("mo", "fp8", "mxfp8"),
        ("ascend", "c8", "w8a8_dynamic"),
    )
}
OWN |= {
    "mx_flatquant": """rules:
- {match: "*.experts.*", scheme: mxfp4_fp8, optional: true}
- {match: "*_proj", scheme: {name: mxfp4_flatquant, epochs: 1, batch: 4}}
""",
}
CLIPPED = {"dynamic_inputs", "fp8_inputs", "ct_dynamic_inputs", "ct_w4a16_inputs", "ct_fp8_inputs",
           "ct_block_inputs", "gptq_inputs"}  # fmt: skip
MEASURED = CLIPPED | {
    "static",
    "symmetric",
    "mix",
    "smooth",
    "ct_static",
    "ct_symmetric",
    "ct_fp8_static",
    "ct_nvfp4",
    "mo_nvfp4",
    "mo_fp8_static",
    "mx_flatquant",
    "ct_kv_fp8",
    "ct_kv_fp8_per_head",
    "mo_kv_fp8",
    "ascend_kv_c8",
}
GOLDEN = {"w8a8_dynamic", "w8a8_static", "w4a8_dynamic", "w8a8_mxfp8", "w4a4_flatquant_dynamic",
          "w8a8_fp8_dynamic"}  # fmt: skip


@dataclass(frozen=True)
class Good:
    """A checkpoint that nothing is wrong with, and the model that it was made from."""

    path: Path
    source: Path


class Stock:
    """Models and checkpoints below one folder, made when they are first asked for."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._models = Models(root / "models")
        (root / "models").mkdir()

    def model(self, family: str) -> Path:
        """A float model: `llama`, `llama:float16`, `llama:wide`, `names:vlm` by names and shapes
        alone, `mini` of one layer."""
        head, _, kind = family.partition(":")
        folder = self.root / "models" / family.replace(":", "-")
        if family == "mini":
            if not folder.exists():
                make_llama(folder)
        elif not kind:
            self._models(family)
        elif head == "names" and not folder.exists():
            make_family(folder, kind)
        elif kind == "wide" and not folder.exists():  # every width is a multiple of 64
            experts = {"moe_intermediate_size": 64} if "moe" in head else {}
            sizes = {"hidden_size": 128, "head_dim": 32, "intermediate_size": 128} | experts
            make_tiny(folder, head, **sizes)
            write_tokenizer(folder)
        elif not folder.exists():
            make_tiny(folder, head, dtype=getattr(torch, kind))
            write_tokenizer(folder)
        (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
        return folder

    def good(self, family: str, recipe: str, *options: str, checksum: bool = True) -> Good:
        """`recipe` applied to a model of `family`; options are those of --set."""
        words = "-".join([family, recipe, *options]).replace(":", "-").replace("/", "-")
        out = self.root / (words if checksum else f"{words}-unhashed")
        model = self.model(family)
        if not out.exists():
            path = RECIPES / f"{recipe}.yaml"
            if recipe in OWN:
                path = self.root / f"{recipe}.yaml"
                targets = {"ct": "compressed-tensors", "gptq": "gptq", "mo": "modelopt"}
                targets["mx"] = "{name: ascend, tp: 2}"
                target = targets.get(recipe.partition("_")[0], "ascend")
                lines = CALIBRATION * (recipe in MEASURED) + OWN[recipe]
                if recipe.endswith("_nvfp4_moe"):
                    lines = CALIBRATION.replace("}", ", all_tokens: true}") + OWN[recipe]
                path.write_text(f"target: {target}\n{lines}")
            elif "\ncalibration:" in path.read_text():
                options = (*FEW, *options)
            job = commands.plan(
                path,
                model=str(model),
                out=out,
                overrides=options,
                options=JobOptions(workers=1, checksum=checksum),
            )
            commands.quantize(job)
        return Good(out, model)

    def golden(self, name: str) -> Good:
        """The reference producer's, with two layers; its fp8 under the name that the engine has."""
        source = self.root / "golden-model"
        if not source.exists():
            short_model(source)
        out = self.root / f"golden-{name}"
        if not out.exists():
            assemble(name, out)
            if name == "w8a8_fp8_dynamic":
                file = out / "quant_model_description.json"
                table = json.loads(file.read_text())
                right = {"WFP8AFP8_DYNAMIC": "W8A8FP8_DYNAMIC"}
                file.write_text(
                    json.dumps({k: right.get(str(v), v) if v else v for k, v in table.items()})
                )
        return Good(out, source)
