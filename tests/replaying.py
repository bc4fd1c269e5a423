"""A replay for tests: batches, hidden states in memory, and every layer in turn."""

from __future__ import annotations

from contextlib import contextmanager
from pathlib import Path

import torch

from quantcli.calibration.replay.replay import Replay
from quantcli.calibration.replay.skeleton import Skeleton
from quantcli.calibration.text.dataset import Batch
from quantcli.calibration.text.tokenizer import quiet
from quantcli.checkpoint.checkpoint import open_checkpoint
from quantcli.checkpoint.tensors import read_tensor
from quantcli.planning.reach import next_token_layer
from quantcli.sources.decode import decoded

CPU = torch.device("cpu")


class Memory(dict):
    """Hidden states, and what is carried next to them, by batch."""

    def __init__(self, states=None):
        super().__init__(states or {})
        self.carries = dict(states.carries) if states else {}

    def get(self, batch):
        return self[batch]

    def carried(self, batch):
        return self.carries[batch]

    def put(self, batch, hidden, carry):
        self[batch], self.carries[batch] = hidden, carry


def make_batches(vocabulary=128, *, padded=True, seed=0):
    """Two batches without padding, of different shapes, and one that is padded on the right."""
    generator = torch.Generator().manual_seed(seed)

    def ids(*shape):
        return torch.randint(3, vocabulary, shape, generator=generator)

    batches = [Batch(ids(2, 20), None), Batch(ids(3, 13), None)]
    if padded:
        mask = torch.ones(3, 17, dtype=torch.bool)
        mask[0, 9:] = False
        mask[2, 4:] = False
        batches.append(Batch(ids(3, 17), mask))
    return batches


class Replayed:
    """A model's layers run over batches, from disk."""

    def __init__(
        self,
        path: Path,
        batches,
        *,
        dtype="BF16",
        workers=2,
        read=read_tensor,
        next_token=False,
        changed=lambda checkpoint: checkpoint,
    ):
        """changed: gives the checkpoint with other tensors."""
        checkpoint = changed(decoded(open_checkpoint(path)))
        layer = next_token_layer(checkpoint) if next_token else None
        self.skeleton = Skeleton(checkpoint, dtype, trust_remote_code=False, next_token=layer)
        self.replay = Replay(self.skeleton, batches, device=CPU, workers=workers, read=read)
        self.read = read
        self.states = Memory()
        self.replay.begin(self.states.put)

    def layers(self, taps=None):
        """Run all layers; `taps(index, layer)` is the tap of a layer."""
        for index in range(len(self.skeleton.layers)):
            if index in [stack.start for stack in self.skeleton.stacks[1:]]:
                final, self.states = self.states, Memory()
                self.replay.onward(self.states.put, final)
            self.layer(index, taps)

    def layer(self, index, taps=None):
        after = Memory()
        with self.skeleton.loaded(index, self.read, CPU) as layer:
            tap = None if taps is None else taps(index, layer)
            self.replay.run(index, layer, self.states, after.put, tap)
        self.states = after

    def logits(self):
        return list(self.replay.endings(self.states))


@contextmanager
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def ordinary_logits(skeleton, path, batches, dtype):
    """What transformers' own loading and forward give."""
    with quiet(), one_thread(), torch.no_grad():
        model = type(skeleton.model).from_pretrained(str(path), dtype=dtype).eval()
        return [
            model(
                input_ids=batch.input_ids,
                attention_mask=None if batch.mask is None else batch.mask.long(),
                use_cache=False,
            ).logits
            for batch in batches
        ]
