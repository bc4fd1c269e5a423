"""What all layers of a calibration share."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from quantcli.calibration.dataset import Batch
from quantcli.calibration.replay import Replay
from quantcli.calibration.skeleton import Skeleton
from quantcli.calibration.wishes import Wishes


@dataclass(frozen=True)
class Run:
    """The replay's last batch is the probe. workers: threads for work outside of the replay.

    held_targets: bytes of a layer's float outputs that may be held while it learns.
    """

    skeleton: Skeleton
    replay: Replay
    batches: list[Batch]
    probe: Batch
    wishes: Wishes
    device: torch.device
    workers: int = 1
    held_targets: int = 0
