"""compressed-tensors by another name."""

from typing import ClassVar

from quantcli.checkpoint.checkpoint import Checkpoint
from quantcli.targets.compressed_tensors.target import CompressedTensors


class ToyTensors(CompressedTensors):
    """Its checkpoints are compressed-tensors."""

    name: ClassVar[str] = "toy-tensors"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """None: those that it writes are of its base."""
        return False
