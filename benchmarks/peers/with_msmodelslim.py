"""with_msmodelslim.py MODEL SOURCE WINDOWS TEXT OUT: train FlatQuant of msmodelslim on the CPU.

SOURCE is a checkout of github.com/Ascend/msmodelslim, its folder `config` linked into its package, as
its installation does. Its command line needs an NPU, so this runs what it trains with:
`FlatQuantProcessor` with its own settings (10 epochs, 4 samples a step, float32), layer by layer, on
float inputs, over the places that its adapter for Qwen3 names. WINDOWS and TEXT are JSON
lists of token ids, one list per sample: what is trained on, and what is judged.

Writes the JSON document OUT: CPU seconds of the process until all layers are trained, imports and
loading included; the log-probability of each token of TEXT but the first of a window, with every
linear of the decoder at 4 bits (`all`), and with o_proj and down_proj rolled back and float (`some`; by
default it gives those 8 bits).
"""

import json
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor, nn


def main(model: str, source: str, windows: str, text: str, out: str) -> None:
    """Train, then judge."""
    sys.path.insert(0, source)
    from msmodelslim.core.base.protocol import BatchProcessRequest
    from msmodelslim.model.qwen3.model_adapter import Qwen3ModelAdapter
    from msmodelslim.processor.flat_quant import FlatQuantProcessor, FlatQuantProcessorConfig
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(model, torch_dtype=torch.float32).eval()
    samples = torch.tensor(json.loads(Path(windows).read_text()))
    places = Qwen3ModelAdapter.get_flatquant_subgraph(SimpleNamespace(config=loaded.config))
    adapter = SimpleNamespace(get_flatquant_subgraph=lambda: places)
    states, more = inputs(loaded, samples)
    trained = []
    for number, layer in enumerate(loaded.model.layers):
        config = FlatQuantProcessorConfig(type="flatquant", include=["*"], exclude=[])
        processor = FlatQuantProcessor(loaded, config, adapter)
        datas = [((state,), more) for state in states]
        request = BatchProcessRequest(f"model.layers.{number}", layer, datas)
        with torch.no_grad():
            processor.preprocess(request)
        processor.process(request)
        states = [output.detach() for output in processor.float_output]
        trained.append((processor.layer_quantizer, f"model.layers.{number}", layer))
    found: dict[str, object] = {"cpu": time.process_time(), "all": scores(loaded, Path(text))}
    for manager, name, layer in trained:
        for module in ("self_attn.o_proj", "mlp.down_proj"):
            manager.rollback_trans(f"{name}.{module}")
            layer.get_submodule(module).change_mode("org")
    found["some"] = scores(loaded, Path(text))
    Path(out).write_text(json.dumps(found))


def inputs(model: nn.Module, samples: Tensor) -> tuple[list[Tensor], dict[str, object]]:
    """What the first layer is given: a hidden state [1, length, hidden] a sample; keyword arguments."""
    states: list[Tensor] = []
    more: dict[str, object] = {}

    def keep(module: nn.Module, given: tuple[Tensor, ...], named: dict[str, object]) -> None:
        states.append(given[0].detach())
        more.update(named)

    handle = model.model.layers[0].register_forward_pre_hook(keep, with_kwargs=True)
    with torch.no_grad():
        for sample in samples:
            model(sample[None], use_cache=False)
    handle.remove()
    return states, more


def scores(model: nn.Module, text: Path) -> list[list[float]]:
    """Log-probabilities, a list for each window."""
    found = []
    with torch.no_grad():
        for window in torch.tensor(json.loads(text.read_text())):
            logits = model(window[None], use_cache=False).logits[0, :-1].float()
            picked = logits.log_softmax(-1).gather(-1, window[1:, None])
            found.append(picked[:, 0].tolist())
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
