"""The connection of this process to a Ray cluster: one at a time. Ray's own messages become details."""

from __future__ import annotations

import importlib
import logging
import os
import secrets
import shutil
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

from quantcli.core.cluster.cluster import Cluster
from quantcli.core.cluster.executor import Executor
from quantcli.core.environment import environment
from quantcli.core.errors import InputError, MachineError
from quantcli.core.events import SILENT, Progress
from quantcli.core.text import count, pip_install
from quantcli.core.threads import default_workers

_REACH = 5.0  # seconds to reach the head of a cluster
_STORE = 256 * 2**20  # bytes of Ray's object store on clusters of our own: no tensor goes through it
_HELLO = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
_SETTINGS = bytes(
    [0, 0, 0, 4, 0, 0, 0, 0, 0]
)  # a frame of HTTP/2: three bytes of length, kind, flags, ...
_ANOTHER = "ab" * 28  # the id of a cluster that is not there
_QUIET = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",  # or Ray warns of a change to come
    "RAY_DEDUP_LOGS": "0",
}

_lock = threading.RLock()
_present: list[tuple[Executor, Cluster]] = []  # at most one


@contextmanager
def connect(executor: Executor, progress: Progress = SILENT) -> Iterator[Cluster]:
    """The cluster of an executor, whose nodes have the software of this machine.

    Blocks may be nested: the outermost one connects and disconnects. A cluster that it started ends
    with it. MachineError if Ray is missing or no cluster is there; InputError if software differs, or
    if this process is connected to another cluster.
    """
    with _lock:
        if _present:
            present, cluster = _present[0]
            if present != executor:
                raise InputError(
                    "this process is connected to another cluster",
                    where=f"{present}, not {executor}",
                    fix="give one executor for all calls",
                )
            yield cluster
            return
        with _connection(executor, progress) as cluster:
            nodes = cluster.nodes
            cpus = sum(node.cpus for node in nodes)
            size = f"{count(nodes, 'node')}, {count(cpus, 'CPU')}"
            progress.say(f"{cluster.name}: {size}; processes start there, which takes some seconds")
            cluster.check_software()
            _present.append((executor, cluster))
            try:
                yield cluster
            finally:
                _present.clear()


@contextmanager
def connected(executor: Executor | None, progress: Progress = SILENT) -> Iterator[Cluster | None]:
    """The cluster of an executor, for all steps in the block; None for threads of this process."""
    if executor is None:
        yield None
        return
    with connect(executor, progress) as cluster:
        yield cluster


@contextmanager
def _connection(executor: Executor, progress: Progress) -> Iterator[Cluster]:
    ray = _ray()
    if ray.is_initialized():  # by the program that called us, which ends it, too
        yield Cluster(f"Ray cluster at {ray.get_runtime_context().gcs_address}")
        return
    with environment(_QUIET), _own_words(ray, progress):
        address, origin = _address(ray, executor)
        if address is None:
            with _new_cluster(ray, progress) as cluster:
                yield cluster
            return
        progress.say(f"joining the Ray cluster at {address} ({origin})")
        with _joined(ray, address) as cluster:
            yield cluster


def _address(ray: Any, executor: Executor) -> tuple[str | None, str]:
    """The address of the cluster of an executor, and where that comes from; None for a new cluster."""
    if executor.address is not None:
        address, origin = executor.address, f"--executor {executor}"
    elif named := os.environ.get("RAY_ADDRESS"):
        address, origin = named, "of RAY_ADDRESS"
    elif started := _started_here(ray):
        address, origin = started, "started on this machine"
    else:
        return None, ""
    return (None if address == "local" else address), origin


def _ray() -> Any:
    try:
        import ray
    except ModuleNotFoundError as error:
        if error.name != "ray":
            raise
        raise MachineError("Ray is not installed", fix=pip_install("ray")) from None
    return ray


def _started_here(ray: Any) -> str | None:
    """The address of the cluster that `ray start` began on this machine, if it answers."""
    address = ray._private.utils.read_ray_address()
    return address if address and _answers(address) else None


def _answers(address: str) -> bool:
    """Whether a server of gRPC answers, as the head of a cluster is one: it speaks HTTP/2."""
    host, _, port = address.rpartition(":")
    try:
        with socket.create_connection((host.strip("[]"), int(port)), _REACH) as connection:
            connection.sendall(_HELLO + _SETTINGS)
            answer = b""
            while len(answer) < len(_SETTINGS) and (more := connection.recv(len(_SETTINGS))):
                answer += more
    except (OSError, ValueError):
        return False
    return answer[3:5] == _SETTINGS[3:5]


@contextmanager
def _joined(ray: Any, address: str) -> Iterator[Cluster]:
    """The cluster at an address."""
    if address.startswith("ray://"):
        raise InputError(
            "addresses of Ray Client cannot be used",
            where=f"RAY_ADDRESS={address}",
            fix="start the command on a machine of the cluster: `ray job submit -- quantcli ...`",
        )
    if address != "auto" and not _answers(address):
        raise MachineError(
            "no Ray cluster answers",
            where=address,
            fix="give the address that `ray start --head` printed, HOST:6379 as a rule; or use "
            "--executor ray:local",
        )
    with _shown_token(address):
        try:
            with _own_signals():
                ray.init(address=address, log_to_driver=False, configure_logging=False)
        except (ConnectionError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
            raise MachineError(
                f"cannot join the Ray cluster: {_first_line(error)}",
                where=address,
                fix="use the versions of Ray and Python of the cluster, or --executor ray:local",
            ) from None
        try:
            yield Cluster(f"Ray cluster at {address}")
        finally:
            ray.shutdown()


@contextmanager
def _shown_token(address: str) -> Iterator[None]:
    """Have Ray show the token of this user in the block, if the cluster wants one: Ray itself does so
    only for a cluster that it finds. MachineError if the cluster refuses it, or there is none."""
    raylet: Any = importlib.import_module("ray._raylet")
    if address == "auto" or not hasattr(raylet, "AuthenticationTokenLoader"):  # before Ray 2.52
        yield
        return
    if not _refuses_token(raylet, address):
        yield
        return
    tokens = raylet.AuthenticationTokenLoader.instance()
    if "RAY_AUTH_MODE" not in os.environ and tokens.has_token(ignore_auth_mode=True):
        try:
            with environment({"RAY_AUTH_MODE": "token"}):
                raylet.Config.initialize("")  # reads the variables again
                if not _refuses_token(raylet, address):
                    yield
                    return
        finally:
            raylet.Config.initialize("")
    raise MachineError(
        "the Ray cluster wants a token that this process does not have",
        where=address,
        fix="set RAY_AUTH_MODE=token, and RAY_AUTH_TOKEN to the token of the cluster; the machine that "
        "started it has it in ~/.ray/auth_token",
    )


def _refuses_token(raylet: Any, address: str) -> bool:
    """Whether a cluster refuses this process, as it asks a question of another cluster: joining would
    only say after 20 s that it failed."""
    try:
        raylet.GcsClient(address=address, cluster_id=_ANOTHER).internal_kv_exists(b"", None, _REACH)
    except Exception as error:
        return "AuthToken" in str(error)
    return False


@contextmanager
def _new_cluster(ray: Any, progress: Progress) -> Iterator[Cluster]:
    """A cluster of this machine alone, which ends with the block. Only this process has its token."""
    progress.say("starting a Ray cluster on this machine")
    folder = tempfile.mkdtemp(prefix="qc-", dir="/tmp")  # paths of sockets must be short
    try:
        with environment(_token()):
            try:
                with _own_signals():
                    ray.init(
                        address="local",
                        num_cpus=default_workers(),
                        object_store_memory=_STORE,
                        include_dashboard=False,
                        log_to_driver=False,
                        configure_logging=False,
                        _temp_dir=folder,
                    )
            except (OSError, RuntimeError, ValueError, ray.exceptions.RayError) as error:
                raise MachineError(
                    f"Ray does not start: {_first_line(error)}",
                    where=folder,
                    fix="see the logs there, or use --executor threads",
                ) from None
            try:
                yield Cluster("Ray cluster on this machine")
            finally:
                ray.shutdown()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@cache
def _token() -> Mapping[str, str]:
    """The secret of this process's clusters, which Ray reads once; none if the user chose."""
    if "RAY_AUTH_MODE" in os.environ or "RAY_AUTH_TOKEN" in os.environ:
        return {}
    return {"RAY_AUTH_TOKEN": secrets.token_hex(32)}


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


@contextmanager
def _own_signals() -> Iterator[None]:
    """Give the process back its handler of SIGTERM, after Ray set one in the block."""
    before = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, before)


@contextmanager
def _own_words(ray: Any, progress: Progress) -> Iterator[None]:
    """Make details of what Ray says in the block."""
    from ray._private import worker

    class Kept(list[logging.Handler]):
        def clear(self) -> None:
            """Nothing: `ray.init` would let messages fall through to the screen."""

    class Detail(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            progress.detail(f"ray: {record.getMessage()}")

    def detail(data: Mapping[str, Any], *_: Any, **__: Any) -> None:
        for line in data.get("lines", ()):
            progress.detail(f"ray: {line}")

    logger, show = logging.getLogger("ray"), worker.print_to_stdstream
    before = logger.handlers, logger.propagate, logger.level
    logger.handlers, logger.propagate = Kept([Detail(logging.WARNING)]), False
    worker.print_to_stdstream = detail
    try:
        yield
    finally:
        logger.handlers, logger.propagate, logger.level = before
        worker.print_to_stdstream = show
