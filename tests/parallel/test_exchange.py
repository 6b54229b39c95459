"""Who owns what within a replica, worked out by hand."""

import torch

from emu2_megatron.data.sequence import VISUAL
from emu2_megatron.parallel.exchange import row_map
from emu2_megatron.parallel.topology import Topology


def test_row_map() -> None:
    """Five sequences with 2, 0, 1, 3, 2 visual tokens over two ranks: rank 0 has 2 + 1 + 2, rank 1 has 0 + 3."""
    roles = torch.zeros(5, 4, dtype=torch.uint8)
    for i, count in enumerate([2, 0, 1, 3, 2]):
        roles[i, 1 : 1 + count] = VISUAL
    got = row_map(roles, 2)
    assert got.block == 5
    assert [rows.tolist() for rows in got.rows] == [[0, 1], [], [2], [5, 6, 7], [3, 4]]


def test_slots_are_shared_out_once() -> None:
    """TP2 PP3 DP2: every sequence has one loader, and a replica's sequences stay in the replica."""
    places = [
        Topology(0, 12, tp, 2, 0, 1, pp, 3, dp, 2, replica_rank=2 * pp + tp, replica_size=6)
        for dp in range(2) for pp in range(3) for tp in range(2)
    ]  # fmt: skip
    slots = [slot for place in places for slot in place.slots(20)]
    assert sorted(slots) == list(range(20))
    assert all((slot < 10) == (place.dp_rank == 0) for place in places for slot in place.slots(20))
