"""Checkpoints of gptq: sound ones of many models, and what can happen to them."""

from functools import partial

import pytest
import torch

from quantcli.verification.depths import verify
from quantcli.verification.options import VerifyOptions
from tests.verify.damage import (
    CONFIG,
    Copy,
    add,
    assert_caught,
    change,
    drop,
    each,
    good_of,
    put,
    row,
    swap,
    table,
)

LAYER = "model.layers.1"
Q, K, V, OUT = (f"{LAYER}.self_attn.{name}_proj" for name in "qkvo")
GATE, UP, DOWN = (f"{LAYER}.mlp.{name}_proj" for name in ("gate", "up", "down"))
OWN_FILE = "quantize_config.json"

SOUND = [
    ("llama", "gptq_int4", "max_shard=60KB"), ("llama:float16", "gptq_int4"), ("qwen2", "gptq_int8"),
    ("phi3", "gptq_int4"), ("gemma3", "gptq_int4"), ("qwen3_moe", "gptq_int4"), ("llama", "gptq_mixed"),
    ("qwen3_moe", "gptq_mixed"), ("multimodal", "gptq_int4"), ("multimodal", "gptq_mixed"),
]  # fmt: skip


def examine(path, source):
    report = verify(VerifyOptions(path, full=True, against=str(source)))
    assert [f for f in report.findings if f.severity == "error"] == []
    assert report.format == "gptq"
    return report


@pytest.mark.parametrize("case", SOUND, ids=" ".join)
def test_own(stock, case):
    good = stock.good(*case)
    report = examine(good.path, good.source)
    assert [f.what for f in report.findings] == []
    assert report.modules
    assert report.checked["recomputed"] >= 4 * len(report.modules)


def test_clips_by_inputs_are_taken_from_it(stock):
    """Codes are the nearest for the stored scales, block by block, in columns."""
    good = stock.good("llama", "gptq_inputs")
    report = examine(good.path, good.source)
    assert any("clips by inputs were not recomputed" in what for what in report.not_checked)
    assert report.checked["recomputed"] > 0


def test_it_computes_as_it_says(stock):
    """Run on text: kinds by name, codes in columns."""
    from tests.verify.stock import TEXT

    good = stock.good("llama", "gptq_mixed")
    options = VerifyOptions(
        good.path, against=str(good.source), run=True, data=[str(TEXT)], samples=4, length=16
    )
    report = verify(options)
    assert [f for f in report.findings if f.severity == "error"] == []


lose = partial(drop, described=True)


def configure(change):
    def damage(copy):
        with copy.json(CONFIG) as config:
            change(config["quantization_config"])

    return damage


def rules(**changes):
    return configure(lambda block: block.update(changes))


ROWS = [
    row("codes lost", "gptq", lose(f"{DOWN}.qweight"), "parameters", f"`{DOWN}.qweight` is missing"),
    row("scales lost", "gptq", lose(f"{DOWN}.scales"), "parameters", f"needs `{DOWN}.scales`"),
    row("zero points lost", "gptq", lose(f"{DOWN}.qzeros"), "parameters", f"needs `{DOWN}.qzeros`"),
    row("codes as rows", "gptq", change(f"{UP}.qweight", lambda t: t.T), "parameters", UP, most=4),
    row("scales transposed", "gptq", change(f"{UP}.scales", lambda t: t.T), "parameters",
        f"{UP}.scales", "for a weight of"),
    row("scales as integers", "gptq", change(f"{UP}.scales", lambda t: t.to(torch.int32)), "parameters",
        f"{UP}.scales", "reads F32 or BF16 or F16"),
    row("a group out of order", "gptq", put(f"{OUT}.g_idx", (3,), 1), "parameters", f"{OUT}.g_idx",
        "desc_act is not true"),
    row("a group that there is not", "gptq", put(f"{OUT}.g_idx", (3,), 77), "parameters",
        f"{OUT}.g_idx", "groups from 0 to 77"),
    row("a tensor of another format", "gptq", add(f"{OUT}.weight_scale", torch.ones(64, 1), None),
        "parameters", f"{OUT}.weight_scale", "has no weight_scale"),
    row("float next to codes", "gptq", add(f"{OUT}.weight", torch.ones(64, 64).bfloat16(), None),
        "parameters", f"{OUT}.weight"),
    row("other bits", "gptq", rules(bits=8), "parameters", "for a weight of", most=99),
    row("other groups", "gptq", rules(group_size=64), "parameters", ".scales", most=99),
    row("bits of nonsense", "gptq", rules(bits="four"), "config", "`bits` is 'four'"),
    row("no sym", "gptq", configure(lambda block: block.pop("sym")), "config", "has no `sym`"),
    row("rules of nonsense", "gptq mixed", rules(dynamic={"-:(": {}}), "config", "not a regular"),
    row("rules lost", "gptq mixed", configure(lambda block: block.pop("dynamic")), "parameters",
        "for a weight of", most=99),
    row("too much is float", "gptq", rules(dynamic={"-:.*mlp.*": {}}), "loader",
        "excludes it"),
    row("rules without fused names", "gptq",
        rules(dynamic={f"-:.*1\\.self_attn\\.{name}_proj$": {} for name in "qkv"}), "siblings",
        "makes it float by its own name", most=3),
    row("head not told", "gptq mixed", rules(lm_head=False), "loader", "`lm_head`"),
    row("experts not told float", "gptq moe",
        each(*(lose(f"{LAYER}.mlp.experts.{n}.{p}_proj.{s}") for n in range(8) for p in
               ("gate", "up", "down") for s in ("qweight", "scales", "qzeros", "g_idx")),
             *(add(f"{LAYER}.mlp.experts.{n}.{p}_proj.weight", torch.ones(8, 8).bfloat16(), None)
               for n in range(8) for p in ("gate", "up", "down"))),
        "loader", "has it quantized", most=99),
    row("scale infinite", "gptq", put(f"{UP}.scales", (0, 5), float("inf")), "values",
        f"{UP}.scales", "[0, 5]"),
    row("scale of zero", "gptq", put(f"{UP}.scales", (1, 7), 0.0), "values", f"{UP}.scales", "[1, 7]"),
    row("zero point", "gptq", put(f"{UP}.qzeros", (1, 2), 0x77777767), "arithmetic", f"{UP}.qzeros",
        "[1, 2]", "0x77777767"),
    row("zero point of 8 bits", "gptq int8", put(f"{UP}.qzeros", (0, 3), 0x7F7F7F80), "arithmetic",
        f"{UP}.qzeros", "[0, 3]", "each word is 0x7f7f7f7f"),
    row("the other version", "gptq", rules(checkpoint_format="gptq_v2"), "arithmetic",
        "each word is 0x88888888", most=99),
    row("codes of siblings swapped", "gptq", swap(GATE, UP, "qweight", "scales"), "sqnr", "SQNR is",
        most=2),
    row("codes rolled", "gptq", change(f"{UP}.qweight", lambda t: t.roll(1, 1)), "sqnr", UP),
    row("one code", "gptq", change(f"{UP}.qweight", lambda t: one_bit(t)), "recomputed",
        f"{UP}.qweight", "[3, 11]"),
    row("one scale", "gptq", put(f"{UP}.scales", (1, 12), 0.5), "recomputed", f"{UP}.scales", "[1, 12]",
        also=["sqnr"], most=3),
]  # fmt: skip


def one_bit(tensor):
    changed = tensor.clone()
    changed[3, 11] ^= 1 << 4
    return changed


@pytest.mark.parametrize(**table(ROWS))
def test_caught(stock, tmp_path, row):
    assert_caught(stock, row, tmp_path)


def test_its_own_file_is_compared(stock, tmp_path):
    copy = Copy(good_of(stock, "gptq"), tmp_path / "copy")
    with copy.json(OWN_FILE) as settings:
        settings["bits"] = 8
    copy.seal()
    report = verify(VerifyOptions(copy.path, against=str(copy.source)))
    found = [f for f in report.findings if f.severity == "error"]
    assert [(f.check, f.where) for f in found] == [("recomputed", OWN_FILE)]
