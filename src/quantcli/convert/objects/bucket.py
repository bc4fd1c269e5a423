"""What a run asks of object storage, in our words and with our errors."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.remote.origin import Version
from quantcli.checkpoint.remote.stores import Place, open_store, status_of, store_errors
from quantcli.core.errors import QuantError

if TYPE_CHECKING:
    from obstore.store import ObjectStore

PARTS_AT_ONCE = 2  # of an upload; one more is being filled
# Amazon S3, "Amazon S3 multipart upload limits": parts of 5 MiB to 5 GiB, at most 10,000 of them.
_LEAST_PART = 5 * 2**20  # bytes
_MOST_PARTS = 10_000
_NOT_IMPLEMENTED = 501  # what servers say that know no conditional requests


def part_nbytes(nbytes: int) -> int:
    """Bytes of a part of an upload of `nbytes`."""
    return max(_LEAST_PART, -(-nbytes // _MOST_PARTS))


@cache
def _store(place: Place) -> ObjectStore:
    return open_store(place)


class LostRaceError(Exception):
    """An object is not the one that the caller knows."""


class CannotCompareError(Exception):
    """The store cannot tell whether an object is the one that the caller knows."""


Identity = dict[str, str]  # ETag and version of an object: what a conditional request names


def _identity(meta: Mapping[str, Any]) -> Identity:
    return {key: meta[key] for key in ("e_tag", "version") if meta.get(key)}


class Upload:
    """An object that is being sent, in the order of its bytes. It is there after `close`."""

    def __init__(self, place: Place, name: str, nbytes: int) -> None:
        import obstore

        self._place, self._name = place, name
        with store_errors(place, name):
            self._writer: Any = obstore.open_writer(
                _store(place),
                place.key(name),
                buffer_size=part_nbytes(nbytes),
                max_concurrency=PARTS_AT_ONCE,
            )

    def write(self, data: bytes) -> None:
        """Take the next bytes. Waits for the network if parts are under way already.

        They must not change later: the library keeps them until their part has arrived.
        """
        with _sending(self._place, self._name):
            self._writer.write(data)

    def close(self) -> None:
        """Complete the object."""
        writer, self._writer = self._writer, None
        with _sending(self._place, self._name):
            try:
                writer.close()
            except BaseException as error:
                _abort(writer, error)
                raise

    def abort(self) -> None:
        """Give it up: the store deletes the parts. Twice does no harm, and so does a dead network."""
        writer, self._writer = self._writer, None
        if writer is not None:
            _abort(writer, RuntimeError("given up"))


@contextmanager
def _sending(place: Place, name: str) -> Iterator[None]:
    """Raise the errors of an upload in our words; its library raises them as errors of the system."""
    from obstore.exceptions import GenericError

    with store_errors(place, name):
        try:
            yield
        except OSError as error:
            raise GenericError(str(error)) from None


def _abort(writer: Any, error: BaseException) -> None:
    try:
        writer.__exit__(type(error), error, None)
    except Exception:  # the error that is reported is the first one
        return


@dataclass(frozen=True)
class Bucket:
    """A folder in object storage. It can be pickled; each process finds the credentials itself."""

    place: Place

    def __str__(self) -> str:
        return str(self.place)

    def list(self) -> dict[str, Version]:
        """The objects below the folder: name -> size and ETag."""
        import obstore

        begin, files = self.place.key(""), {}
        with store_errors(self.place):
            for entries in obstore.list(_store(self.place), self.place.folder or None):
                for entry in entries:
                    if entry["path"].startswith(begin):
                        name = entry["path"].removeprefix(begin)
                        files[name] = Version(entry["size"], entry["e_tag"] or "")
        return files

    def head(self, name: str) -> Version:
        """Size and ETag of an object. InputError if it is not there."""
        import obstore

        with store_errors(self.place, name):
            meta = obstore.head(_store(self.place), self.place.key(name))
        return Version(meta["size"], meta["e_tag"] or "")

    def get(self, name: str) -> tuple[bytes, Identity]:
        """Content of a small object, and what `replace` knows it by."""
        import obstore

        with store_errors(self.place, name):
            answer = obstore.get(_store(self.place), self.place.key(name))
            return bytes(answer.bytes()), _identity(answer.meta)

    def put(self, name: str, content: bytes) -> Identity:
        """Write a small object."""
        return self._put(name, content, "overwrite")

    def replace(self, name: str, content: bytes, identity: Identity | None) -> Identity:
        """Write a small object if it is still the one with an identity, or if there is none yet (None).

        Raises LostRaceError if another one is there, CannotCompareError if the store never compares.
        """
        try:
            return self._put(name, content, identity or "create")
        except LostRaceError:
            # perhaps the store took it, the answer was lost, and it was asked again
            with suppress(QuantError):  # another run may have ended, and removed it
                there, now = self.get(name)
                if there == content:
                    return now
            raise

    def _put(self, name: str, content: bytes, mode: Any) -> Identity:
        import obstore
        from obstore.exceptions import AlreadyExistsError, NotSupportedError, PreconditionError

        with store_errors(self.place, name):
            try:
                return _identity(
                    obstore.put(
                        _store(self.place),
                        self.place.key(name),
                        content,
                        mode=mode,
                        use_multipart=False,
                    )
                )
            except (AlreadyExistsError, PreconditionError):
                raise LostRaceError from None
            except NotSupportedError:
                raise CannotCompareError from None
            except Exception as error:
                if mode == "overwrite" or status_of(error) != _NOT_IMPLEMENTED:
                    raise
                raise CannotCompareError from None

    def delete(self, names: Iterable[str]) -> None:
        """Delete objects; those that are not there do no harm."""
        import obstore

        with store_errors(self.place):
            for name in names:
                try:
                    obstore.delete(_store(self.place), self.place.key(name))
                except FileNotFoundError:
                    continue

    def upload(self, name: str, nbytes: int) -> Upload:
        """Begin to send an object of `nbytes` bytes."""
        return Upload(self.place, name, nbytes)

    @contextmanager
    def sending(self, name: str, nbytes: int) -> Iterator[Upload]:
        """An upload that is completed at the end of the block, and given up if it raises."""
        upload = self.upload(name, nbytes)
        try:
            yield upload
            upload.close()
        except BaseException:
            upload.abort()
            raise
