"""Work handed out in shrinking pieces: all of it, once, and nothing to those who come late."""

import itertools

import pytest

from turbosparse import _native


def all_pieces(pieces: _native.Pieces, work: int, total: int, least: int, members: int) -> list[tuple[int, int]]:
    taken = itertools.takewhile(
        lambda piece: piece[0] < piece[1], (pieces.next(work, total, least, members) for _ in iter(int, 1))
    )
    return list(taken)


@pytest.mark.parametrize("members", [1, 2, 3, 64])
@pytest.mark.parametrize("total", [0, 1, 15, 16, 17, 1000, 32000])
@pytest.mark.parametrize("least", [1, 16, 112])
def test_pieces_cover_everything_once(total, least, members):
    taken = all_pieces(_native.Pieces(), 1, total, least, members)
    assert [row for first, last in taken for row in range(first, last)] == list(range(total))
    sizes = [last - first for first, last in taken]
    assert all(size % least == 0 for size in sizes[:-1]) and sizes == sorted(sizes, reverse=True)
    assert not sizes or sizes[0] < total / members + least  # the first leaves something for the others


@pytest.mark.parametrize("first", [1, 2**32 - 1])  # their numbers wrap around
def test_a_member_that_is_late_finds_the_next_work_begun(first):
    pieces, second = _native.Pieces(), (first + 1) % 2**32
    for work in range(2**30, first, 2**30):  # up to it, not further than half of all numbers at once
        all_pieces(pieces, work, 100, 16, 2)
    assert all_pieces(pieces, first, 100, 16, 2)
    begun = pieces.next(second, 50, 16, 2)
    assert begun == (0, 16)
    assert pieces.next(first, 100, 16, 2) == (100, 100)
    assert pieces.next(second, 50, 16, 2) == (16, 32)
