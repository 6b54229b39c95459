"""What the ranks of one replica tell each other: token ids and pictures before the step, visual embeddings before the
decoder, their gradients after it.

Every rank of a replica loads its own sequences: sequence i of the replica's n belongs to rank i mod G, as that rank's
(i // G)-th. Pictures are then shared out evenly, whole: ranks that loaded more than their share hand the rest to ranks
that loaded fewer (`place`). After encoding, gathered blocks have equal size (the largest rank's); what is short of it
is padding that no index points to.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from emu2_megatron.data.sequence import VISUAL, Features, PackedSequence

# Bits that travel with the roles of a token, so that all ranks know all pictures.
FIRST = 8
"""The first visual embedding of a picture."""
STORED = 16
"""The first embedding of a picture whose embeddings were computed beforehand: nobody has to encode it."""


def marked_roles(sequence: PackedSequence) -> np.ndarray:
    """The sequence's roles with the bits FIRST and STORED, uint8 [S]."""
    roles_S = np.array(sequence.roles_S, dtype=np.uint8)
    firsts = np.cumsum([0, *sequence.queries[:-1]])[: len(sequence.queries)]
    marks = [FIRST | (STORED if isinstance(picture, Features) else 0) for picture in sequence.pictures]
    roles_S[np.flatnonzero(roles_S & VISUAL)[firsts]] |= np.array(marks, dtype=np.uint8)
    return roles_S


def gather_sequences(
    own: list[PackedSequence], count: int, length: int, group: dist.ProcessGroup, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and roles of all sequences of the replica.

    Args:
        own: this rank's sequences, in order.
        count: sequences n of the replica.
        length: tokens S of a sequence.

    Returns:
        int64 [n, S] tokens and uint8 [n, S] marked roles, on the CPU.
    """
    size = group.size()
    most = -(-count // size)
    packed = torch.zeros(most, 2, length, dtype=torch.int32)
    for i, sequence in enumerate(own):
        packed[i, 0] = torch.from_numpy(np.ascontiguousarray(sequence.tokens_S, dtype=np.int32))
        packed[i, 1] = torch.from_numpy(marked_roles(sequence).astype(np.int32))
    gathered = torch.empty(size * most, 2, length, dtype=torch.int32, device=device)
    dist.all_gather_into_tensor(gathered, packed.to(device), group=group)
    by_sequence = gathered.view(size, most, 2, length).transpose(0, 1).flatten(0, 1)[:count].cpu()
    return by_sequence[:, 0].long(), by_sequence[:, 1].to(torch.uint8)


@dataclass(frozen=True)
class Placement:
    """Who encodes which picture of a replica, and where its embeddings are after gathering."""

    queries: list[list[int]]
    """Of every rank: embeddings of each picture it encodes, in order: of its own ones, the first; then those it is
    sent, by sender."""
    sent_GG: np.ndarray
    """int64 [G, G]: pictures that rank s sends to rank d, at [s, d]; the last of its own, to the lowest d first."""
    block: int
    """Rows each rank contributes to the gathered matrix, padding included: those it encodes, then those it loaded."""
    rows: list[Tensor]
    """For every sequence, int64 [R_i] rows of the gathered matrix, in the order of its visual tokens."""


def place(roles_NS: Tensor, replica_size: int) -> Placement:
    """Share out the pictures of a replica, given the marked roles of all its sequences.

    A picture costs the encoder the same however many embeddings are wanted of it, so pictures are counted, not rows.
    """
    G = replica_size
    visual_N, roles_R = (roles_NS & VISUAL).bool(), roles_NS[(roles_NS & VISUAL).bool()].numpy()
    sequence_R = visual_N.nonzero()[:, 0].numpy()
    first_I = np.flatnonzero(roles_R & FIRST)
    queries_I = np.diff(first_I, append=len(roles_R))
    owner_I, stored_I = sequence_R[first_I] % G, (roles_R[first_I] & STORED) > 0

    loaded = [np.flatnonzero((owner_I == rank) & ~stored_I) for rank in range(G)]
    sent_GG = _even([len(pictures) for pictures in loaded])
    kept = [len(pictures) - sent for pictures, sent in zip(loaded, sent_GG.sum(1), strict=True)]
    encoded = [[pictures[:keep]] for pictures, keep in zip(loaded, kept, strict=True)]
    for source, (pictures, keep) in enumerate(zip(loaded, kept, strict=True)):
        for target, moved in enumerate(np.split(pictures[keep:], np.cumsum(sent_GG[source])[:-1])):
            encoded[target].append(moved)

    row_I = np.zeros(len(first_I), dtype=np.int64)  # within the block of the rank that contributes it
    rank_I = owner_I.copy()
    sizes, queries = [], []
    for rank in range(G):
        mine = np.concatenate(encoded[rank])
        block = np.concatenate([mine, np.flatnonzero((owner_I == rank) & stored_I)])
        ends = np.cumsum(queries_I[block])
        row_I[block], rank_I[block] = ends - queries_I[block], rank
        sizes.append(int(queries_I[block].sum()))
        queries.append(queries_I[mine].tolist())
    within_R = np.arange(len(roles_R)) - np.repeat(first_I, queries_I)
    rows_R = torch.from_numpy(np.repeat(rank_I * max(sizes) + row_I, queries_I) + within_R)
    rows = list(rows_R.split(visual_N.sum(1).tolist()))
    return Placement(queries, sent_GG, max(sizes), rows)


def _even(counts: list[int]) -> np.ndarray:
    """Pictures to send from rank to rank so that no two ranks differ by more than one; as few as possible move."""
    G = len(counts)
    base, extra = divmod(sum(counts), G)
    fullest = sorted(range(G), key=lambda rank: -counts[rank])[:extra]
    surplus = [count - base - (rank in fullest) for rank, count in enumerate(counts)]
    sent_GG = np.zeros((G, G), dtype=np.int64)
    target = 0
    for source in range(G):
        while surplus[source] > 0:
            while surplus[target] >= 0:
                target += 1
            moved = min(surplus[source], -surplus[target])
            sent_GG[source, target] = moved
            surplus[source] -= moved
            surplus[target] += moved
    return sent_GG


def share_pictures(
    own: list[Tensor], placement: Placement, image_size: int, group: dist.ProcessGroup, device: torch.device
) -> list[Tensor]:
    """The pictures that this rank encodes, uint8 [3, H, W] each, given those it loaded (on the CPU)."""
    sent_GG, rank = placement.sent_GG, group.rank()
    if not sent_GG.any():
        return own
    kept = len(own) - int(sent_GG[rank].sum())
    shape = (3, image_size, image_size)
    outgoing = torch.stack([*own[kept:], torch.empty(shape, dtype=torch.uint8)])[:-1].to(device)
    incoming = torch.empty(int(sent_GG[:, rank].sum()), *shape, dtype=torch.uint8, device=device)
    dist.all_to_all_single(incoming, outgoing, sent_GG[:, rank].tolist(), sent_GG[rank].tolist(), group=group)
    return [*own[:kept], *incoming]


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
