"""`reproduce` for Python programs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Unpack

from quantcli.commands.api import resources_of
from quantcli.commands.keywords import PathLike, Reproducing, path_of, takes
from quantcli.commands.results import Reproduction
from quantcli.commands.steps import OnProgress, progress_of


@takes(Reproducing)
def reproduce(
    checkpoint: PathLike,
    model: PathLike,
    *,
    data: PathLike | None = None,
    example_inputs: Iterable[Any] | Mapping[str, Any] | None = None,
    on_progress: OnProgress = None,
    **options: Unpack[Reproducing],
) -> Reproduction:
    """Make a checkpoint again by its own recipe, and compare every byte. `ok` of the result says so.

    Nothing is written but a folder OUT.reproduction for the time of the work; the same call again
    continues an interrupted one.

    checkpoint:  a folder, a Hub id or an address that `quantize` or `pack` wrote.
    model:       what it was made of.
    data:        the text that it was calibrated on; not needed for the sample that comes with quantcli
                 and for data sets of the Hub.
    example_inputs: the samples, if it was calibrated on some: see `quantize`.
    calibration: the folder of a calibration to use in place of running the text again, or to make.
    fresh:       start over in place of continuing.
    workers, executor, device, max_memory, trust_remote_code, on_progress: as of `quantize`.

    Raises InputError if the model, the tokenizer or the text is another one than the checkpoint
    records, and MachineError for the disk, the memory or the device.
    """
    from quantcli.commands.trust import reproduce as commands

    examples = None
    if example_inputs is not None:
        from quantcli.calibration.text.examples import Examples

        examples = Examples.of(example_inputs)
    wish = commands.Wish(
        str(checkpoint),
        str(model),
        None if data is None else str(data),
        examples,
        path_of(options["calibration"]),
        options["fresh"],
    )
    return Reproduction(**commands.run(wish, resources_of(options), progress_of(on_progress)))
