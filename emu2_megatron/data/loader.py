"""The order of the data, which no layout can change, and the thread that prepares the next batch.

The global batch has G = training.global_batch_size slots, each an endless stream of samples of its own. In epoch e,
slot s visits the positions s, s + G, s + 2G, ... of a permutation of all samples seeded by (training.seed, e); step t
of the run takes one packed row from every slot. A rank reads the slots it is given, so whoever reads a slot sees the
same rows, and together the slots visit every sample exactly once in an epoch. (With fewer samples than slots, slots
share samples.) The place in the data is one integer a slot: how many samples it has consumed.
"""

import logging
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, partial
from threading import Event
from types import TracebackType

import numpy as np

from emu2_megatron.config.schema import Config
from emu2_megatron.data.packing import pack_row
from emu2_megatron.data.samples import Sample, build_sample, reason_of
from emu2_megatron.data.sequence import PackedSequence
from emu2_megatron.data.shards import ShardIndex
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import CheckpointError, ConfigError, DataError

logger = logging.getLogger(__name__)


def sample_at(slot: int, cursor: int, num_slots: int, num_samples: int, seed: int) -> tuple[int, int]:
    """(epoch, sample index) of the sample that a slot visits after `cursor` others."""
    in_epoch = len(range(slot, num_samples, num_slots)) or 1  # fewer samples than slots: one each epoch, shared
    epoch, step = divmod(cursor, in_epoch)
    return epoch, int(_permutation(seed, epoch, num_samples)[(slot + step * num_slots) % num_samples])


@lru_cache(maxsize=2)  # slots cross into the next epoch at slightly different times
def _permutation(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    return np.random.default_rng([seed, 0, epoch]).permutation(num_samples)


class Loader:
    """Iterator over a rank's share of each global batch: `next` gives a row for each of its slots, in their order.

    One background thread reads, decodes and packs the next step meanwhile; what goes wrong there is raised by `next`.
    Samples that cannot be used (any DataError) are skipped and logged once each with shard and key. `close`, or leaving
    a `with` block, ends the thread.

    Attributes: `index` (the samples), `slots`, `skipped` (how often a sample was skipped, by reason, up to the last
    batch handed out since this loader was made).

    Raises ConfigError if the tokenizer's vocabulary is not the model's; DataError as `ShardIndex` does; ValueError for
    slots that are not distinct numbers below global_batch_size. `next` raises DataError once every sample has proved
    bad.
    """

    def __init__(
        self, config: Config, tokenizer: Tokenizer, slots: Sequence[int], index: ShardIndex | None = None
    ) -> None:
        """`index` saves scanning config.data.shards again where the caller has done so."""
        if tokenizer.vocab_size != config.model.decoder.vocab_size:
            raise ConfigError(
                f"data.tokenizer has {tokenizer.vocab_size} tokens, added ones included, "
                f"but model.decoder.vocab_size is {config.model.decoder.vocab_size}"
            )
        num_slots = config.training.global_batch_size
        if len(set(slots)) != len(slots) or not all(0 <= slot < num_slots for slot in slots):
            raise ValueError(f"slots must be distinct and within 0..{num_slots - 1}, got {list(slots)}")
        self.slots = tuple(slots)
        self.index = index if index is not None else ShardIndex(config.data.shards)
        self.skipped: Counter[str] = Counter()
        self._config = config
        self._tokenizer = tokenizer
        self._places = {slot: _Place(0, None) for slot in self.slots}
        self._logged: set[int] = set()
        self._closed = Event()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="emu2-loader")
        self._prefetch: Future[_Step] | None = None

    def __iter__(self) -> "Loader":
        return self

    def __next__(self) -> list[PackedSequence]:
        if self._closed.is_set():
            raise RuntimeError("this loader is closed")
        pending = self._prefetch or self._thread.submit(self._step, self._places)
        self._prefetch = None  # if the step failed, the next call tries it again from the same place
        step = pending.result()
        self._places = step.places
        self.skipped.update(step.skipped)
        self._prefetch = self._thread.submit(self._step, self._places)
        return step.rows

    def state(self) -> dict[int, int]:
        """Samples consumed by each slot, skipped ones included, up to the last batch handed out."""
        return {slot: place.cursor for slot, place in self._places.items()}

    def load_state(self, state: Mapping[int, int]) -> None:
        """Continues from a `state`, one's own or those of all ranks merged: slots of others are ignored.

        Raises CheckpointError if one of this loader's slots is missing or has no valid count.
        """
        for slot in self.slots:
            if not isinstance(state.get(slot), int) or state[slot] < 0:
                raise CheckpointError(
                    f"the saved place in the data has no valid count for slot {slot} "
                    f"(saved slots: {len(state)}); training.global_batch_size must be that of the saved run"
                )
        self._places = {slot: _Place(state[slot], None) for slot in self.slots}
        self._prefetch = None  # a step already being prepared touches nothing but its own copy of the places

    def close(self) -> None:
        """Ends the background thread, within about one sample's time. `next` cannot be called any more."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _step(self, places: "dict[int, _Place]") -> "_Step":
        """Prepares one step; runs in the background thread."""
        skipped: Counter[str] = Counter()
        rows: list[PackedSequence] = []
        after: dict[int, _Place] = {}
        for slot in self.slots:
            stream = _SlotStream(places[slot], partial(self._read, slot, skipped))
            rows.append(pack_row(stream, self._config.data.sequence_length, self._tokenizer.pad))
            after[slot] = stream.place
        return _Step(rows, after, skipped)

    def _read(self, slot: int, skipped: Counter[str], cursor: int) -> tuple[int, Sample]:
        """The first usable sample of a slot from `cursor` on, and the cursor it is at."""
        training = self._config.training
        bad: set[int] = set()
        while len(bad) < len(self.index):
            if self._closed.is_set():
                raise RuntimeError("this loader is closed")
            epoch, i = sample_at(slot, cursor, training.global_batch_size, len(self.index), training.seed)
            shard, offset = self.index.locate(i)
            key = f"(at byte {offset})"
            try:
                raw = self.index.read(i)
                key = raw.key
                return cursor, build_sample(raw, self._tokenizer, self._config, epoch, i)
            except DataError as error:
                last = error
                bad.add(i)
                skipped[reason_of(error)] += 1
                if i not in self._logged:
                    self._logged.add(i)
                    logger.warning("skipped sample %s of %s: %s", key, shard, error)
            cursor += 1
        raise DataError(
            f"none of the {len(self.index)} samples can be used, the last one: {last} (reasons, for all slots of this "
            f"step: {dict(skipped)})"
        ) from last


@dataclass(frozen=True)
class _Place:
    cursor: int
    pending: Sample | None
    """The sample at the cursor, if it has been read already: it did not fit the last row."""


@dataclass(frozen=True)
class _Step:
    rows: list[PackedSequence]
    places: dict[int, _Place]
    skipped: Counter[str]


class _SlotStream:
    """A slot's usable samples from a place on (a `packing.SampleStream`)."""

    def __init__(self, place: _Place, read: Callable[[int], tuple[int, Sample]]) -> None:
        self.place = place
        self._read = read

    def peek(self) -> Sample:
        if self.place.pending is None:
            self.place = _Place(*self._read(self.place.cursor))
        assert self.place.pending is not None
        return self.place.pending

    def advance(self) -> None:
        self.place = _Place(self.place.cursor + 1, None)
