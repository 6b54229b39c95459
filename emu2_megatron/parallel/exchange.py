"""What the ranks of one replica tell each other: token ids before the step, visual embeddings before the decoder,
their gradients after it.

Every rank of a replica loads its own sequences and encodes its own pictures. Sequence i of the replica's n belongs to
rank i mod G, as that rank's (i // G)-th; `RowMap` says where its visual embeddings stand after gathering. Gathered
blocks have equal size (the largest rank's), the rest is padding that no index points to.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from emu2_megatron.data.sequence import VISUAL, PackedSequence


def gather_sequences(
    own: list[PackedSequence], count: int, length: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and roles of all sequences of the replica.

    Args:
        own: this rank's sequences, in order.
        count: sequences n of the replica.
        length: tokens S of a sequence.

    Returns:
        int64 [n, S] tokens and uint8 [n, S] roles, on the CPU.
    """
    size = group.size()
    most = -(-count // size)
    packed = torch.zeros(most, 2, length, dtype=torch.int32)
    for i, sequence in enumerate(own):
        packed[i, 0] = torch.from_numpy(np.ascontiguousarray(sequence.tokens_S, dtype=np.int32))
        packed[i, 1] = torch.from_numpy(np.ascontiguousarray(sequence.roles_S, dtype=np.int32))
    gathered = torch.empty(size * most, 2, length, dtype=torch.int32, device=device)
    dist.all_gather_into_tensor(gathered, packed.to(device), group=group)
    by_sequence = gathered.view(size, most, 2, length).transpose(0, 1).flatten(0, 1)[:count].cpu()
    return by_sequence[:, 0].long(), by_sequence[:, 1].to(torch.uint8)


@dataclass(frozen=True)
class RowMap:
    """Where the visual embeddings of a replica's sequences are, after gathering."""

    block: int
    """Rows each rank contributes, padding included."""
    rows: list[Tensor]
    """For every sequence, int64 [R_i] rows of the gathered matrix, in the order of its visual tokens."""


def row_map(roles_NS: Tensor, replica_size: int) -> RowMap:
    """Locate the visual embeddings of every sequence, given the roles of all of them."""
    counts = (roles_NS & VISUAL).bool().sum(1).tolist()
    filled = [0] * replica_size
    starts = []
    for i, count in enumerate(counts):
        owner = i % replica_size
        starts.append((owner, filled[owner]))
        filled[owner] += count
    block = max(filled)
    rows = [torch.arange(count) + owner * block + start for (owner, start), count in zip(starts, counts, strict=True)]
    return RowMap(block, rows)


def gather_rows(own_RE: Tensor, block: int, group: dist.ProcessGroup) -> Tensor:
    """All ranks' rows, [G · block, E]; rank g's come first in block g, padding after them is zero."""
    padded = own_RE.new_zeros(block, own_RE.shape[1])
    padded[: len(own_RE)] = own_RE
    gathered = own_RE.new_empty(group.size() * block, own_RE.shape[1])
    if block:
        dist.all_gather_into_tensor(gathered, padded, group=group)
    return gathered


def return_rows(gathered_RE: Tensor, own_rows: int, group: dist.ProcessGroup) -> Tensor:
    """The reverse: sum what all ranks have for each row, and give every rank its own rows, [own_rows, E]."""
    block = len(gathered_RE) // group.size()
    mine = gathered_RE.new_empty(block, gathered_RE.shape[1])
    if block:
        dist.reduce_scatter_tensor(mine, gathered_RE, group=group)
    return mine[:own_rows]
