"""A shard has the bytes of its tensors and the hashes of its file, however it is put together."""

from __future__ import annotations

import random
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantcli.checkpoint.header import encode_header, layout
from quantcli.checkpoint.spec import TensorSpec
from quantcli.checkpoint.writer import ShardWriter
from quantcli.convert.objects.stream import ObjectWriter
from quantcli.core import extents
from quantcli.core.disk import file_entry
from quantcli.core.extents import Buffers
from quantcli.planning.plan import Shard


class Kept:
    """A bucket whose only object is kept here."""

    def __init__(self) -> None:
        self.content = b""
        self.complete = False

    def upload(self, name: str, nbytes: int) -> Kept:
        return self

    def write(self, data: bytes) -> None:
        assert type(data) is bytes, "what is sent must not change later"
        self.content += data

    def close(self) -> None:
        self.complete = True


SHAPES = st.one_of(
    st.tuples(st.integers(0, 30), st.integers(1, 3000)), st.tuples(st.integers(0, 9000)), st.just(())
)


@settings(max_examples=60, deadline=None)
@given(
    tensors=st.lists(
        st.tuples(SHAPES, st.sampled_from(["I8", "BF16", "F32"]), st.booleans()), max_size=5
    ),
    extent=st.sampled_from([4096, 8192, 32768]),
    limit=st.integers(0, 6),
    most=st.integers(1, 20000),
    seed=st.integers(0, 999),
)
def test_any_shapes_pieces_and_orders(
    tensors: list[tuple[tuple[int, ...], str, bool]], extent: int, limit: int, most: int, seed: int
) -> None:
    order = random.Random(seed)
    specs = layout(TensorSpec(f"t{i}", dtype, shape) for i, (shape, dtype, _) in enumerate(tensors))
    columns = {
        f"t{i}" for i, (shape, _, by) in enumerate(tensors) if by and len(shape) == 2 and shape[0]
    }
    data = {spec.name: order.randbytes(spec.nbytes) for spec in specs}
    pieces: list[tuple[TensorSpec, int, int]] = []
    for spec in specs:
        begin, end = 0, spec.shape[1] if spec.name in columns else spec.nbytes
        while begin < end:
            stop = min(end, begin + order.randint(1, most))
            pieces.append((spec, begin, stop))
            begin = stop
    order.shuffle(pieces)
    with tempfile.TemporaryDirectory() as name, pytest.MonkeyPatch.context() as patch:
        patch.setattr(extents, "EXTENT", extent)
        buffers = Buffers(limit, 1)
        writer = ShardWriter(Path(name), "x", specs, buffers=buffers, by_columns=columns, checksum=True)
        kept, memory = Kept(), Buffers(limit, 1)
        upload = ObjectWriter(kept, Shard("x", specs, ()), memory, checksum=True)  # type: ignore[arg-type]
        for spec, begin, stop in pieces:
            content = memoryview(data[spec.name])
            if spec.name in columns:
                size, row = int(spec.itemsize), spec.row_nbytes
                runs = [
                    content[r * row + begin * size : r * row + stop * size]
                    for r in range(spec.shape[0])
                ]
                for each in (writer, upload):
                    each.write_columns(spec.name, begin, memoryview(b"".join(runs)))
            else:
                for each in (writer, upload):
                    each.write(spec.name, begin, content[begin:stop])
        entry = writer.finish()
        assert writer.path.read_bytes() == encode_header(specs) + b"".join(data[s.name] for s in specs)
        assert entry == file_entry(writer.path, checksum=True)
        assert upload.finish() == entry
        assert kept.complete
        assert kept.content == writer.path.read_bytes()
        assert memory.exhausted == (limit == 0), "all memory was given back"
