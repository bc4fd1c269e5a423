"""Files of a repository into the Hub's cache: several at a time, with patience, and with figures."""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, as_completed, wait
from contextlib import contextmanager
from typing import Any, TypeVar

from rich.filesize import decimal

from quantcli.checkpoint.hub.repository import ASK_TIMEOUT, Choice, Repository
from quantcli.checkpoint.remote.origin import LONGEST_WAIT, WAITS
from quantcli.core.errors import Interrupted, MachineError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count

WORKERS = 8  # files at a time, as huggingface_hub does
_CHUNK = 2**18  # bytes that are kept and counted together; at them a download notices its end
_SOON = 0.6  # seconds that downloads have to remove their unfinished files after an interrupt
_ADDRESS = re.compile(r"'?https?://[^\s']+'?")

T = TypeVar("T")


class _NotWanted(Exception):
    """Ends a download whose run has ended."""


class _Arrivals:
    """Bytes of a file that arrive, and whether they are still wanted."""

    def __init__(self, progress: Progress, stopped: threading.Event) -> None:
        self._progress = progress
        self._stopped = stopped
        self._nbytes = 0

    def add(self, nbytes: int) -> None:
        """Count bytes; fewer than 0 if they are asked for again."""
        if self._stopped.is_set():
            raise _NotWanted
        self._nbytes += nbytes
        self._progress.advance(nbytes)

    def complete(self, nbytes: int) -> None:
        """Count the file as a whole: what the cache had of another file did not arrive."""
        self.add(nbytes - self._nbytes)

    def bar(self) -> type[Any]:
        """A class for huggingface_hub's `tqdm_class`, which shows nothing."""
        from huggingface_hub.utils.tqdm import tqdm

        arrivals = self

        class Bar(tqdm):
            def __init__(self, *arguments: Any, **options: Any) -> None:
                super().__init__(*arguments, **{**options, "disable": True})  # type: ignore[no-untyped-call]

            def update(self, n: float | None = 1) -> None:
                """Count bytes of the file."""
                arrivals.add(int(n or 0))

            def update_transfer(self, n: float | None = 1) -> None:
                """Bytes on the network, which are those of a file, or fewer: not counted again."""

        return Bar


def fetch_model(repository: Repository, choice: Choice, progress: Progress) -> None:
    """Fetch the files of a model that the cache does not have, its weights last.

    A file whose connection is cut goes on where it stopped. `progress` gets the bytes. Raises what
    huggingface_hub raises for what patience does not help; MachineError if patience ends, and
    Interrupted: both say what is kept.
    """
    missing = [file for file in choice.files if not repository.is_cached(file)]
    if not missing:
        return
    nbytes = repository.nbytes(missing)
    progress.say(f"fetching {count(missing, 'file')} of {repository.name}, {decimal(nbytes)}")
    if choice.left_out:
        names = sorted(choice.left_out, key=lambda file: -repository.sizes[file])
        few = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        size = decimal(repository.nbytes(names))
        progress.say(f"not fetched, since not needed: {count(names, 'file')}, {size}: {few}")
    progress.begin(nbytes, len(missing), noun="file")
    progress.keeps("the complete files, in the Hub's cache")
    try:
        for files in (choice.others, choice.weights):
            fetch(repository, files, progress, progress)
        progress.keeps("")  # the steps that follow keep something else
    except KeyboardInterrupt:
        raise Interrupted(
            f"interrupted while {repository.name} was fetched",
            where=_kept(repository, choice),
            fix="the same command again fetches the others",
        ) from None
    except Exception as error:
        if not may_pass(error):
            raise
        raise MachineError(
            f"{repository.name} could not be fetched from the Hub: {reason(error)}",
            where=_kept(repository, choice),
            fix="check the network; the same command again fetches the others",
        ) from None


def _kept(repository: Repository, choice: Choice) -> str:
    done = sum(map(repository.is_cached, choice.files))
    return f"{done} of {count(choice.files, 'file')} are complete in the Hub's cache, and are kept"


def fetch(
    repository: Repository, files: list[str], messages: Progress, figures: Progress = SILENT
) -> None:
    """Fetch those of some files that the cache does not have. figures: gets the bytes and the files."""
    stopped = threading.Event()
    downloads: dict[Future[None], str] = {}
    pool = ThreadPoolExecutor(WORKERS, "download")
    with own_words(messages), _small_chunks():
        try:
            for file in files:
                if not repository.is_cached(file):
                    arrivals = _Arrivals(figures, stopped)
                    downloads[pool.submit(_fetch_one, repository, file, arrivals, messages)] = file
            for done in as_completed(downloads):
                done.result()
                figures.shard(downloads[done], repository.sizes[downloads[done]], reused=False)
        except BaseException as error:
            stopped.set()
            pool.shutdown(wait=False, cancel_futures=True)
            wait(downloads, _SOON if isinstance(error, KeyboardInterrupt) else ASK_TIMEOUT)
            raise
    pool.shutdown()


def _fetch_one(repository: Repository, file: str, arrivals: _Arrivals, progress: Progress) -> None:
    from huggingface_hub import hf_hub_download

    def attempt() -> None:
        arrivals.add(0)
        hf_hub_download(
            repository.name,
            file,
            revision=repository.commit,
            etag_timeout=ASK_TIMEOUT,
            tqdm_class=arrivals.bar(),
        )

    patiently(attempt, f"`{file}`", progress)
    arrivals.complete(repository.sizes[file])


def patiently(attempt: Callable[[], T], what: str, progress: Progress) -> T:
    """The result of `attempt`, which is repeated after errors that may pass, with longer and longer
    waits. what: begins the message about it."""
    for pause in WAITS:
        try:
            return attempt()
        except Exception as error:
            if not may_pass(error):
                raise
            seconds = max(pause, min(_asked_wait(error), LONGEST_WAIT))
            progress.say(f"{what}: {reason(error)}; trying again in {seconds:g} s")
            time.sleep(seconds)
    return attempt()


def may_pass(error: BaseException | None) -> bool:
    """Whether an error of huggingface_hub is one of the network or of a busy server."""
    while error is not None:
        if (status := status_of(error)) is not None:
            return status in {408, 429} or status >= 500
        # of httpx, or of its successor, whichever huggingface_hub imports
        if any(kind.__name__ == "TransportError" for kind in type(error).__mro__):
            return True
        error = error.__cause__
    return False


def status_of(error: BaseException) -> int | None:
    """The HTTP status of an error; None if it has none."""
    status = getattr(getattr(error, "response", None), "status_code", None)
    return status if isinstance(status, int) else None


def _asked_wait(error: BaseException) -> float:
    """Seconds that a busy server asked to wait."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    text = str(headers.get("Retry-After", ""))
    return float(text) if text.isascii() and text.isdigit() else 0.0


def reason(error: BaseException) -> str:
    """An error of huggingface_hub in a few words, without addresses, which may be signed."""
    while error.__cause__ is not None and status_of(error) is None:
        error = error.__cause__
    if (status := status_of(error)) is not None:
        return f"the server answers {status}"
    first = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return _ADDRESS.sub("the Hub", first)[:200]


class _Handler(logging.Handler):
    """Passes on what huggingface_hub logs."""

    def __init__(self, progress: Progress) -> None:
        super().__init__(logging.WARNING)
        self._progress = progress

    def emit(self, record: logging.LogRecord) -> None:
        text = " ".join(record.getMessage().split())
        self._progress.say(f"Hub: {_ADDRESS.sub('a file', text)[:200]}")


@contextmanager
def own_words(progress: Progress) -> Iterator[None]:
    """Warnings of huggingface_hub become messages of `progress`: --quiet and log files apply."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.handlers, logger.propagate
    logger.handlers, logger.propagate = [_Handler(progress)], False
    try:
        yield
    finally:
        logger.handlers, logger.propagate = before


_chunks = threading.Lock()


@contextmanager
def _small_chunks() -> Iterator[None]:
    """huggingface_hub takes 10 MB at a time: that is what a cut costs, and a wait on a slow line."""
    from huggingface_hub import constants

    with _chunks:
        before = constants.DOWNLOAD_CHUNK_SIZE
        constants.DOWNLOAD_CHUNK_SIZE = min(before, _CHUNK)
        try:
            yield
        finally:
            constants.DOWNLOAD_CHUNK_SIZE = before
