"""The order of the data, which no layout can change: which sample every slot of the global batch reads next.

The global batch has G = training.global_batch_size slots, each an endless stream of samples of its own. Of a source of
N samples, slot s visits in epoch e the positions s, s + G, s + 2G, ... of a permutation of range(N) keyed by
(training.seed, source, e), so together the slots visit every sample of the source exactly once in an epoch. (With fewer
samples than slots, slots share samples.) Which rank reads a slot is the layout's business.

Several sources are blended in one of two ways, both a function of counts alone:

    data.weights            a slot's k-th draw is from the source that owns the point frac(start of the slot + k *
                            golden ratio) of [0, 1), cut by the weights: any run of draws has each source's share, to
                            within a few draws
    data.samples_per_step   the draws of a step are exactly that many of each source, dealt out to the slots in turn
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate

from emu2_megatron.config.schema import DataConfig
from emu2_megatron.data.shuffle import position

_GOLDEN = 0x9E3779B97F4A7C15  # 2^64 / golden ratio, odd
_SPREAD = 0xC13FA9A902A6328F  # 2^64 / plastic number squared: slots begin at other points than their draws go to


def sample_at(slot: int, cursor: int, num_slots: int, num_samples: int, key: tuple[int, ...]) -> tuple[int, int]:
    """(epoch, sample number) of the sample of a source that a slot visits after `cursor` others."""
    in_epoch = len(range(slot, num_samples, num_slots)) or 1  # fewer samples than slots: one each epoch, shared
    epoch, step = divmod(cursor, in_epoch)
    return epoch, position((slot + step * num_slots) % num_samples, num_samples, (*key, epoch))


def source_at(slot: int, draw: int, weights: Sequence[float]) -> int:
    """The source of a slot's draw number `draw`, blended by weights."""
    point = (slot * _SPREAD + draw * _GOLDEN) % 2**64
    return bisect_right(_bounds(tuple(weights)), point)


@lru_cache
def _bounds(weights: tuple[float, ...]) -> list[int]:
    """Where on [0, 2^64) one source ends and the next begins."""
    total = sum(weights)
    return [int(share / total * 2**64) for share in accumulate(weights[:-1])]


def sources_of_step(slot: int, step: int, num_slots: int, samples_per_step: Sequence[int]) -> Iterator[int]:
    """The sources of a slot's draws in a step, blended by samples a step. Over all slots: exactly those numbers."""
    dealt = 0
    for source, count in enumerate(samples_per_step):
        # Sample c of the source since the run began goes to slot c + dealt: slots take turns in having one more.
        first = (slot - dealt - step * count) % num_slots
        yield from [source] * len(range(first, count, num_slots))
        dealt += count


def shares(data: DataConfig) -> list[float]:
    """The share of each source among the samples; they add up to 1."""
    given = data.weights or data.samples_per_step or (1.0,)
    return [weight / sum(given) for weight in given]
