"""The commands that serve a checkpoint, with the flags for what config.json does not say."""

from __future__ import annotations

import json
import shlex

import pytest

from quantcli.checkpoint.config.settings import Settings
from quantcli.checkpoint.detect import Draft
from quantcli.core.numerics import CACHES
from quantcli.core.registry import discover
from quantcli.targets.base import Target
from quantcli.targets.serving import TARGET_MODEL, Served


def commands(target, *labels, model="OUT", options=None, **facts):
    served = Served(frozenset(labels), Settings(facts.pop("config", {})), **facts)
    found = discover(Target)[target].model_validate(options or {}).serve(served, model)
    return {command.engine: command.text for command in found}


SGLANG = "python3 -m sglang.launch_server --model-path OUT"


@pytest.mark.parametrize(
    ("target", "labels", "lines"),
    [
        ("ascend", ["W8A8_DYNAMIC"], {"vLLM-Ascend": "vllm serve OUT --quantization ascend"}),
        ("compressed-tensors", ["int8 W8A8 dynamic"],
         {"vLLM, vLLM-Ascend": "vllm serve OUT", "SGLang": SGLANG}),
        # vLLM-Ascend has it for experts alone
        ("compressed-tensors", ["g128 W4A16"], {"vLLM": "vllm serve OUT", "SGLang": SGLANG}),
        ("fp8", ["fp8 block 128x128"], {"vLLM": "vllm serve OUT", "SGLang": SGLANG}),
        ("gptq", ["int4 g128"], {"vLLM": "vllm serve OUT", "SGLang": SGLANG}),
        ("modelopt", ["FP8"],
         {"vLLM": "vllm serve OUT", "SGLang": f"{SGLANG} --quantization modelopt_fp8",
          "TensorRT-LLM": "trtllm-serve OUT"}),
        ("modelopt", ["NVFP4"],
         {"vLLM": "vllm serve OUT", "SGLang": f"{SGLANG} --quantization modelopt_fp4",
          "TensorRT-LLM": "trtllm-serve OUT"}),
        # one flag of SGLang is for one algorithm
        ("modelopt", ["FP8", "NVFP4"],
         {"vLLM": "vllm serve OUT", "TensorRT-LLM": "trtllm-serve OUT"}),
        ("modelopt", ["MXFP8"], {"vLLM, vLLM-Ascend": "vllm serve OUT"}),
        ("modelopt", ["a label of nobody"], {"vLLM": "vllm serve OUT"}),
    ],
)  # fmt: skip
def test_each_engine_that_loads_all_labels(target, labels, lines):
    assert commands(target, *labels) == lines


def test_a_cache_of_fp8_needs_a_flag_if_the_config_cannot_declare_it():
    label = "fp8 tensor static"
    assert commands("fp8", label, cache=CACHES["fp8"]) == {
        "vLLM": "vllm serve OUT --kv-cache-dtype fp8"
    }
    assert commands("modelopt", "FP8", cache=CACHES["fp8"]) == {
        "vLLM": "vllm serve OUT", "TensorRT-LLM": "trtllm-serve OUT"
    }  # fmt: skip
    assert commands("compressed-tensors", "int8 W8A8 dynamic", cache=CACHES["fp8"]) == {
        "vLLM, vLLM-Ascend": "vllm serve OUT"
    }


def test_transforms_for_one_tensor_parallel_size_are_served_with_it():
    line = commands("ascend", "W4A4_FLATQUANT_DYNAMIC", options={"tp": 2})["vLLM-Ascend"]
    assert line == "vllm serve OUT --quantization ascend --tensor-parallel-size 2"


def test_code_of_the_checkpoint_needs_leave_and_is_pointed_out():
    config = {"auto_map": {"AutoModel": "modeling_x.X"}}
    found = commands("modelopt", "FP8", config=config)
    assert [line.rpartition(" ")[2] for line in found.values()] == [
        "--trust-remote-code", "--trust-remote-code", "--trust_remote_code"
    ]  # fmt: skip
    served = Served(frozenset({"W8A8"}), Settings(config))
    (command,) = discover(Target)["ascend"]().serve(served, "OUT")
    assert "Python code of its own" in (command.note or "")


@pytest.mark.parametrize(
    ("kind", "method"),
    [("EAGLE3", "eagle3"), ("P-EAGLE", "eagle3"), ("EAGLE", "eagle"), ("DFlash", "dflash")],
)
def test_a_draft_is_served_next_to_the_model_that_it_is_for(kind, method):
    found = commands("compressed-tensors", "fp8 W8A8 channel", model="a b", draft=Draft(kind, "X"))
    (line,) = found.values()
    *words, flag, speculation = shlex.split(line)
    assert words == ["vllm", "serve", TARGET_MODEL]
    assert flag == "--speculative-config"
    assert json.loads(speculation) == {"model": "a b", "num_speculative_tokens": 3, "method": method}


def test_names_are_quoted_for_a_shell():
    name = "a b'; rm -rf ~ #\n$(x)"
    for target, label in (("ascend", "W8A8"), ("modelopt", "FP8"), ("fp8", "fp8 tensor static")):
        for line in commands(target, label, model=name).values():
            assert name in shlex.split(line)
