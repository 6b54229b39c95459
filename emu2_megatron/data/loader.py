"""The rows of a rank's slots, step after step, prepared by a background thread.

A step is: read and probe samples (`data/samples.py`) in the order of `data/order.py`, choose those that share a row
(`data/packing.py`), decode what the rows show, all at once (`data/decode.py`), and put the rows together without what
could not be decoded. The thread never forks, so DALI may run in it.

The place in the data is a few integers a slot: how many samples it has drawn of each source, and which of those still
wait for a row. Nothing else is needed to go on exactly, on any number of ranks.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from threading import Event
from types import TracebackType
from typing import Any, NamedTuple

from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.data.crops import crop_sample, decode_crops
from emu2_megatron.data.decode import decode
from emu2_megatron.data.order import sample_at, shares, source_at, sources_of_step
from emu2_megatron.data.packing import Cost, assemble, choose, cost, total
from emu2_megatron.data.quarantine import Quarantine
from emu2_megatron.data.samples import Sample, build_sample, reason_of
from emu2_megatron.data.sequence import Crop, Features, PackedSequence, Picture
from emu2_megatron.data.shards import RawSample, ShardIndex
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import CheckpointError, ConfigError, DataError, NotWanted

logger = logging.getLogger(__name__)

MOST_BAD_IN_A_ROW = 10_000
"""Samples of a slot that may prove bad one after the other, whatever data.max_bad_share allows."""

State = dict[str, Any]
"""A loader's place as JSON: `slots` (by number: `rows`, `drawn`, `waiting`, `used`), what the order of the data depends
on besides (`samples` of each source, `global_batch_size`, `seed`), and how sources were blended."""


class Loader:
    """Iterator over a rank's share of each global batch: `next` gives a row for each of its slots, in their order.

    One background thread prepares the next step meanwhile; what goes wrong there is raised by `next`. Samples that
    cannot be used (any DataError) are skipped, counted and listed. `close`, or leaving a `with` block, ends the thread.

    Attributes: `sources` (the samples of each), `slots`, `skipped` (how often a sample was skipped, by reason, up to
    the last batch handed out since this loader was made).

    Raises ConfigError if the tokenizer's vocabulary is not the model's; DataError as `ShardIndex` does; ValueError for
    slots that are not distinct numbers below global_batch_size. `next` raises DataError once more than
    data.max_bad_share of the samples, or all of them, have proved bad.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer | None,
        slots: Sequence[int],
        sources: Sequence[ShardIndex] | None = None,
        quarantine: Path | None = None,
    ) -> None:
        """`tokenizer` is None for the decoders of pictures and clips, which read no text; `sources` saves opening
        config.data.shards again; `quarantine` is a file that bad samples are listed in."""
        if tokenizer is not None and tokenizer.vocab_size != config.model.decoder.vocab_size:
            raise ConfigError(
                f"data.tokenizer has {tokenizer.vocab_size} tokens, added ones included, "
                f"but model.decoder.vocab_size is {config.model.decoder.vocab_size}"
            )
        num_slots = config.training.global_batch_size
        if len(set(slots)) != len(slots) or not all(0 <= slot < num_slots for slot in slots):
            raise ValueError(f"slots must be distinct and within 0..{num_slots - 1}, got {list(slots)}")
        self.slots = tuple(slots)
        self.sources = list(sources) if sources is not None else open_sources(config)
        self.skipped: Counter[str] = Counter()
        self._config = config
        self._pad = tokenizer.pad if tokenizer is not None else 0
        self._build: Callable[[RawSample, int, int], Sample]
        self._decode: Callable[[list[Any]], Sequence[Sequence[Crop] | Tensor | DataError]]
        if tokenizer is not None:
            self._build = lambda raw, epoch, index: build_sample(raw, tokenizer, config, epoch, index)
            self._decode = lambda visuals: decode(visuals, config.model.encoder.image_size)
        else:
            self._build = lambda raw, epoch, index: crop_sample(raw, config, epoch, index)
            self._decode = lambda visuals: decode_crops(visuals, config)
        self._shares = shares(config.data)
        # Numbers go on from source to source: samples of different sources must not draw alike.
        self._firsts = [0, *accumulate(map(len, self.sources))]
        start = _Place(0, (0,) * len(self.sources), (), Cost(0, 0))
        self._places = {slot: start for slot in self.slots}
        self._quarantine = Quarantine(quarantine, config.data.max_bad_share)
        self._warned = False
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

    @property
    def bad(self) -> int:
        """Samples that have proved bad since this loader was made, each counted once; some may be ahead of the last
        batch handed out."""
        return self._quarantine.distinct

    def state(self) -> State:
        """The place after the last batch handed out."""
        slots = {str(slot): place.state() for slot, place in self._places.items()}
        return {**self._order(), **self._blend(), "slots": slots}

    def load_state(self, state: State) -> None:
        """Continues from a `state`, one's own or those of all ranks merged: slots of others are ignored.

        Sources may be blended otherwise from here on: each goes on where it was. Raises CheckpointError if the place is
        of other data or lacks one of this loader's slots.
        """
        for name, value in self._order().items():
            if state.get(name) != value:
                raise CheckpointError(
                    f"the saved place in the data is of another order: {name} was {state.get(name)} and is {value}; "
                    "give data.shards, training.global_batch_size and training.seed as the saved run had them"
                )
        for name, value in self._blend().items():
            if state.get(name) != value:
                logger.warning("data.%s was %s in the saved run and is %s from here on", name, state.get(name), value)
        self._places = {slot: self._restored(slot, state) for slot in self.slots}
        self._prefetch = None  # a step already being prepared touches nothing but its own copy of the places

    def close(self) -> None:
        """Ends the background thread; what is being decoded is finished first. `next` cannot be called any more."""
        self._closed.set()
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> "Loader":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _order(self) -> State:
        """What decides which sample of a source a slot reads next, besides its own place."""
        training = self._config.training
        return {
            "samples": [len(source) for source in self.sources],
            "global_batch_size": training.global_batch_size,
            "seed": training.seed,
        }

    def _blend(self) -> State:
        data = self._config.data
        return {"weights": list(data.weights), "samples_per_step": list(data.samples_per_step)}

    def _restored(self, slot: int, state: State) -> "_Place":
        slots = state.get("slots", {})
        try:
            saved = slots[str(slot)]
            place = _Place(
                int(saved["rows"]),
                tuple(map(int, saved["drawn"])),
                tuple(_Drawn(int(source), int(cursor)) for source, cursor in saved["waiting"]),
                Cost(*map(int, saved["used"])),
            )
            if len(place.drawn) != len(self.sources) or min(*place.drawn, *place.used, place.rows) < 0:
                raise ValueError(saved)
            return place
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(
                f"the saved place in the data has no valid entry for slot {slot} (saved slots: {len(slots)}); "
                "training.global_batch_size must be that of the saved run"
            ) from error

    # What follows runs in the background thread -----------------------------------------------------------------------

    def _step(self, places: "dict[int, _Place]") -> "_Step":
        """Prepares one step."""
        skipped: Counter[str] = Counter()
        rows: list[list[_Drawn]] = []
        after: dict[int, _Place] = {}
        for slot in self.slots:
            row, after[slot] = self._fill(slot, places[slot], skipped)
            rows.append(row)
        return _Step(self._decoded(rows, skipped), after, skipped)

    def _fill(self, slot: int, place: "_Place", skipped: Counter[str]) -> "tuple[list[_Drawn], _Place]":
        """The samples of a slot's next row, and its place after them."""
        data = self._config.data
        drawn = list(place.drawn)
        # After a restart, what waits has to be read again.
        read = [waiting if waiting.sample else self._read(slot, waiting, skipped) for waiting in place.pool]
        pool = [waiting for waiting in read if waiting is not None]
        if data.samples_per_step:
            num_slots = self._config.training.global_batch_size
            for source in sources_of_step(slot, place.rows, num_slots, data.samples_per_step):
                pool += self._draw(slot, source, drawn, skipped)
        row: list[_Drawn] = []
        filled = Cost(0, 0)
        while True:
            if not data.samples_per_step:
                self._refill(slot, pool, drawn, skipped)
            costs = [cost(waiting.content) for waiting in pool]
            seen = total([place.used, filled, *costs])
            index = choose(costs, filled, data.sequence_length, seen.pictures / max(1, seen.tokens))
            if index is None:
                break
            row.append(pool.pop(index))
            filled = total([filled, costs[index]])
        if data.samples_per_step:
            self._check_waiting(slot, len(pool))
        return row, _Place(place.rows + 1, tuple(drawn), tuple(pool), total([place.used, filled]))

    def _check_waiting(self, slot: int, waiting: int) -> None:
        """Samples that are read but find no room pile up, if a step has more of them than its rows hold."""
        data, training = self._config.data, self._config.training
        if 2 * waiting <= data.packing_buffer or (self._warned and waiting <= data.packing_buffer):
            return
        full = (
            f"data.samples_per_step: {sum(data.samples_per_step)} samples a step may not fit "
            f"{training.global_batch_size} rows of {data.sequence_length} tokens: {waiting} wait for a row of slot "
            f"{slot}, data.packing_buffer is {data.packing_buffer}"
        )
        if waiting > data.packing_buffer:
            raise DataError(
                f"{full}; lower data.samples_per_step, or raise data.packing_buffer if few samples too many wait "
                "(a run that resumes may change both)"
            )
        self._warned = True
        logger.warning("%s; if it grows beyond, the run ends", full)

    def _refill(self, slot: int, pool: "list[_Drawn]", drawn: list[int], skipped: Counter[str]) -> None:
        """Draw until the pool has data.packing_buffer samples."""
        bad = 0
        number = self._firsts[-1]
        while len(pool) < self._config.data.packing_buffer:
            found = self._draw(slot, source_at(slot, sum(drawn), self._shares), drawn, skipped)
            pool += found
            bad = 0 if found else bad + 1
            # Of a single good sample among few, this overlooks one in e^10.
            if bad > min(100 + 10 * number, MOST_BAD_IN_A_ROW):
                raise DataError(
                    f"none of the last {bad} samples that slot {slot} read can be used; of slots up to it, this step: "
                    f"{dict(skipped)}; data.shards have {number} samples"
                )

    def _draw(self, slot: int, source: int, drawn: list[int], skipped: Counter[str]) -> "list[_Drawn]":
        """The next sample of a source, or none if it is bad."""
        drawn[source] += 1
        new = self._read(slot, _Drawn(source, drawn[source] - 1), skipped)
        return [new] if new is not None else []

    def _read(self, slot: int, drawn: "_Drawn", skipped: Counter[str]) -> "_Drawn | None":
        """A drawn sample with its content; None if it is bad."""
        if self._closed.is_set():
            raise RuntimeError("this loader is closed")
        epoch, number = self._sample_at(slot, drawn.source, drawn.cursor)
        index = self.sources[drawn.source]
        shard, offset = index.locate(number)
        key = f"(at byte {offset})" if offset >= 0 else f"(sample {number} of its source)"
        try:
            raw = index.read(number)
            key = raw.key
            sample = self._build(raw, epoch, self._firsts[drawn.source] + number)
        except NotWanted as error:
            skipped[reason_of(error)] += 1
            return None
        except DataError as error:
            skipped[reason_of(error)] += 1
            self._quarantine.add(shard, offset, key, error)
            return None
        self._quarantine.good()
        return drawn._replace(sample=sample, place=(shard, offset))

    def _sample_at(self, slot: int, source: int, cursor: int) -> tuple[int, int]:
        training = self._config.training
        key = (training.seed, source)
        return sample_at(slot, cursor, training.global_batch_size, len(self.sources[source]), key)

    def _decoded(self, rows: "list[list[_Drawn]]", skipped: Counter[str]) -> list[PackedSequence]:
        """Rows with their pictures; samples that cannot be decoded are left out."""
        shown = [visual for row in rows for drawn in row for visual in drawn.content.visuals]
        encoded = [visual for visual in shown if not isinstance(visual, Features)]
        decoded = iter(self._decode(encoded))
        sequences = []
        for row in rows:
            whole = [(drawn, self._with_pictures(drawn, decoded, skipped)) for drawn in row]
            kept = [(drawn.place[0], sample) for drawn, sample in whole if sample is not None]
            samples = [sample for _, sample in kept]
            sequences.append(assemble(samples, self._config.data.sequence_length, self._pad))
            sequences[-1].shards = [shard for shard, _ in kept]
        return sequences

    def _with_pictures(
        self, drawn: "_Drawn", decoded: Iterator[Sequence[Crop] | Tensor | DataError], skipped: Counter[str]
    ) -> tuple[Sample, list[Picture | Crop]] | None:
        """A sample and all it shows; None if something in it could not be decoded. Takes its share of `decoded`."""
        sample = drawn.content
        pictures: list[Picture | Crop] = []
        errors: list[DataError] = []
        for visual in sample.visuals:
            result = visual if isinstance(visual, Features) else next(decoded)
            if isinstance(result, DataError):
                errors.append(result)
            else:
                pictures += [result] if isinstance(result, Features) else list(result)
        if errors:
            skipped[reason_of(errors[0])] += 1
            self._quarantine.add(*drawn.place, sample.key, errors[0], new=False)
            return None
        return sample, pictures


def open_sources(config: Config) -> list[ShardIndex]:
    """The samples of data.shards: a source for each entry if they are blended, else one of all. Raises DataError as
    `ShardIndex` does."""
    data = config.data
    if data.weights or data.samples_per_step:
        return [ShardIndex([pattern]) for pattern in data.shards]
    return [ShardIndex(data.shards)]


def merged(states: Sequence[State]) -> State:
    """The place of all ranks, from the `state` of each."""
    slots = {slot: place for state in states for slot, place in state["slots"].items()}
    return {**states[0], "slots": dict(sorted(slots.items(), key=lambda item: int(item[0])))}


class _Drawn(NamedTuple):
    """A sample that a slot has drawn."""

    source: int
    cursor: int
    """How many the slot had drawn of the source before."""
    sample: Sample | None = None
    """Its content; None before it is read."""
    place: tuple[str, int] = ("", 0)
    """Shard, and the byte in it."""

    @property
    def content(self) -> Sample:
        """The sample, which has been read."""
        assert self.sample is not None
        return self.sample


@dataclass(frozen=True)
class _Place:
    """Where a slot is."""

    rows: int
    drawn: tuple[int, ...]
    """Samples drawn of each source, bad ones included."""
    pool: tuple[_Drawn, ...]
    """Those of them that wait for a row, oldest first."""
    used: Cost
    """All that has gone into rows."""

    def state(self) -> dict[str, Any]:
        """As JSON."""
        waiting = [[drawn.source, drawn.cursor] for drawn in self.pool]
        return {"rows": self.rows, "drawn": list(self.drawn), "waiting": waiting, "used": list(self.used)}


@dataclass(frozen=True)
class _Step:
    rows: list[PackedSequence]
    places: dict[int, _Place]
    skipped: Counter[str]
