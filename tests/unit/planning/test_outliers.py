"""Statistics of weights against independent formulas, and the rule that they lead to."""

from __future__ import annotations

import json
import math
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import Progress
from quantcli.planning.outliers import LEAST_DB, MARGIN_DB, inspect_outliers, keep_advice, rank, verdict
from quantcli.targets.ascend.target import Ascend
from tests.builders import Tensor, make_model, tensor

INT8, FP8, INT4 = "int8 per channel", "fp8_e4m3 per channel", "int4 per channel"
MXFP8, GROUPS = "fp8_e4m3 e8m0 per group", "int4 per group"
FP4 = "fp4_e2m1 e8m0 per group"
FOUR = [INT4, GROUPS, FP4]
CONFIG = {"model_type": "llama", "torch_dtype": "bfloat16"}


def bf16(values: np.ndarray) -> np.ndarray:
    """float32 values cut to bfloat16."""
    return (np.ascontiguousarray(values, "<f4").view("<u4") & 0xFFFF0000).view("<f4")


def stored(values: np.ndarray, dtype: str = "BF16") -> Tensor:
    raw = np.ascontiguousarray(values, "<f4")
    data = {
        "BF16": lambda: (raw.view("<u4") >> 16).astype("<u2").tobytes(),
        "F16": lambda: raw.astype("<f2").tobytes(),
        "F32": raw.tobytes,
    }[dtype]()
    return dtype, raw.shape, data


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return bf16(0.02 * np.random.default_rng(seed).standard_normal(shape))


def statistics_of(
    folder: Path, tensors: dict[str, Tensor], config: Any = None, **options: Any
) -> dict[str, Any]:
    """The account of a model of these tensors; it must survive JSON."""
    model = make_model(folder, {"model.safetensors": tensors}, config=config or CONFIG)
    account = inspect_outliers(open_checkpoint(model), Ascend(), **options)
    assert json.loads(json.dumps(account, allow_nan=False)) == account
    return account


def of_one(folder: Path, values: np.ndarray, dtype: str = "BF16", **options: Any) -> dict[str, Any]:
    (module,) = statistics_of(folder, {"a.weight": stored(values, dtype)}, **options)["modules"]
    return module


def up_to_bf16(scale: np.ndarray) -> np.ndarray:
    """The next bfloat16 that is not below."""
    cut = bf16(scale)
    return np.where(cut < scale, (cut.view("<u4") + 0x10000).view("<f4"), cut)


def int8_db(w: np.ndarray) -> float:
    scale = up_to_bf16(np.abs(w).max(-1, keepdims=True) / np.float32(127 + 63 / 128))
    error = (np.rint(w / scale) * scale).astype(np.float64) - w
    return 10 * math.log10((w.astype(np.float64) ** 2).sum() / (error**2).sum())


def int4_db(w: np.ndarray) -> float:
    """With a scale that clips nothing."""
    scale = np.maximum(np.abs(w).max(-1, keepdims=True) / np.float32(7), np.finfo("f4").tiny)
    error = (np.rint(w / scale) * scale).astype(np.float64) - w
    return 10 * math.log10((w.astype(np.float64) ** 2).sum() / (error**2).sum())


def fp8_db(w: np.ndarray) -> float:
    return e4m3_db(w, np.abs(w).max(-1, keepdims=True) / np.float32(448))


def mxfp8_db(w: np.ndarray) -> float:
    k = w.shape[1]
    amax = [np.abs(w[:, start : start + 32]).max(-1) for start in range(0, k, 32)]
    powers = np.exp2(np.ceil(np.log2(np.stack(amax, -1).astype(np.float64) / 448))).astype("<f4")
    return e4m3_db(w, powers.repeat(32, -1)[:, :k])


def e4m3_db(w: np.ndarray, scale: np.ndarray) -> float:
    ratio = (w / scale).astype(np.float64)
    _, exponent = np.frexp(ratio)
    step = np.exp2(np.maximum(exponent - 1, -6) - 3)  # three bits of mantissa; subnormals below 2^-6
    error = np.rint(ratio / step) * step * scale.astype(np.float64) - w
    return 10 * math.log10((w.astype(np.float64) ** 2).sum() / (error**2).sum())


def expected(w: np.ndarray) -> dict[str, Any]:
    """The same numbers by other means: whole arrays, two passes."""
    x = w.astype(np.float64)
    centred = x - x.mean()
    columns = np.sqrt((x**2).mean(0))
    return {
        "amax_over_rms": np.abs(x).max() / np.sqrt((x**2).mean()),
        "kurtosis": (centred**4).mean() / (centred**2).mean() ** 2 - 3,
        "channel_ratio": columns.max() / np.median(columns[columns > 0]),
        "channel": columns.argmax(),
    }


def check(module: dict[str, Any], w: np.ndarray) -> None:
    assert {key: module[key] for key in expected(w)} == pytest.approx(expected(w), rel=1e-9, abs=1e-12)
    shown = dict(module["sqnr_db"])
    int4 = shown.pop(INT4)
    assert shown.pop(GROUPS) >= int4
    assert 15 < shown.pop(FP4) < shown[MXFP8]
    assert shown == pytest.approx({FP8: fp8_db(w), INT8: int8_db(w), MXFP8: mxfp8_db(w)}, abs=1e-4)
    # at least what a scale of amax / 7 gives, and no more than a tenth of the steps can
    assert int4_db(w) - 1e-4 <= int4 < shown[INT8] - 15
    assert module["not_finite"] is None


@pytest.mark.parametrize("block", [1, 200, 10**6])
@pytest.mark.parametrize("shape", [(48, 40), (7, 33), (1, 5), (5, 1)])
def test_numbers_are_those_of_independent_formulas(
    tmp_path: Path, shape: tuple[int, int], block: int
) -> None:
    w = normal(*shape)
    w[:, 2 % shape[1]] *= 4
    module = of_one(tmp_path, w, block_elements=block)
    assert (module["module"], module["shape"]) == ("a", list(shape))
    if shape[1] == 1:  # each row is its largest weight: only the scale's own rounding is left
        assert module["channel_ratio"] == 1
        assert module["sqnr_db"][INT8] > 45
    else:
        check(module, w)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_every_float_dtype(tmp_path: Path, dtype: str) -> None:
    w = normal(16, 24)
    check(of_one(tmp_path, w.astype("<f2").astype("<f4") if dtype == "F16" else w, dtype), bf16(w))


def test_moments_do_not_cancel_far_from_zero(tmp_path: Path) -> None:
    w = (1000 + np.random.default_rng(3).laplace(size=(64, 50))).astype("<f4")
    module = of_one(tmp_path, w, "F32", block_elements=500)
    assert module["kurtosis"] == pytest.approx(expected(w)["kurtosis"], rel=1e-9)
    assert module["kurtosis"] > 1.5  # that of a Laplace distribution is 3


def test_normal_weights_have_no_excess_kurtosis_and_uniform_ones_less(tmp_path: Path) -> None:
    assert of_one(tmp_path / "n", normal(400, 500))["kurtosis"] == pytest.approx(0, abs=0.05)
    uniform = np.random.default_rng(0).uniform(-1, 1, (400, 500)).astype("<f4")
    assert of_one(tmp_path / "u", uniform, "F32")["kurtosis"] == pytest.approx(-1.2, abs=0.01)


def test_workers_change_no_bit_and_blocks_hardly_any(tmp_path: Path) -> None:
    tensors = {f"l.{i}.a.weight": stored(normal(30 + i, 20, seed=i)) for i in range(7)}
    one = statistics_of(tmp_path / "1", tensors, workers=1, block_elements=100)
    for workers in (2, 5):
        again = statistics_of(tmp_path / str(workers), tensors, workers=workers, block_elements=100)
        assert again["modules"] == one["modules"]
    for block in (1, 60, 10**6):
        other = statistics_of(tmp_path / f"b{block}", tensors, block_elements=block)
        for a, b in zip(one["modules"], other["modules"], strict=True):
            assert a.pop("sqnr_db") == pytest.approx(b.pop("sqnr_db"), rel=1e-12)
            for key, value in a.items():
                assert b[key] == (
                    pytest.approx(value, rel=1e-10) if isinstance(value, float) else value
                )
        one = statistics_of(tmp_path / "1", tensors, workers=1, block_elements=100)


@pytest.mark.parametrize("kind", ["column", "element in every row"])
def test_a_planted_outlier_is_ranked_first(tmp_path: Path, kind: str) -> None:
    matrices = {f"l.{i}.a": normal(64, 256, seed=i) for i in range(6)}
    if kind == "column":
        matrices["l.4.a"][:, 101] *= 64
    else:
        matrices["l.4.a"][np.arange(64), np.arange(64) * 3] = 1.5
    tensors = {f"{name}.weight": stored(w) for name, w in matrices.items()}
    account = statistics_of(tmp_path, tensors)
    worst, *others = account["modules"]
    assert worst["module"] == "l.4.a"
    assert account["ranked_by"] == INT8
    decibels = [m["sqnr_db"][INT8] for m in account["modules"]]
    assert decibels == sorted(decibels)
    assert decibels[0] < decibels[1] - 6
    assert worst["amax_over_rms"] > 3 * max(m["amax_over_rms"] for m in others)
    assert worst["kurtosis"] > 50 > max(m["kurtosis"] for m in others)
    if kind == "column":
        assert worst["channel"] == 101
        assert worst["channel_ratio"] == pytest.approx(64, rel=0.2)
    assert account["advice"]["match"] == ["l.4.a"]
    # a scale in every code: fp8 does not care
    assert worst["sqnr_db"][FP8] > min(m["sqnr_db"][FP8] for m in others) - 1


def test_zeros_are_stored_exactly_and_have_no_ratios(tmp_path: Path) -> None:
    module = of_one(tmp_path, np.zeros((4, 6), "<f4"))
    assert module == {
        "module": "a", "shape": [4, 6], "amax_over_rms": None, "kurtosis": None, "channel_ratio": None,
        "channel": None, "not_finite": None,
        "sqnr_db": dict.fromkeys([FP8, MXFP8, *FOUR, INT8], 200.0),
    }  # fmt: skip


def test_equal_weights_have_no_kurtosis(tmp_path: Path) -> None:
    module = of_one(tmp_path, bf16(np.full((9, 7), 0.3)), block_elements=14)
    assert module["kurtosis"] is None
    assert (module["amax_over_rms"], module["channel_ratio"]) == pytest.approx((1, 1))


def test_dead_columns_are_left_out_of_the_median(tmp_path: Path) -> None:
    w = np.zeros((2, 9), "<f4")
    w[:, 3:7] = [[1, 2, 4, 16], [-1, 2, -4, 16]]
    module = of_one(tmp_path, w)
    assert (module["channel"], module["channel_ratio"]) == (6, pytest.approx(16 / 3))


@pytest.mark.parametrize("block", [1, 10**6])
@pytest.mark.parametrize(("value", "name"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_nan_and_inf_are_named_and_come_first(
    tmp_path: Path, value: float, name: str, block: int
) -> None:
    w = normal(12, 10)
    w[7, 4] = w[7, 6] = w[9, 0] = value
    tensors = {"good.weight": stored(normal(3, 3)), "bad.weight": stored(w)}
    bad, good = statistics_of(tmp_path, tensors, block_elements=block)["modules"]
    assert bad == {
        "module": "bad", "shape": [12, 10], "amax_over_rms": None, "kurtosis": None,
        "channel_ratio": None, "channel": None,
        "sqnr_db": dict.fromkeys([FP8, MXFP8, *FOUR, INT8]),
        "not_finite": {"value": name, "index": [7, 4]},
    }  # fmt: skip
    assert good["module"] == "good"


def test_the_largest_float32_is_no_inf(tmp_path: Path) -> None:
    w = normal(4, 4)
    w[1, 1] = np.finfo("<f4").max
    module = of_one(tmp_path, w, "F32")
    assert module["not_finite"] is None
    assert module["amax_over_rms"] == pytest.approx(4)


def test_a_scale_that_overflows_in_float16_is_the_worst_of_all(tmp_path: Path) -> None:
    w = normal(4, 4)
    w[2, 3] = 1e8
    found = {}
    for dtype in ("float16", "bfloat16"):
        found[dtype] = of_one(tmp_path / dtype, w, config={"torch_dtype": dtype})["sqnr_db"]
    assert found["float16"][INT8] == -200
    assert found["bfloat16"][INT8] > 20
    assert found["float16"][FP8] == found["bfloat16"][FP8]  # its scales are held in float32


def test_stacked_experts_are_the_rows_of_all(tmp_path: Path) -> None:
    w = normal(3, 8, 12)
    stacked = {"l.0.mlp.experts.down_proj": stored(w)}
    (module,) = statistics_of(tmp_path / "3", stacked, block_elements=60)["modules"]
    assert (module["module"], module["shape"]) == ("l.0.mlp.experts.down_proj", [3, 8, 12])
    check(module, w.reshape(24, 12))
    w[2, 5, 11] = math.nan
    stacked = {"l.0.mlp.experts.down_proj": stored(w)}
    (module,) = statistics_of(tmp_path / "nan", stacked, block_elements=60)["modules"]
    assert module["not_finite"] == {"value": "nan", "index": [2, 5, 11]}


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    tensors = {
        "l.0.up.weight": stored(normal(4, 4)),
        "l.0.up.bias": tensor("BF16", 4),
        "l.0.norm.weight": tensor("BF16", 4),
        "l.1.norm.weight": tensor("BF16", 4),
        "conv.weight": tensor("BF16", 4, 1, 3),
        "table": tensor("F32", 4, 4),
        "wide.weight": tensor("F64", 4, 4),
        "none.weight": tensor("BF16", 0, 4),
    }
    account = statistics_of(tmp_path, tensors)
    assert [m["module"] for m in account["modules"]] == ["l.0.up"]
    assert account["left_out"] == [
        {"why": "empty", "tensors": 1, "names": ["none"]},
        {
            "why": "no weight matrix",
            "tensors": 5,
            "names": ["conv", "l.{0..1}.norm", "l.0.up.bias", "table"],
        },
        {"why": "not bfloat16, float16 or float32", "tensors": 1, "names": ["wide"]},
    ]


def test_a_model_without_matrices(tmp_path: Path) -> None:
    account = statistics_of(tmp_path, {"norm.weight": tensor("BF16", 4)})
    assert (account["modules"], account["advice"]) == ([], None)


def test_operands_name_every_scheme_that_stores_weights_so(tmp_path: Path) -> None:
    account = statistics_of(tmp_path, {"a.weight": stored(normal(4, 4))})
    assert account["operands"] == {
        FP8: ["fp8_dynamic"],
        MXFP8: ["mxfp8"],
        INT4: ["w4a4_dynamic"],
        GROUPS: ["w4a16", "w4a8"],
        FP4: ["mxfp4", "mxfp4_fp8", "mxfp4a16"],
        INT8: ["w8a16", "w8a8_dynamic", "w8a8_mix", "w8a8_static"],
    }


def test_quantized_and_transposed_models_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="already quantized: unnamed, I8, 1 module") as caught:
        statistics_of(tmp_path / "q", {"a.weight": tensor("I8", 4, 4)})
    assert caught.value.fix == "start from the float checkpoint (bfloat16, float16 or float32)"
    with pytest.raises(InputError, match="weights of `gpt2` are stored transposed"):
        statistics_of(tmp_path / "t", {"a.weight": tensor("F32", 4, 4)}, {"model_type": "gpt2"})


class Heard(Progress):
    """Progress that remembers; its lock is that of any watcher, as workers call it."""

    def __init__(self) -> None:
        self.ahead: tuple[int, int] = (0, 0)
        self.read = 0
        self.shards: list[tuple[str, int]] = []
        self._lock = threading.Lock()

    def begin(self, nbytes: int, shards: int) -> None:
        self.ahead = nbytes, shards

    def advance(self, nbytes: int) -> None:
        with self._lock:
            self.read += nbytes

    def shard(self, file: str, nbytes: int, reused: bool) -> None:
        self.shards.append((file, nbytes))


def test_progress_counts_every_byte_once(tmp_path: Path) -> None:
    w = normal(10, 10)
    w[3, 3] = math.nan  # what is not read counts as done
    shards = {
        "a.safetensors": {"a.weight": stored(w), "n.weight": tensor("BF16", 5)},
        "b.safetensors": {"b.weight": stored(normal(6, 5)), "c.weight": stored(normal(2, 5), "F32")},
        "c.safetensors": {"norm.weight": tensor("BF16", 5)},
    }
    model = make_model(tmp_path, shards, config=CONFIG, index=True)
    heard = Heard()
    inspect_outliers(open_checkpoint(model), Ascend(), progress=heard, block_elements=20)
    assert heard.ahead == (300, 2)
    assert heard.read == 300
    assert heard.shards == [("a.safetensors", 200), ("b.safetensors", 100)]


def test_a_file_that_shrinks_is_an_error_that_names_it(tmp_path: Path) -> None:
    tensors = {f"l.{i}.a.weight": stored(normal(8, 8)) for i in range(9)}
    checkpoint = open_checkpoint(make_model(tmp_path, {"model.safetensors": tensors}, config=CONFIG))
    file = checkpoint.path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(MachineError, match="file became shorter") as caught:
        inspect_outliers(checkpoint, Ascend(), workers=2)
    assert caught.value.where == str(file)
    assert torch.get_num_threads() >= 1


def module(name: str, sqnr: float | None, **more: Any) -> dict[str, Any]:
    return {"module": name, "shape": [4, 4], "sqnr_db": {INT8: sqnr}, "not_finite": None, **more}


def test_rank_keeps_the_order_of_equals() -> None:
    damaged = module("d", None, not_finite={"value": "nan", "index": [0, 0]})
    modules = [module("a", 40.0), module("b", 200.0), damaged, module("c", 40.0), module("e", -200.0)]
    assert [m["module"] for m in rank(modules)] == ["d", "e", "a", "c", "b"]


def kind(values: list[float], name: str = "l.{}.down_proj") -> list[dict[str, Any]]:
    return [module(name.format(i), value) for i, value in enumerate(values)]


@pytest.mark.parametrize(
    ("values", "kept"),
    [
        ([40, 41, 42, 43], []),
        ([40, 40, 40, 34], []),  # just the margin
        ([40, 40, 40, 33.9], ["l.3.down_proj"]),
        ([20, 40, 40, 10], ["l.3.down_proj", "l.0.down_proj"]),
        ([20, 20, 20, 40], []),  # poor, but all of them are
        ([20], []),
        ([30, 45], ["l.0.down_proj"]),
    ],
)
def test_advice_is_for_what_is_far_below_its_kind(values: list[float], kept: list[str]) -> None:
    advice = keep_advice(rank([*kind(values), module("lm_head", 5.0)]))
    assert (advice["match"] if advice else []) == kept
    if advice:
        assert advice["margin_db"] == MARGIN_DB == 6
        first = advice["far_below"][0]
        assert (first["module"], first["kind"]) == (kept[0], "l.*.down_proj")
        assert first["median_db"] == pytest.approx(np.median(values))
        assert first["sqnr_db"] == min(values)
        quoted = "".join(f'      - "{name}"\n' for name in kept)
        assert advice["yaml"] == f"  - match:\n{quoted}    scheme: keep\n"


def test_kinds_have_medians_of_their_own() -> None:
    modules = kind([30, 30, 30]) + kind([40, 40, 31], "l.{}.up_proj")
    advice = keep_advice(rank(modules))
    assert advice is not None
    assert [entry["module"] for entry in advice["far_below"]] == ["l.2.up_proj"]


def test_damaged_modules_count_in_no_median() -> None:
    damaged = module("l.9.down_proj", None, not_finite={"value": "nan", "index": [0, 0]})
    assert keep_advice(rank([*kind([40, 40, 40]), damaged])) is None


def test_advice_takes_along_what_the_engine_merges() -> None:
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    modules = [module(f"l.{i}.self_attn.{name}", 40.0) for i in range(3) for name in names]
    modules[4]["sqnr_db"] = {INT8: 30.0}  # l.1.self_attn.q_proj
    modules[5]["sqnr_db"] = {INT8: 29.0}
    advice = keep_advice(rank(modules))
    assert advice is not None
    assert advice["match"] == [f"l.1.self_attn.{name}" for name in ("k_proj", "q_proj", "v_proj")]
    assert advice["modules"] == advice["match"]
    assert [entry["module"] for entry in advice["far_below"]] == [
        "l.1.self_attn.k_proj",
        "l.1.self_attn.q_proj",
    ]


def test_advice_takes_the_experts_of_a_layer_together() -> None:
    modules = [
        module(f"l.{i}.mlp.experts.{e}.{name}", 40.0)
        for i in range(2)
        for e in range(3)
        for name in ("gate_proj", "up_proj", "down_proj")
    ]
    modules[10]["sqnr_db"] = {INT8: 20.0}
    advice = keep_advice(rank(modules))
    assert advice is not None
    assert advice["match"] == ["l.1.mlp.experts.*"]
    assert len(advice["modules"]) == 9


def test_patterns_match_nothing_but_their_module() -> None:
    names = ["l.0.a[b]*", "l.1.a[b]*", "l.2.a[b]*"]
    advice = keep_advice(rank([module(name, 40.0 - 20 * (i == 1)) for i, name in enumerate(names)]))
    assert advice is not None
    assert advice["match"] == ["l.1.a[[]b][*]"]


def judged(*levels, damaged=0):
    modules = [
        {"module": f"layers.{i}.q", "sqnr_db": {"int8 per channel": level}, "not_finite": None}
        for i, level in enumerate(levels)
    ]
    modules += [
        {"module": "bad", "sqnr_db": {"int8 per channel": None}, "not_finite": {"value": "nan"}}
    ] * damaged
    return verdict(modules, keep_advice(modules))


@pytest.mark.parametrize(
    ("found", "hard", "what"),
    [
        (judged(40.0, 41.0, 39.0), False,
         "not hard to quantize: of 3 weights the worst keeps 39.0 dB in int8 per channel"),
        (judged(40.0, 41.0, 30.0), True,
         "hard in places: 1 of 3 weights loses far more in int8 per channel than others of its kind"),
        (judged(19.9, 19.0, 20.0), True,
         "hard to quantize: 2 of 3 weights keep less than 20 dB in int8 per channel"),
        (judged(21.0, 19.0, 20.0), True,
         "hard to quantize: 1 of 3 weights keeps less than 20 dB in int8 per channel"),
        (judged(40.0, damaged=1), True, "damaged: 1 of 2 weights holds NaN or Inf"),
        (judged(), False, "there are no weights to quantize"),
    ],
)  # fmt: skip
def test_the_verdict(found, hard, what):
    assert found == {"hard": hard, "what": what}


def test_the_least_is_what_verify_expects():
    from quantcli.schemes.w8a16 import W8A16
    from quantcli.verification.compare import bounds_of

    assert bounds_of(W8A16().numerics.weight).sqnr_db == LEAST_DB
