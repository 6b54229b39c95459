"""Several samples in one row of fixed length."""

from typing import Protocol

import numpy as np

from emu2_megatron.data.samples import Sample
from emu2_megatron.data.sequence import PackedSequence


class SampleStream(Protocol):
    """An endless source of samples that can be looked at before they are taken."""

    def peek(self) -> Sample:
        """The next sample, which stays the next one."""
        ...

    def advance(self) -> None:
        """Moves past the sample that `peek` returned."""
        ...


def pack_row(stream: SampleStream, sequence_length: int, pad: int) -> PackedSequence:
    """Takes samples from the stream, in order, until the next one does not fit; that one is left in the stream.

    Returns a row of exactly S = sequence_length tokens, filled up with `pad` tokens of role 0. Samples are at most S
    long, as `build_sample` makes them; a longer one is a ValueError.
    """
    samples: list[Sample] = []
    length = 0
    while length < sequence_length:
        sample = stream.peek()
        if length + len(sample.tokens_S) > sequence_length:
            break
        samples.append(sample)
        length += len(sample.tokens_S)
        stream.advance()
    if not samples:
        raise ValueError(f"a sample of {len(sample.tokens_S)} tokens does not fit a row of {sequence_length}")
    tokens_S = np.full(sequence_length, pad, dtype=np.int64)
    roles_S = np.zeros(sequence_length, dtype=np.uint8)
    tokens_S[:length] = np.concatenate([sample.tokens_S for sample in samples])
    roles_S[:length] = np.concatenate([sample.roles_S for sample in samples])
    return PackedSequence(
        tokens_S=tokens_S,
        roles_S=roles_S,
        pictures=[picture for sample in samples for picture in sample.pictures],
        queries=[queries for sample in samples for queries in sample.queries],
        keys=[sample.key for sample in samples],
    )
