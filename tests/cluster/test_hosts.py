"""Three hosts with addresses of their own, and with disks that the others do not see: namespaces of
this machine's kernel. They need root."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from quantcli.core.cluster.connect import _QUIET
from tests.cluster.test_conversions import SHARDED, weights, whole  # noqa: F401 - a fixture
from tests.e2e.conftest import run_cli, snapshot

NETWORK = "10.213.77"
PORT = 6379
_WAIT = """
import socket, sys, time
address, number = sys.argv[1:]
host, port = address.split(":")
while True:
    try:
        socket.create_connection((host, int(port)), 5).close()
        break
    except OSError:
        time.sleep(0.2)
import ray
ray.init(address=address, log_to_driver=False)
while sum(node["Alive"] for node in ray.nodes()) < int(number):
    time.sleep(0.2)
"""


def ip(*words: object) -> None:
    subprocess.run(["ip", *map(str, words)], check=True, capture_output=True)


@dataclass
class Hosts:
    """Namespaces 1 to 3, whose network is a bridge in namespace 0. disk: of each host alone; all else
    is shared."""

    disk: Path
    sockets: Path  # a short path
    rays: list[subprocess.Popen[bytes]] = field(default_factory=list)
    token: str = field(default_factory=secrets.token_hex)

    def name(self, number: int) -> str:
        return f"quantcli-{os.getpid()}-{number}"

    def connect(self) -> None:
        """Make the namespaces and their network."""
        ip("netns", "add", self.name(0))
        ip("-n", self.name(0), "link", "add", "bridge", "type", "bridge")
        ip("-n", self.name(0), "link", "set", "bridge", "up")
        for number in (1, 2, 3):
            host = self.name(number)
            ip("netns", "add", host)
            ends = ["eth0", "type", "veth", "peer", "name", f"port{number}", "netns", self.name(0)]
            ip("-n", host, "link", "add", *ends)
            ip("-n", self.name(0), "link", "set", f"port{number}", "master", "bridge", "up")
            ip("-n", host, "addr", "add", f"{NETWORK}.{number}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "route", "add", "default", "via", f"{NETWORK}.254")  # to find its address

    def start(self) -> None:
        """Start Ray on all hosts, each with a disk of its own."""
        ray = Path(sys.executable).with_name("ray")
        own_disk = 'mount -t tmpfs none "$0" && exec "$@"'
        for number in (1, 2, 3):
            role = [f"--address={self.address}"] if number > 1 else ["--head", f"--port={PORT}"]
            options = ["--num-cpus=1", f"--object-store-memory={100 * 2**20}", "--block"]
            address = f"--node-ip-address={NETWORK}.{number}"
            command = ["sh", "-c", own_disk, self.disk, ray, "start", *role, address, *options]
            if number == 1:
                command.append("--include-dashboard=false")
            self.rays.append(self.begin(number, *command))
            code, said = self.run(1, sys.executable, "-c", _WAIT, self.address, number)
            assert code == 0, said

    @property
    def address(self) -> str:
        return f"{NETWORK}.1:{PORT}"

    def begin(self, number: int, *command: object) -> subprocess.Popen[bytes]:
        words = ["ip", "netns", "exec", self.name(number), *map(str, command)]
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": self.token}
        environment = {**os.environ, **_QUIET, **token, "RAY_TMPDIR": str(self.sockets)}
        return subprocess.Popen(
            words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def run(self, number: int, *command: object) -> tuple[int, str]:
        """Run a command on a host: its exit code, and what it printed."""
        with self.begin(number, *command) as process:
            output = process.communicate(timeout=180)[0].decode()
        return process.returncode, output

    def quantcli(self, *words: object) -> tuple[int, str]:
        """quantcli on the first host."""
        return self.run(
            1, sys.executable, "-m", "quantcli", *words, "--executor", f"ray:{self.address}"
        )

    def seen(self, number: int, path: Path) -> Path:
        """A path of a host, as this process sees it."""
        return Path(f"/proc/{self.rays[number - 1].pid}/root{path}")

    def stop(self) -> None:
        for ray in self.rays:
            ray.terminate()
        for ray in self.rays:
            ray.communicate(timeout=60)
        for number in range(4):
            subprocess.run(["ip", "netns", "del", self.name(number)], capture_output=True, check=False)


@pytest.fixture(scope="module")
def hosts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hosts]:
    sockets = Path(tempfile.mkdtemp(prefix="qc-", dir="/tmp"))
    hosts = Hosts(tmp_path_factory.mktemp("hosts") / "disk", sockets)
    hosts.disk.mkdir()
    try:
        try:
            hosts.connect()
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"this machine allows no namespaces of networks: {error}")
        hosts.start()
        yield hosts
    finally:
        hosts.stop()
        shutil.rmtree(sockets, ignore_errors=True)


def words(large, out, *more):
    return ["quantize", "w8a8_dynamic", "--model", large.model, "--out", out, *SHARDED, *more]


def test_hosts_that_share_a_folder(hosts, large, whole):  # noqa: F811
    code, said = hosts.quantcli(*words(large, large.out))
    assert code == 0, said
    assert f"Ray cluster at {hosts.address}: 3 nodes, 3 CPUs" in said
    assert weights(snapshot(large.out)) == weights(whole["shards"])
    code, said = hosts.quantcli("verify", large.out, "--full", "--against", large.model)
    assert code == 0, said


def test_a_folder_that_hosts_do_not_share_is_refused(hosts, large):
    code, said = hosts.quantcli(*words(large, hosts.disk / "alone"))
    assert code == 3, said
    assert f"node {NETWORK}." in said
    assert "give a folder that all nodes share as --out" in said


def test_each_host_writes_a_part_to_its_own_disk(hosts, large, whole):  # noqa: F811
    out = hosts.disk / "out"
    code, said = hosts.quantcli(*words(large, out, "--part", "nodes"))
    assert code == 0, said
    parts = []
    for number in (1, 2, 3):
        name = f"out.part-{number}-of-3"
        assert f"part {number} of 3 is in {hosts.disk / name} on node {NETWORK}.{number}" in said
        parts.append(large.root / name)
        shutil.copytree(hosts.seen(number, hosts.disk / name), parts[-1])
        assert not hosts.seen(number % 3 + 1, hosts.disk / name).exists()
    assert not [*hosts.disk.glob("out*")]  # the disk of this process
    merged = run_cli("pack", "--merge", *parts, "--out", large.out)
    assert merged.code == 0, merged.err
    assert weights(snapshot(large.out)) == weights(whole["shards"])
