"""A branch of a repository of the Hub as a place to write: its files, and commits to it."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantcli.checkpoint.files import JOURNAL
from quantcli.checkpoint.hub.download import own_words, patiently, reason, status_of
from quantcli.checkpoint.hub.find import HUB_ID
from quantcli.checkpoint.remote.address import public_form
from quantcli.core.errors import InputError, MachineError, QuantError
from quantcli.core.events import SILENT, Progress

if TYPE_CHECKING:
    from huggingface_hub import CommitOperationAdd, HfApi

SCHEME = "hf://"
_OTHERS = {"buckets", "datasets", "kernels", "models", "spaces"}  # first words of other addresses
_MOST = 2**24  # bytes of a small file that is read back
_CONFLICT = {409, 412}
_MAY_WRITE = {"admin", "write", "contributor"}  # roles in an organisation


@dataclass(frozen=True)
class Entry:
    """A file of a repository: its bytes, and its hash, which is sha256 of a large file, else git's."""

    nbytes: int
    digest: str
    large: bool


@dataclass(frozen=True)
class Sent:
    """A large file that the Hub has by its hash, and that no commit names yet."""

    nbytes: int
    sha256: str


Content = Path | bytes | Sent


def send(url: str, name: str, file: Path, sha256: str, progress: Progress = SILENT) -> None:
    """Upload a file with that hash, to be committed under `name` later. Processes may share a
    branch for this. A busy server and a cut connection are given time."""
    from huggingface_hub import CommitOperationAdd

    operation = CommitOperationAdd(name, file)
    operation.upload_info.sha256 = bytes.fromhex(sha256)
    repository, branch = parse(url)
    api = _api()
    with _talking(url, progress):
        patiently(
            lambda: api.preupload_lfs_files(repository, [operation], revision=branch),
            f"`{name}`",
            progress,
        )


def _operation(name: str, content: Content) -> CommitOperationAdd:
    """What huggingface_hub is asked to commit."""
    from huggingface_hub import CommitOperationAdd
    from huggingface_hub.lfs import UploadInfo

    if not isinstance(content, Sent):
        return CommitOperationAdd(name, content)
    # as `preupload_lfs_files` leaves an operation behind, perhaps in another process.
    # Source: huggingface_hub 2.4.0, hf_api.py:5470 and _commit_api.py:188
    operation = CommitOperationAdd(name, b"")
    operation.upload_info = UploadInfo(content.nbytes, b"", bytes.fromhex(content.sha256))
    operation._upload_mode, operation._should_ignore, operation._is_uploaded = "lfs", False, True
    return operation


@dataclass
class Branch:
    """A branch that this user may write to, as it was when it was last looked at.

    start:  the commit that a branch begins with which is not there yet; None: so is the repository.
    commit: its last commit; None if it is not there yet.
    files:  those of that commit, or of `start`.
    """

    name: str  # organisation/model
    branch: str
    start: str | None = None
    commit: str | None = None
    files: dict[str, Entry] = field(default_factory=dict)

    @property
    def url(self) -> str:
        """Its address, as the user gives it."""
        return SCHEME + self.name + (f"@{self.branch}" if self.branch != "main" else "")

    @property
    def is_new(self) -> bool:
        """Whether its repository is not there yet."""
        return self.commit is None and self.start is None

    def create(self, progress: Progress = SILENT) -> None:
        """Create the repository, which is private then, and the branch, if they are not there yet."""
        if self.commit is not None:
            return
        api = _api()

        def attempt() -> None:
            if self.start is None:
                api.create_repo(self.name, private=True, exist_ok=True)
            if self.branch != "main":
                start = self.start or _first_commit(api, self.name)
                api.create_branch(self.name, branch=self.branch, revision=start, exist_ok=True)
            self._look(api)

        with _talking(self.url, progress):
            patiently(attempt, self.url, progress)

    def write(
        self,
        title: str,
        contents: Mapping[str, Content],
        deleted: Iterable[str] = (),
        progress: Progress = SILENT,
    ) -> None:
        """Commit files, large ones first by their hash, and look at the branch as it is then.

        A busy server and a cut connection are given time. If somebody else has committed meanwhile, the
        commit is made once more on top of that, unless the journal there is another one. MachineError
        if another run is at work, if the Hub refuses, and if a file is not there in the end.
        """
        from huggingface_hub import CommitOperationDelete, errors

        added = {name: _operation(name, content) for name, content in contents.items()}
        gone = sorted({*deleted} & self.files.keys())
        operations: list[CommitOperationAdd | CommitOperationDelete] = [*added.values()]
        operations += map(CommitOperationDelete, gone)
        api = _api()

        def attempt() -> str:
            commit = api.create_commit(
                self.name,
                operations,
                commit_message=title,
                revision=self.branch,
                parent_commit=self.commit,
            )
            return str(commit.oid)

        with _talking(self.url, progress):
            try:
                self._look(api, patiently(attempt, self.url, progress))
            except errors.HfHubHTTPError as error:
                if status_of(error) not in _CONFLICT:
                    raise
                self._after_conflict(api, added, gone)
                if not self._shows(added, gone):
                    self._look(api, patiently(attempt, self.url, progress))
        if not self._shows(added, gone):
            names = [name for name, item in added.items() if not _is(item, self.files.get(name))]
            raise MachineError(
                f"the Hub does not list `{[*names, *gone][0]}` as it was committed",
                where=self.url,
                fix="check that the .gitignore of the repository does not leave it out",
            )

    def _after_conflict(
        self, api: HfApi, added: Mapping[str, CommitOperationAdd], gone: Iterable[str]
    ) -> None:
        """Look at the branch again. MachineError if another run has written there meanwhile; if only
        the answer to a commit was lost, the branch shows it now."""
        before = self.files.get(JOURNAL)
        self._look(api)
        if self.files.get(JOURNAL) != before and not self._shows(added, gone):
            raise MachineError(
                "another run is writing here", where=self.url, fix="wait for it, or stop it"
            )

    def _shows(self, added: Mapping[str, CommitOperationAdd], gone: Iterable[str]) -> bool:
        """Whether the branch has files as they were to be, and others not any more."""
        there = all(_is(operation, self.files.get(name)) for name, operation in added.items())
        return there and not self.files.keys() & {*gone}

    def read(self, name: str, progress: Progress = SILENT) -> bytes:
        """The content of a small file."""
        from huggingface_hub import get_session, hf_hub_url, hf_raise_for_status
        from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]

        if self.files[name].nbytes > _MOST:
            raise InputError(
                f"`{name}` is too large to be what it should be",
                where=self.url,
                fix="choose another --out, or use --fresh",
            )
        url = hf_hub_url(self.name, name, revision=self.commit)

        def attempt() -> bytes:
            response = get_session().get(url, headers=build_hf_headers())
            hf_raise_for_status(response)
            return bytes(response.content)

        with _talking(self.url, progress):
            return patiently(attempt, f"`{name}`", progress)

    def _look(self, api: HfApi, commit: str | None = None) -> None:
        """Read the list of files, of the last commit unless one is given."""
        self.commit = commit or api.repo_info(self.name, revision=self.branch).sha
        assert self.commit is not None
        self.files = _files(api, self.name, self.commit)


def open_branch(url: str, progress: Progress = SILENT) -> Branch:
    """The branch that hf://ORG/NAME or hf://ORG/NAME@BRANCH names, which need not be there yet.

    InputError if nobody is logged in, if the user may not write there and for an address that is not a
    repository of models; MachineError if the Hub gives no answer.
    """
    from huggingface_hub import errors, get_token

    name, branch = parse(url)
    progress.say(f"asking the Hub for {url}")
    with _talking(url, progress):
        if get_token() is None:
            raise InputError(
                "nobody is logged in to the Hub", where=url, fix="run `hf auth login`, or set HF_TOKEN"
            )
        api = _api()
        try:
            patiently(lambda: api.auth_check(name, write=True), url, progress)
        except errors.RepositoryNotFoundError:
            _check_namespace(patiently(api.whoami, url, progress), name, url)
            return Branch(name, branch)
        found = Branch(name, branch)
        refs = patiently(lambda: api.list_repo_refs(name), url, progress)
        if branch in {tag.name for tag in refs.tags}:
            raise InputError(f"`{branch}` is a tag", where=url, fix="give the name of a branch")
        if branch in {reference.name for reference in refs.branches}:
            patiently(lambda: found._look(api), url, progress)
        else:
            found.start = patiently(lambda: _first_commit(api, name), url, progress)
            found.files = patiently(lambda: _files(api, name, str(found.start)), url, progress)
        return found


def parse(url: str) -> tuple[str, str]:
    """Repository and branch of an address."""
    match = HUB_ID.fullmatch(url.removeprefix(SCHEME))
    if match is None or match["repository"].split("/")[0] in _OTHERS:
        raise InputError(
            "not the address of a model on the Hub",
            where=public_form(url),
            fix="give hf://ORG/NAME, or hf://ORG/NAME@BRANCH",
        )
    return match["repository"], match["revision"] or "main"


def _check_namespace(user: Mapping[str, Any], name: str, url: str) -> None:
    """InputError if a user may not create a repository of that name."""
    organisation = name.split("/")[0]
    roles = {entry["name"]: entry.get("roleInOrg") or "write" for entry in user.get("orgs", [])}
    roles[user["name"]] = "admin"
    if organisation not in roles:
        raise InputError(
            f"`{organisation}` is neither `{user['name']}`, whose token is used, nor an organisation "
            "with that member",
            where=url,
            fix="check the spelling, or HF_TOKEN",
        )
    token = user.get("auth", {}).get("accessToken", {}).get("role")
    if roles[organisation] not in _MAY_WRITE or token == "read":
        raise _may_not_write(url)


def _may_not_write(url: str) -> InputError:
    return InputError(
        "the token does not allow writing here", where=url, fix="set HF_TOKEN to one that does"
    )


def _api() -> HfApi:
    from huggingface_hub import HfApi, constants

    return HfApi(constants.ENDPOINT)


def _first_commit(api: HfApi, name: str) -> str:
    """The first commit of a repository. It has no model yet, so new branches begin there."""
    return str(api.list_repo_commits(name)[-1].commit_id)


def _files(api: HfApi, name: str, commit: str) -> dict[str, Entry]:
    from huggingface_hub.hf_api import RepoFile

    return {
        item.path: Entry(item.size, item.lfs.sha256 if item.lfs else item.blob_id, bool(item.lfs))
        for item in api.list_repo_tree(name, recursive=True, revision=commit)
        if isinstance(item, RepoFile)
    }


def _is(operation: CommitOperationAdd, entry: Entry | None) -> bool:
    """Whether a file of a repository is what was to be committed."""
    info = operation.upload_info
    if entry is None or entry.nbytes != info.size:
        return False
    if entry.large:
        return entry.digest == info.sha256.hex()
    with operation.as_file() as file:
        content = b"blob %d\0" % info.size + file.read()
    return entry.digest == hashlib.sha1(content, usedforsecurity=False).hexdigest()


_one_at_a_time = threading.RLock()


@contextmanager
def _talking(url: str, progress: Progress) -> Iterator[None]:
    """huggingface_hub is used in this thread alone: what it says and draws is set for the process."""
    with _one_at_a_time, _our_errors(url), own_words(progress), _no_bars():
        yield


@contextmanager
def _no_bars() -> Iterator[None]:
    """huggingface_hub draws no bars of its own."""
    from huggingface_hub.utils.tqdm import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    before = are_progress_bars_disabled()
    if not before:
        disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _our_errors(url: str) -> Iterator[None]:
    """What huggingface_hub raises, in one sentence."""
    from huggingface_hub import errors

    again = "the same command again goes on after the last shard that is there"
    try:
        yield
    except QuantError:
        raise
    except errors.OfflineModeIsEnabled:
        raise InputError(
            "the Hub cannot be written to offline", where=url, fix="unset HF_HUB_OFFLINE"
        ) from None
    except Exception as error:
        status = status_of(error)
        if status == 401:
            raise InputError(
                "the Hub does not accept the token", where=url, fix="run `hf auth login` again"
            ) from None
        if status == 403:
            raise _may_not_write(url) from None
        if status in _CONFLICT:
            raise MachineError(
                "somebody else keeps committing to this branch", where=url, fix=again
            ) from None
        raise MachineError(
            f"the Hub could not be written to: {reason(error)}", where=url, fix=f"check it; {again}"
        ) from None
