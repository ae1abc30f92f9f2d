"""Maps of sparse files that make no sense."""

from __future__ import annotations

import io

import pytest

from tare.images.layer import LayerError, number
from tare.images.sparse import BLOCK, Sparse, complete, of_pax


def lines(*numbers: int) -> bytes:
    text = b"".join(b"%d\n" % each for each in numbers)
    return text + bytes(-len(text) % BLOCK)


def read(sparse: Sparse, size: int, data: bytes = b"") -> tuple[Sparse, int]:
    return complete(sparse, size, io.BytesIO(data).read, number)


def test_a_map_in_the_data_is_not_part_of_the_file() -> None:
    data = lines(2, 0, 10, 4096, 20)
    assert read(Sparse(5000, (), "data"), BLOCK + 30, data) == (Sparse(5000, ((0, 10), (4096, 20))), 30)
    assert read(Sparse(5000, (), "data"), BLOCK, lines(0)) == (Sparse(5000, ()), 0)


@pytest.mark.parametrize(
    ("sparse", "size", "data", "word"),
    [
        (Sparse(10, ((0, 5), (4, 5))), 10, b"", "overlap"),
        (Sparse(10, ((8, 5),)), 5, b"", "leave it"),
        (Sparse(10, ((0, -5),)), 5, b"", "leave it"),
        (Sparse(10, ((0, 5),)), 6, b"", "not as long"),
        (Sparse(-1, ()), 0, b"", "not as long"),
        (Sparse(10, (), "data"), 1000, b"1\n", "middle of a sparse"),
        (Sparse(10, (), "data"), 1000, b"x\n" + bytes(510), "b'x'"),
        (Sparse(10, (), "data"), 1000, bytes(512), "no list of numbers"),
        (Sparse(10, (), "data"), 1000, lines(1 << 20), "pieces"),
        (Sparse(10, (), "data"), 100, lines(1, 0, 10), "longer than the file"),
        (Sparse(10, (), "blocks"), 100, b"", "middle of a sparse"),
    ],
)
def test_maps_that_are_refused(sparse: Sparse, size: int, data: bytes, word: str) -> None:
    with pytest.raises(LayerError, match=word):
        read(sparse, size, data)


def test_records_give_map_and_name() -> None:
    prefix = b"GNU.sparse."
    assert of_pax({b"path": b"x"}) is None
    pairs = {prefix + b"size": b"9", prefix + b"offset": b"0,4", prefix + b"numbytes": b"1,2", prefix + b"name": b"n"}
    assert of_pax(pairs) == (Sparse(9, ((0, 1), (4, 2))), b"n")
    assert of_pax({prefix + b"size": b"9", prefix + b"map": b"0,1,4,2"}) == (Sparse(9, ((0, 1), (4, 2))), None)
