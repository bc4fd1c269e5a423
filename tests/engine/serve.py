"""Serves checkpoints with vLLM on the CPU and writes down what it answers, or why it does not.

    python serve.py REQUEST.json ANSWERS.json

Runs in the engine's own environment, which has no quantcli: it imports nothing of this project.
REQUEST: {"checkpoints": {name: folder}, "windows": [[token, ...], ...], "prompts": [[token, ...], ...],
"tokens": how many to generate for a prompt, "length": most tokens of a window, or of a prompt and what
is generated, "cpu": "pinned" (see pin), "listed" (pinned, on a CPU that lists AMX: see listed.py) or
"own" (what vLLM chooses here), "untracked": names of checkpoints that may leave parameters empty, as
far as vLLM can tell}. ANSWERS, by name: {"log_probs": of each token of each window but the
first, "best": the engine's likeliest token there, "continued": the prompts' tokens to come, "again":
the same a second time, "texts": the first of both as text where there is a tokenizer, "kernels": what
computes the linears, "stand_ins": which of stand_ins.py were needed, "libraries": vLLM's own that are
loaded, "seconds"} or {"error": words}.
"""

import gc
import json
import os
import sys
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {
    # the models are tiny: on a busy machine threads wait for each other longer than they compute
    "OMP_NUM_THREADS": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two engines at a time must not take the same core
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process: nothing is left behind, errors arrive here
    "VLLM_CPU_INT4_W4A8": "0",  # with AMX, int4 weights would else be given int8 inputs
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "TORCHDYNAMO_DISABLE": "1",  # compiling the sampler takes longer than all of the serving
}
CACHE = 2**28  # bytes for keys and values: eight windows need less, and vLLM fills all of it with zeros


def pin() -> None:
    """Make every CPU answer alike: AVX-512 with VNNI, and nothing newer. Before vLLM is imported.

    Without VNNI oneDNN halves int8 weights, so that sums fit 16 bits. With AMX vLLM computes some
    formats in another way (docs/engines.md); and where the CPU lists AMX but the system does not grant
    it, the first such instruction ends the process.
    """
    import torch

    torch.cpu._is_amx_tile_supported = lambda: False
    # of vLLM's three libraries this leaves the one with AVX-512 and no AMX instruction in it
    torch.cpu._is_avx512_bf16_supported = lambda: False
    os.environ["ONEDNN_MAX_CPU_ISA"] = "AVX512_CORE_VNNI"  # that of the products of bfloat16 and int8
    # torch asks the CPU itself, and gives fp8 products to oneDNN if AMX is listed. oneDNN has kernels
    # for them if AMX also multiplies float16, else a reference that takes minutes here, or nothing
    torch.backends.mkldnn.set_flags(False)


def forget_imports() -> None:
    """Let Python's garbage collector pass over all that was imported, 600 000 objects.

    vLLM has it look through everything several times for each model, which takes longer than serving
    one; and makes it look again at what is frozen here, so neither of both may do anything.
    """
    from vllm import LLM  # noqa: F401
    from vllm.v1.engine import core

    core.freeze_gc_heap = lambda: None
    gc.collect()
    gc.freeze()
    gc.unfreeze = lambda: None


def libraries() -> list:
    """The names of vLLM's own compiled libraries that this process has loaded."""
    files = {Path(line.split()[-1]) for line in Path("/proc/self/maps").read_text().splitlines()}
    return sorted(file.name.split(".")[0] for file in files if file.match("vllm/_C*.so"))


def kernels(llm) -> dict:
    """How many linears each kernel computes, by the names of vLLM's classes."""
    runner = llm.llm_engine.model_executor.driver_worker.worker.model_runner
    found: Counter = Counter()
    for module in runner.model.modules():
        method = getattr(module, "quant_method", None)
        if method is None:
            continue
        scheme = getattr(module, "scheme", None) or method
        inner = [getattr(scheme, name, None) for name in ("kernel", "fp8_linear", "linear_kernel")]
        inner += [getattr(method, name, None) for name in ("experts_cls", "moe_kernel")]
        names = [type(part).__name__ for part in (method, scheme, *inner) if part is not None]
        found[" > ".join(dict.fromkeys(names))] += 1
    return dict(found)


def answer(folder: str, request: dict, tracked: bool) -> dict:
    """What vLLM makes of one checkpoint. tracked: vLLM refuses one that leaves a parameter empty."""
    import stand_ins
    from vllm import LLM, SamplingParams

    stand_ins.used.clear()
    windows, prompts = request["windows"], request["prompts"]
    started = time.perf_counter()
    llm = LLM(
        model=folder,
        skip_tokenizer_init=not (Path(folder) / "tokenizer.json").exists(),
        dtype="bfloat16",
        enforce_eager=True,
        max_model_len=request["length"],
        max_num_seqs=8,
        kv_cache_memory_bytes=CACHE,
        enable_prefix_caching=False,
        # without it vLLM leaves a quantized parameter that no tensor fills as the memory was
        model_loader_extra_config={"enable_weights_track": tracked},
    )
    read = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
    log_probs, best = [], []
    for ids, output in zip(windows, llm.generate(_tokens(windows), read, use_tqdm=False), strict=True):
        steps = output.prompt_logprobs[1:]
        log_probs.append([step[token].logprob for step, token in zip(steps, ids[1:], strict=True)])
        best.append([next(t for t, found in step.items() if found.rank == 1) for step in steps])
    greedy = SamplingParams(max_tokens=request["tokens"], temperature=0, ignore_eos=True)
    first, again = (
        [output.outputs[0] for output in llm.generate(_tokens(prompts), greedy, use_tqdm=False)]
        for _ in range(2)
    )
    return {
        "log_probs": log_probs,
        "best": best,
        "continued": [list(one.token_ids) for one in first],
        "again": [list(one.token_ids) for one in again],
        "texts": [one.text for one in first],
        "kernels": kernels(llm),
        "stand_ins": sorted(stand_ins.used),
        "libraries": libraries(),
        "seconds": time.perf_counter() - started,
    }


def _tokens(prompts: list[list[int]]) -> list[dict]:
    return [{"prompt_token_ids": ids} for ids in prompts]


def main() -> None:
    """Serve one checkpoint after the other: importing vLLM takes longer than serving a few."""
    request = json.loads(Path(sys.argv[1]).read_text())
    if request["cpu"] == "listed":
        import listed

        listed.list_amx()
    if request["cpu"] != "own":
        pin()
    import stand_ins
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    stand_ins.install()
    forget_imports()
    answers = {}
    for name, folder in request["checkpoints"].items():
        try:
            answers[name] = answer(folder, request, name not in request["untracked"])
        except Exception as error:
            traceback.print_exc()
            answers[name] = {"error": f"{type(error).__name__}: {error}"}
        cleanup_dist_env_and_memory()
        gc.collect()
        Path(sys.argv[2]).write_text(json.dumps(answers))
        print(name, answers[name].get("error", "served"), file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()
