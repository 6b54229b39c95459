"""Who loads, encodes and holds what within a replica, worked out by hand."""

from typing import Any

import harness
import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, Features, PackedSequence
from emu2_megatron.parallel import exchange
from emu2_megatron.parallel.exchange import FIRST, STORED, marked_roles, place
from emu2_megatron.parallel.topology import Topology


def roles(pictures: list[list[tuple[int, bool]]]) -> torch.Tensor:
    """Marked roles of sequences whose pictures are (queries, stored), with one token before each picture."""
    rows = torch.zeros(len(pictures), 64, dtype=torch.uint8)
    for i, sequence in enumerate(pictures):
        at = 1
        for queries, stored in sequence:
            rows[i, at : at + queries] = VISUAL
            rows[i, at] |= FIRST | STORED * stored
            at += queries + (i % 2)  # in odd sequences a token between two pictures, in even ones none
    return rows


def test_marked_roles() -> None:
    """Two pictures side by side, of 2 and 1 embeddings, the second one stored; other bits stay."""
    visual = VISUAL | VISUAL_TARGET
    sequence = PackedSequence(
        np.arange(5),
        np.array([0, visual, visual, VISUAL, TEXT_TARGET], dtype=np.uint8),
        [np.zeros((3, 2, 2), np.uint8), Features(torch.zeros(1, 4), "")],
        [2, 1],
    )
    assert marked_roles(sequence).tolist() == [0, visual | FIRST, visual, VISUAL | FIRST | STORED, TEXT_TARGET]
    assert sequence.roles_S[1] == visual, "the sequence itself is left alone"


def test_even_ranks_keep_what_they_loaded() -> None:
    """Two ranks, sequences 0, 2, 4 on rank 0 (pictures of 2 and 3 embeddings), 1 and 3 on rank 1 (4 and 1)."""
    got = place(roles([[(2, False)], [(4, False)], [], [(1, False)], [(3, False)]]), 2)
    assert not got.sent_GG.any()
    assert got.queries == [[2, 3], [4, 1]] and got.block == 5
    assert [rows.tolist() for rows in got.rows] == [[0, 1], [5, 6, 7, 8], [], [9], [2, 3, 4]]


def test_a_full_rank_gives_its_last_pictures() -> None:
    """Rank 0 loads pictures a..e (queries 1, 2, 3, 4, 5) and one stored one (2), rank 1 none, rank 2 one (1).

    Six to encode on three ranks: two each. Rank 0 keeps a and b, gives c and d to rank 1 and e to rank 2. Blocks are
    a b stored: 1 + 2 + 2 rows; c d: 3 + 4 rows; own, e: 1 + 5 rows. So a block is 7 rows.
    """
    full = [(1, False), (2, False), (2, True), (3, False), (4, False), (5, False)]
    got = place(roles([full, [], [(1, False)]]), 3)
    assert got.sent_GG.tolist() == [[0, 2, 1], [0, 0, 0], [0, 0, 0]]
    assert got.queries == [[1, 2], [3, 4], [1, 5]] and got.block == 7
    stored, c, d, e = [3, 4], [7, 8, 9], [10, 11, 12, 13], [15, 16, 17, 18, 19]
    assert got.rows[0].tolist() == [0, 1, 2, *stored, *c, *d, *e]
    assert got.rows[1].tolist() == [] and got.rows[2].tolist() == [14]


@given(
    pictures=st.lists(st.lists(st.tuples(st.integers(1, 9), st.booleans()), max_size=6), min_size=1, max_size=12),
    size=st.integers(1, 5),
)
def test_every_picture_has_one_place(pictures: list[list[tuple[int, bool]]], size: int) -> None:
    """Shares differ by one at most, as few as possible move, and rows of different embeddings are different."""
    got = place(roles(pictures), size)
    shares = [len(queries) for queries in got.queries]
    loaded = [sum(not stored for s in pictures[rank::size] for _, stored in s) for rank in range(size)]
    assert max(shares) - min(shares) <= 1 and sum(shares) == sum(loaded)
    assert got.sent_GG.sum() == sum(max(0, had - has) for had, has in zip(loaded, shares, strict=True))
    assert (np.array(loaded) - got.sent_GG.sum(1) + got.sent_GG.sum(0)).tolist() == shares
    # Who is above the mean and gives, gives down to its upper or lower whole number, never below.
    assert all(has >= min(had, sum(loaded) // size) for had, has in zip(loaded, shares, strict=True))
    rows = torch.cat(got.rows).tolist()
    assert len(set(rows)) == len(rows) == sum(queries for sequence in pictures for queries, _ in sequence)
    assert all(0 <= row < got.block * size for row in rows)


def send(_rank: int, counts: list[int]) -> dict[str, Any]:
    import torch.distributed as dist

    group, rank = dist.group.WORLD, dist.get_rank()
    assert group is not None
    pictures = [[(1, False)] * count for count in counts]
    own = [torch.full((3, 2, 2), 10 * rank + i, dtype=torch.uint8) for i in range(counts[rank])]
    got = exchange.share_pictures(own, place(roles(pictures), len(counts)), 2, group, torch.device("cpu"))
    return {"pictures": [int(picture.unique()) for picture in got]}


@pytest.mark.parametrize(
    "counts, expected",
    [
        ([5, 0, 1], [[0, 1], [2, 3], [20, 4]]),
        ([0, 4, 2], [[12, 13], [10, 11], [20, 21]]),
        ([1, 1, 1], [[0], [10], [20]]),
        ([0, 0, 1], [[], [], [20]]),
    ],
)
def test_pictures_travel(counts: list[int], expected: list[list[int]]) -> None:
    """Rank r's picture i is filled with 10 r + i."""
    assert [result["pictures"] for result in harness.run(3, send, counts)] == expected


def test_slots_are_shared_out_once() -> None:
    """TP2 PP3 DP2: every sequence has one loader, and a replica's sequences stay in the replica."""
    places = [
        Topology(0, 12, tp, 2, 0, 1, pp, 3, dp, 2, replica_rank=2 * pp + tp, replica_size=6)
        for dp in range(2) for pp in range(3) for tp in range(2)
    ]  # fmt: skip
    slots = [slot for place in places for slot in place.slots(20)]
    assert sorted(slots) == list(range(20))
    assert all((slot < 10) == (place.dp_rank == 0) for place in places for slot in place.slots(20))
