"""What every rank knows of the global batch before its forward pass, from one sum over the world."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import harness
import numpy as np
import pytest
import torch
import torch.distributed as dist

from emu2_megatron.config.schema import Config
from emu2_megatron.data.sequence import PADDING, START, TEXT_TARGET, VISUAL_TARGET, Features, PackedSequence
from emu2_megatron.model.parameters import fingerprint
from emu2_megatron.parallel import topology, wrap

PICTURES = [0, 1, 2, 3, 1, 0, 2, 1]
"""Of every sequence. Of the first of three, embeddings are loaded instead."""
PADDED = [10, 0, 0, 1, 7, 24, 0, 3]
"""Tokens at the end of every sequence."""


def batch(encoder: str) -> list[PackedSequence]:
    sequences = harness.batch(PICTURES, 0)
    for sequence, padded in zip(sequences, PADDED, strict=True):
        end = harness.LENGTH - padded
        assert not (sequence.roles_S[end:] & VISUAL_TARGET).any()
        sequence.roles_S[end:] = PADDING
        sequence.roles_S[end : end + 1] |= START
        if len(sequence.pictures) == 3:
            width = harness.MODEL.encoder.hidden_size
            sequence.pictures[0] = Features(torch.zeros(harness.QUERIES, width), encoder)
    return sequences


def worker(_rank: int, config: Config) -> dict[str, Any]:
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    sequences = batch(fingerprint(engine.encoder, config))
    sums: list[Callable[..., Any]] = []
    real = dist.all_reduce
    with mock.patch.object(dist, "all_reduce", lambda *args, **group: sums.append(real) or real(*args, **group)):
        prepared = engine.step.prepare([sequences[i] for i in here.slots(8)])
    return {"counts": prepared.counts.tolist(), "sums": len(sums)}


@pytest.mark.parametrize(
    ("world_size", "layout", "encoded"),
    [
        (1, {}, [9]),
        (2, {}, [0 + 1 + 2 + 2, 1 + 0 + 2 + 1]),
        (4, {"pp": 2}, [5, 4]),
        (4, {"tp": 2, "sp": True}, [5, 4]),
        (4, {}, [1, 4, 1, 3]),
    ],
)
def test_every_rank_knows_the_counts(world_size: int, layout: dict[str, Any], encoded: list[int]) -> None:
    sequences = batch("")
    text, visual = (
        sum(int(np.count_nonzero(s.roles_S & role)) for s in sequences) for role in (TEXT_TARGET, VISUAL_TARGET)
    )
    for result in harness.run(world_size, worker, harness.config(**layout)):
        assert result == {"counts": [text, visual, 10, 8, 9, sum(PADDED), *encoded], "sums": 1}
