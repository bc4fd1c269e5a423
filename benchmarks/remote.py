"""Conversions of a model that is elsewhere, against the same model on this machine.

The model is on servers of this machine: a plain web server, one with the API of the Hub, one with that
of S3. Each conversion is a process of its own. Its peak memory is shown above that of the conversion
of a nearly empty model, which takes what imports and kernels take. Its local disk is what lies in the
folders for temporary files and for the Hub's cache at any time, twenty times a second. OUT is not in
these folders: it is on the same disk, and with `hf:// -> s3://` in object storage.
With `--ranges` only blocks of 4 MB are fetched, by the libraries between which the program chooses:
`--peer PYTHON` names one with s3fs.
"""

from __future__ import annotations

import os
import shutil
import statistics
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from common import (
    QUANTCLI,
    ROOT,
    Line,
    Usage,
    finish,
    hashes,
    measure,
    parser,
    qwen3,
    workplace,
    write_model,
)

RECIPE = "w8a8_dynamic"
DISK_BAR, MEMORY_BAR = 8.0, 96.0  # MB, MiB
KEYS = {"AWS_ACCESS_KEY_ID": "x", "AWS_SECRET_ACCESS_KEY": "x", "AWS_REGION": "us-east-1"}
_READ = """
import resource, sys, time
kind, address, key, size = sys.argv[1], sys.argv[2], sys.argv[3], int(sys.argv[4])
PIECE = 4 * 2**20
block = memoryview(bytearray(PIECE))
if kind == "http.client":
    import http.client
    connection = http.client.HTTPConnection(address.partition("//")[2])
    def read(first, last):
        connection.request("GET", "/" + key, headers={"Range": f"bytes={first}-{last - 1}"})
        response, done = connection.getresponse(), 0
        while done < last - first:
            done += response.readinto(block[done : last - first])
        response.read()
elif kind == "obstore":
    import obstore
    from obstore.store import S3Store
    bucket, _, name = key.partition("/")
    store = S3Store(bucket, endpoint=address, client_options={"allow_http": True})
    def read(first, last):
        done = 0
        answer = obstore.get(store, name, options={"range": (first, last)})
        for piece in answer.stream(min_chunk_size=2**16):
            block[done : done + len(piece)] = memoryview(piece)
            done += len(piece)
else:
    import s3fs
    system = s3fs.S3FileSystem(endpoint_url=address, client_kwargs={"region_name": "us-east-1"})
    def read(first, last):
        block[: last - first] = system.cat_file(key, start=first, end=last)
read(0, min(size, PIECE))
before, started = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
for first in range(0, size, PIECE):
    read(first, min(size, first + PIECE))
after, wall = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter() - started
cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
print(cpu * 2**30 / size, wall * 2**30 / size)
"""


@dataclass(frozen=True)
class Ports:
    """Where the servers are."""

    web: int
    hub: int
    moto: int


@contextmanager
def servers(folder: Path, first: int) -> Iterator[Ports]:
    """The servers of a folder of models, each in a process of its own, at three ports."""
    ports = Ports(first, first + 1, first + 2)
    with ExitStack() as stack:
        for words in (
            ["-m", "tests.web_server", str(folder), "--port", str(ports.web)],
            ["-m", "tests.hub_server", str(folder), "--port", str(ports.hub)],
            ["-c", f"from moto.server import main; main(['-p{ports.moto}'])"],
        ):
            server = subprocess.Popen(
                [sys.executable, *words],
                cwd=ROOT,
                env={**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'src'}"},
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            stack.callback(server.wait)
            stack.callback(server.terminate)
        for port in (ports.web, ports.hub, ports.moto):
            _wait_for(port)
        yield ports


def _wait_for(port: int) -> None:
    for _ in range(600):
        try:
            urllib.request.urlopen(f"http://127.0.0.1:{port}/")
            return
        except urllib.error.HTTPError:
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"no server at port {port}")


class Disk:
    """The largest size of some folders on the disk, in bytes, while it is watched."""

    def __init__(self, *folders: Path) -> None:
        self.peak = 0
        self._folders = folders
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.05):
            self.peak = max(self.peak, sum(map(_on_disk, self._folders)))

    def close(self) -> int:
        """Stop; the peak."""
        self._stop.set()
        self._thread.join()
        return self.peak


def _on_disk(folder: Path) -> int:
    nbytes = 0
    for place, _, names in os.walk(folder):
        for name in names:
            try:
                nbytes += os.lstat(os.path.join(place, name)).st_blocks * 512  # noqa: PTH118
            except OSError:
                continue  # it has gone meanwhile
    return nbytes


def convert(
    model: str, out: str, folder: Path, env: dict[str, str], options: list[str]
) -> tuple[Usage, int]:
    """Convert in a process of its own, with temporary files and a cache of the Hub in `folder`."""
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "tmp").mkdir(parents=True)
    disk = Disk(folder)
    used = measure(
        *QUANTCLI, "quantize", RECIPE, "--model", model, "--out", out, "--quiet", *options,
        env={"TMPDIR": str(folder / "tmp"), "HF_HOME": str(folder / "hub"), **env},
    )  # fmt: skip
    return used, disk.close()


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--layers", type=int, default=9, help="101 MB each")
    arguments.add_argument("--workers", type=int, default=2)
    arguments.add_argument("--port", type=int, default=8790, help="the first of three")
    arguments.add_argument("--rounds", type=int, default=3)
    arguments.add_argument("--ranges", action="store_true", help="fetch blocks, and nothing else")
    arguments.add_argument("--peer", help="a Python with s3fs, for --ranges")
    options = arguments.parse_args()
    with workplace(options.dir) as folder:
        served = folder / "served"
        (served / "org").mkdir(parents=True)
        nbytes = write_model(served / "org" / "model", qwen3(options.layers))
        write_model(served / "org" / "small", qwen3(1, hidden=128, vocab=16))
        with servers(served, options.port) as ports:
            if options.ranges:
                lines = ranges(served / "org" / "model", ports, options.peer)
            else:
                workers = ["--workers", str(options.workers)]
                lines = conversions(folder, nbytes, ports, workers, options.rounds)
    finish(lines, as_json=options.json)


def conversions(folder: Path, nbytes: int, ports: Ports, workers: list[str], rounds: int) -> list[Line]:
    """A conversion for each kind of source, and one from the Hub into object storage."""
    web = f"http://127.0.0.1:{ports.web}"
    here = str(folder / "out")
    hub = {"HF_ENDPOINT": f"http://127.0.0.1:{ports.hub}"}
    moto = {**KEYS, "AWS_ENDPOINT_URL": f"http://127.0.0.1:{ports.moto}"}
    kinds = {
        "local": (str(folder / "served" / "org"), here, {}),
        "http://": (f"{web}/org", here, {}),
        "s3://": ("s3://org", here, {**KEYS, "AWS_ENDPOINT_URL": web}),
        "hf://": ("hf://org", here, hub),
        "hf:// -> s3://": ("hf://org", "s3://bucket/out", {**hub, **moto}),
    }
    request = urllib.request.Request(f"{moto['AWS_ENDPOINT_URL']}/bucket", method="PUT")
    urllib.request.urlopen(request).close()
    lines, outputs = [], {}
    for kind, (source, out, env) in kinds.items():
        runs = {}
        for model in ("small", "model"):
            each = []
            for _ in range(rounds):
                shutil.rmtree(here, ignore_errors=True)
                each.append(
                    convert(f"{source}/{model}", out, folder / "scratch", env, [*workers, "--force"])
                )
            runs[model] = each
        if out == here:
            outputs[kind] = {
                name: digest
                for name, digest in hashes(Path(here)).items()
                if name.endswith("safetensors")
            }
        whole, small = runs["model"], runs["small"]
        peak = statistics.median(used.peak for used, _ in whole)
        imports = statistics.median(used.peak for used, _ in small)
        cpu = statistics.median(used.cpu for used, _ in whole)
        wall = statistics.median(used.wall for used, _ in whole)
        disk = max(each for _, each in whole)
        elsewhere = out != here
        lines += [
            Line(f"{kind}: CPU", cpu, "s", None, f"{nbytes / 1e9:.2f} GB, {rounds} rounds"),
            Line(f"{kind}: time", wall, "s", None, "with the server on the same cores"),
            Line(f"{kind}: memory above imports", (peak - imports) / 2**20, "MiB", MEMORY_BAR),
            Line(f"{kind}: local disk", disk / 1e6, "MB", DISK_BAR, "" if elsewhere else "without OUT"),
        ]
    same = float(all(found == outputs["local"] for found in outputs.values()))
    lines.append(Line("the same weights from everywhere", same, "", None, "1: yes", floor=1.0))
    return lines


def ranges(model: Path, ports: Ports, peer: str | None) -> list[Line]:
    """Seconds for a GiB in blocks of 4 MB, by library."""
    file = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    key, size = f"org/model/{file.name}", file.stat().st_size
    lines = []
    kinds = {"http.client": sys.executable, "obstore": sys.executable}
    for kind, python in {**kinds, **({"s3fs": peer} if peer else {})}.items():
        words = [python, "-c", _READ, kind, f"http://127.0.0.1:{ports.web}", key, str(size)]
        found = [
            subprocess.run(
                words, env={**os.environ, **KEYS}, check=True, capture_output=True, text=True
            )
            for _ in range(5)
        ]
        cpu, wall = zip(*(map(float, each.stdout.split()) for each in found), strict=True)
        detail = f"{statistics.median(wall):.2f} s of time, by one connection"
        lines.append(Line(f"{kind}: CPU of a GiB", statistics.median(cpu), "s", None, detail))
    return lines


if __name__ == "__main__":
    main()
