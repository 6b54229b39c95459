"""Order, layout independence, resumption and the skipping of bad samples."""

import json
import logging
import random
import re
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import decode
from emu2_megatron.data.loader import Loader, State, merged
from emu2_megatron.data.order import sample_at
from emu2_megatron.data.samples import Sample, build_sample
from emu2_megatron.data.sequence import PADDING, START, VISUAL, PackedSequence
from emu2_megatron.data.shards import RawSample, ShardIndex, write_shard
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import CheckpointError, ConfigError, DataError

MakeConfig = Callable[..., Config]
NUM_SAMPLES = 23
BAD = {"s03": "picture is cut off or damaged", "s11": "sample does not follow the format", "s17": "nothing to learn"}


def _write(folder: Path, make_png: Callable[..., bytes], bad: dict[str, str]) -> str:
    """23 captions of different lengths in two shards; those named in `bad` are broken in the way it says."""
    words = random.Random(0)
    samples = []
    for i in range(NUM_SAMPLES):
        key = f"s{i:02d}"
        text = " ".join(["the"] * words.randint(1, 25))
        meta: dict[str, object] = {"kind": "caption", "text": text, "image": "0.png"}
        files = {"0.png": make_png((i, 0, 0), (2, 2))}
        match bad.get(key):
            case "picture is cut off or damaged":
                files = {"0.png": files["0.png"][:20]}
            case "sample does not follow the format":
                meta["kind"] = "unheard of"
            case "nothing to learn":
                meta = {"kind": "interleaved", "content": []}
        samples.append(RawSample(key, meta, files))
    write_shard(folder / "0.tar", samples[:10])
    write_shard(folder / "1.tar", samples[10:])
    return f"{folder}/*.tar"


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory, make_png: Callable[..., bytes]) -> str:
    return _write(tmp_path_factory.mktemp("good"), make_png, {})


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory, make_png: Callable[..., bytes]) -> str:
    return _write(tmp_path_factory.mktemp("mixed"), make_png, BAD)


def _rows(loader: Loader, steps: int) -> list[list[PackedSequence]]:
    return [next(loader) for _ in range(steps)]


def _content(row: PackedSequence) -> tuple[object, ...]:
    """Everything in a row, comparable."""
    pixels = [picture.numpy().tobytes() for picture in row.pictures]
    return row.tokens_S.tolist(), row.roles_S.tolist(), pixels, row.queries, row.keys


@pytest.mark.parametrize("owners", [1, 2, 4])
def test_rows_do_not_depend_on_who_reads_a_slot(
    owners: int, mixed: str, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    config = make_config(shards=(mixed,), max_bad_share=1.0)
    with Loader(config, tokenizer, range(4)) as whole:
        expected = [[_content(row) for row in step] for step in _rows(whole, 6)]
        end_state, skipped = whole.state(), whole.skipped
    states: list[State] = []
    counted: Counter[str] = Counter()
    for owner in range(owners):
        slots = [slot for slot in reversed(range(4)) if slot % owners == owner]
        with Loader(config, tokenizer, slots) as loader:
            for step, rows in enumerate(_rows(loader, 6)):
                assert [_content(row) for row in rows] == [expected[step][slot] for slot in slots]
            states.append(loader.state())
            counted += loader.skipped
    assert merged(states) == end_state and counted == skipped


def test_rows_are_the_slots_samples_in_order(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    """With nothing to choose from, keys of successive rows are the visits of sample_at, none left out or swapped."""
    with Loader(make_config(shards=(good,), packing_buffer=1), tokenizer, [2]) as loader:
        keys = [key for (row,) in _rows(loader, 12) for key in row.keys]
        place = loader.state()["slots"]["2"]
    expected = [f"s{sample_at(2, cursor, 4, NUM_SAMPLES, (7, 0))[1]:02d}" for cursor in range(len(keys))]
    assert keys == expected
    # One more has been drawn: it did not fit.
    assert (place["rows"], place["drawn"], place["waiting"]) == (12, [len(keys) + 1], [[0, len(keys)]])
    assert len(keys) > 6  # more than an epoch of this slot


@pytest.mark.parametrize("buffer", [1, 3, 16])
def test_every_sample_is_used_once_an_epoch(
    good: str, tokenizer: Tokenizer, make_config: MakeConfig, buffer: int
) -> None:
    """Whatever is chosen from the pool: what all slots have drawn is what they used and what still waits."""
    with Loader(make_config(shards=(good,), packing_buffer=buffer), tokenizer, range(4)) as loader:
        used = Counter(key for step in _rows(loader, 12) for row in step for key in row.keys)
        slots = loader.state()["slots"]
    visits: Counter[str] = Counter()
    for slot, place in slots.items():
        at = [sample_at(int(slot), cursor, 4, NUM_SAMPLES, (7, 0)) for cursor in range(place["drawn"][0])]
        waiting = {cursor for _, cursor in place["waiting"]}
        visits.update(f"s{number:02d}" for cursor, (_, number) in enumerate(at) if cursor not in waiting)
        assert len(waiting) == len(place["waiting"]) == buffer
    assert used == visits
    assert min(used.values()) >= 1


def test_packing_from_a_pool_wastes_less(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    def padding(buffer: int) -> float:
        with Loader(make_config(shards=(good,), packing_buffer=buffer), tokenizer, range(4)) as loader:
            roles = [row.roles_S for step in _rows(loader, 20) for row in step]
        return float(np.mean((np.stack(roles) & PADDING) > 0))

    assert padding(16) < 0.5 * padding(1)


@pytest.mark.parametrize("split", [(4,), (1, 3), (2, 2)])
def test_resuming_continues_exactly(
    split: tuple[int, ...], mixed: str, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    config = make_config(shards=(mixed,), max_bad_share=1.0)
    with Loader(config, tokenizer, range(4)) as loader:
        before = _rows(loader, 5)
        state = loader.state()
        expected = [[_content(row) for row in step] for step in _rows(loader, 5)]
        # Going back in the same loader drops what it had read ahead.
        loader.load_state(state)
        assert loader.state() == state == json.loads(json.dumps(state))
        assert [[_content(row) for row in step] for step in _rows(loader, 5)] == expected
    assert len(before) == 5 and set(state["slots"]) == {"0", "1", "2", "3"}
    start = 0
    for count in split:  # the merged state serves any other distribution of the slots
        slots = range(start, start + count)
        with Loader(config, tokenizer, slots) as loader:
            loader.load_state(state)
            for step, rows in enumerate(_rows(loader, 5)):
                assert [_content(row) for row in rows] == [expected[step][slot] for slot in slots]
        start += count


def test_state_is_of_the_last_batch_not_of_the_prefetch(
    good: str, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    with Loader(make_config(shards=(good,)), tokenizer, [0, 1]) as loader:
        fresh = {"rows": 0, "drawn": [0], "waiting": [], "used": [0, 0]}
        assert loader.state()["samples"] == [NUM_SAMPLES] and loader.state()["slots"] == {"0": fresh, "1": fresh}
        rows = next(loader)
        assert loader._prefetch is not None
        loader._prefetch.result()  # the next step is ready
        for slot, row in zip(("0", "1"), rows, strict=True):
            place = loader.state()["slots"][slot]
            assert place["rows"] == 1 and place["drawn"] == [len(row.keys) + 16] and len(place["waiting"]) == 16
            assert place["used"] == [int((row.roles_S & PADDING == 0).sum()), len(row.pictures)]


def test_load_state_refuses_another_run(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    place = {"rows": 1, "drawn": [2], "waiting": [[0, 1]], "used": [20, 1]}
    with Loader(make_config(shards=(good,)), tokenizer, [0, 3]) as loader:
        order = {name: value for name, value in loader.state().items() if name != "slots"}
        for wrong in (None, {}, {**place, "drawn": [-1]}, {**place, "drawn": [1, 1]}, {**place, "waiting": [7]}):
            slots = {"0": place} if wrong is None else {"0": place, "3": wrong}
            with pytest.raises(CheckpointError, match="slot 3.*global_batch_size"):
                loader.load_state({**order, "slots": slots})
        same = {**order, "slots": {"0": place, "3": place}}
        for name, other in (("samples", [5]), ("global_batch_size", 8), ("seed", 8)):
            with pytest.raises(CheckpointError, match=f"another order: {name} was {re.escape(str(other))} and is "):
                loader.load_state({**same, name: other})
        loader.load_state(same)


def test_bad_samples_are_skipped_counted_and_listed_once(
    mixed: str, tokenizer: Tokenizer, make_config: MakeConfig, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    config = make_config(shards=(mixed,), global_batch_size=1, max_bad_share=1.0)
    listed = tmp_path / "quarantine" / "rank_00000.jsonl"
    seen: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING), Loader(config, tokenizer, [0], quarantine=listed) as loader:
        while (place := loader.state()["slots"]["0"])["drawn"][0] < 4 * NUM_SAMPLES:
            seen.update(key for row in next(loader) for key in row.keys)
        place, skipped = loader.state()["slots"]["0"], loader.skipped
    assert set(seen) == {f"s{i:02d}" for i in range(NUM_SAMPLES)} - set(BAD)
    # What was drawn was good, bad, or waits; every bad one was met in each epoch and counted under its own reason.
    assert sum(seen.values()) + sum(skipped.values()) + len(place["waiting"]) == place["drawn"][0]
    assert set(skipped) == set(BAD.values()) and min(skipped.values()) >= 3
    messages = [record.getMessage() for record in caplog.records if record.name == "emu2_megatron.data.quarantine"]
    assert len(messages) == 3
    entries = {entry["key"]: entry for entry in map(json.loads, listed.read_text().splitlines())}
    assert set(entries) == set(BAD) and len(listed.read_text().splitlines()) == 3
    for key, reason in BAD.items():
        shard = "0.tar" if key < "s10" else "1.tar"
        assert sum(f"sample {key} of " in text and shard in text and reason in text for text in messages) == 1
        entry = entries[key]
        assert entry["reason"] == reason and entry["error"].startswith(reason) and entry["shard"].endswith(shard)
        index = ShardIndex([entry["shard"]])
        assert index.locate(int(key[1:]) % 10 if key < "s10" else int(key[1:]) - 10)[1] == entry["byte"]


def test_too_many_bad_samples_end_the_run(
    mixed: str, tokenizer: Tokenizer, make_config: MakeConfig, tmp_path: Path
) -> None:
    """3 of 23 are bad, 13 %: more than 5 %, and soon more than chance makes of 5 %."""
    file = tmp_path / "bad.jsonl"
    with Loader(make_config(shards=(mixed,)), tokenizer, range(4), quarantine=file) as loader:
        with pytest.raises(DataError, match=r"data.max_bad_share: 2\d of 1\d\d samples.*a share of 0.05 \(.*bad.jsonl"):
            _rows(loader, 50)
    with Loader(make_config(shards=(mixed,), max_bad_share=0.2), tokenizer, range(4)) as loader:
        _rows(loader, 50)


def test_what_cannot_be_decoded_leaves_its_row(
    tmp_path: Path, make_png: Callable[..., bytes], tokenizer: Tokenizer, make_config: MakeConfig,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """A picture that only decoding shows to be bad: its sample is gone from the row, the others move up."""
    shards = _write(tmp_path, make_png, {})
    config = make_config(shards=(shards,))

    def refuse(visuals: Any, size: int) -> list[Tensor | DataError]:
        good = [decode([visual], size)[0] for visual in visuals]
        black = [not isinstance(g, DataError) and int(g.max()) == 0 for g in good]  # sample s00's
        return [DataError("picture is odd: all black") if b else g for g, b in zip(good, black, strict=True)]

    with Loader(config, tokenizer, range(4)) as loader:
        whole = _rows(loader, 10)
    monkeypatch.setattr("emu2_megatron.data.loader.decode", refuse)
    with Loader(config, tokenizer, range(4)) as loader:
        without = _rows(loader, 10)
        assert set(loader.skipped) == {"picture is odd"}
    assert any("s00" in row.keys for step in whole for row in step)
    for one, other in zip((row for s in whole for row in s), (row for s in without for row in s), strict=True):
        assert other.keys == [key for key in one.keys if key != "s00"]
        if "s00" not in one.keys:
            assert _content(one) == _content(other)
        assert sum(other.queries) == (other.roles_S & VISUAL > 0).sum() and len(other.queries) == len(other.pictures)
        assert (other.roles_S & START > 0).sum() == len(other.keys) + bool((other.roles_S & PADDING).any())


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """Three sources of 40, 20 and 12 short texts, named a, b and c."""
    folder = tmp_path_factory.mktemp("sources")
    for name, count in (("a", 40), ("b", 20), ("c", 12)):
        texts = [RawSample(f"{name}{i}", {"kind": "text", "text": "the the"}) for i in range(count)]
        write_shard(folder / f"{name}.tar", texts)
    return tuple(f"{folder}/{name}.tar" for name in "abc")


def test_blended_by_weights(sources: tuple[str, ...], tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    config = make_config(shards=sources, weights=(2.0, 1.0, 1.0), packing_buffer=4)
    with Loader(config, tokenizer, range(4)) as loader:
        keys = [key for step in _rows(loader, 10) for row in step for key in row.keys]
        state = loader.state()
        expected = [[_content(row) for row in step] for step in _rows(loader, 5)]
    drawn = Counter(key[0] for key in keys)
    assert abs(drawn["a"] / len(keys) - 0.5) < 0.03 and abs(drawn["b"] / len(keys) - 0.25) < 0.03
    with Loader(config, tokenizer, range(4)) as loader:
        loader.load_state(json.loads(json.dumps(state)))
        assert [[_content(row) for row in step] for step in _rows(loader, 5)] == expected


def test_blended_by_samples_per_step(sources: tuple[str, ...], tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    """Of each step exactly 10, 5 and 3 samples, and each source's samples once an epoch."""
    config = make_config(shards=sources, samples_per_step=(10, 5, 3))
    with Loader(config, tokenizer, range(4)) as loader:
        steps = [Counter(key[0] for row in rows for key in row.keys) for rows in _rows(loader, 3)]
        assert steps == [Counter(a=10, b=5, c=3)] * 3
        state = loader.state()
        keys = Counter(key for rows in _rows(loader, 5) for row in rows for key in row.keys)
        assert set(keys.values()) == {1, 2}  # 50 of a's 40
    for split in ((0, 1), (2, 3)):
        with Loader(config, tokenizer, split) as loader:
            loader.load_state(state)
            keys -= Counter(key for rows in _rows(loader, 5) for row in rows for key in row.keys)
    assert not keys
    with Loader(make_config(shards=sources, samples_per_step=(90, 5, 3)), tokenizer, range(4)) as loader:
        with pytest.raises(DataError, match="98 samples a step may not fit 4 rows.*; lower data.samples_per_step"):
            _rows(loader, 9)


def test_a_few_samples_a_step_too_many_are_said_before_they_end_the_run(
    sources: tuple[str, ...], tokenizer: Tokenizer, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    """And the run that ended goes on with fewer, every source where it was."""
    config = make_config(shards=sources, samples_per_step=(60, 5, 3))
    steps, keys = 0, Counter[str]()
    with caplog.at_level(logging.WARNING), Loader(config, tokenizer, range(4)) as loader:
        with pytest.raises(DataError, match="68 samples a step may not fit 4 rows"):
            while steps < 100:
                state = loader.state()
                keys.update(key for row in next(loader) for key in row.keys)
                steps += 1
        warned = [record.getMessage() for record in caplog.records if record.name.endswith("loader")]
        assert len(warned) == 1 and warned[0].endswith("if it grows beyond, the run ends") and steps > 2
    caplog.clear()
    fewer = make_config(shards=sources, samples_per_step=(10, 5, 3))
    with caplog.at_level(logging.WARNING), Loader(fewer, tokenizer, range(4)) as loader:
        loader.load_state(state)
        assert [record.getMessage() for record in caplog.records] == [
            "data.samples_per_step was [60, 5, 3] in the saved run and is [10, 5, 3] from here on"
        ]
        for _ in range(10):
            keys.update(key for row in next(loader) for key in row.keys)
        drawn = Counter(key[0] for key in keys.elements())
        waiting = sum(len(place["waiting"]) for place in loader.state()["slots"].values())
    assert sum(drawn.values()) + waiting == 68 * steps + 18 * 10
    for source, samples in {"a": 40, "b": 20, "c": 12}.items():
        of_source = [keys[key] for key in keys if key[0] == source]
        epochs = drawn[source] / samples
        assert len(of_source) == samples and epochs - 2 < min(of_source) <= max(of_source) < epochs + 2


def test_unreadable_shard_is_skipped_and_named(
    tmp_path: Path, make_png: Callable[..., bytes], tokenizer: Tokenizer, make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Each of its samples is listed, though no more is known of them than their numbers."""
    monkeypatch.setattr("emu2_megatron.data.shards.PAUSES", ())
    config = make_config(shards=(_write(tmp_path, make_png, {}),), global_batch_size=1, max_bad_share=1.0)
    index, file = ShardIndex(config.data.shards), tmp_path / "bad.jsonl"
    (tmp_path / "1.tar").unlink()
    with caplog.at_level(logging.WARNING), Loader(config, tokenizer, [0], [index], file) as loader:
        while loader.state()["slots"]["0"]["drawn"][0] < 2 * NUM_SAMPLES:
            assert all(key < "s10" for row in next(loader) for key in row.keys)
        assert loader.skipped["shard cannot be read"] >= NUM_SAMPLES - 10
    messages = [record.getMessage() for record in caplog.records if record.name == "emu2_megatron.data.quarantine"]
    assert all("1.tar" in message and "of its source)" in message for message in messages)
    listed = [json.loads(line)["key"] for line in file.read_text().splitlines()]
    assert sorted(listed) == [f"(sample {number} of its source)" for number in range(10, NUM_SAMPLES)]


def test_only_bad_samples_is_an_error_that_repeats(
    tmp_path: Path, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    write_shard(tmp_path / "s.tar", [RawSample(f"k{i}", {"kind": "none"}) for i in range(3)])
    with Loader(make_config(shards=(f"{tmp_path}/s.tar",), max_bad_share=1.0), tokenizer, [1]) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"none of the last 131 samples.*does not follow the format"):
                next(loader)
        assert loader.state()["slots"]["1"]["drawn"] == [0]


def test_a_source_that_gives_nothing_good_ends_the_run_however_large_it_is(
    good: str, tmp_path: Path, tokenizer: Tokenizer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The good source's weight is so small that it is never drawn from."""
    monkeypatch.setattr("emu2_megatron.data.loader.MOST_BAD_IN_A_ROW", 50)
    write_shard(tmp_path / "s.tar", [RawSample(f"k{i}", {"kind": "none"}) for i in range(3)])
    config = make_config(shards=(f"{tmp_path}/s.tar", good), weights=(1.0, 1e-30), max_bad_share=1.0)
    with Loader(config, tokenizer, [0]) as loader, pytest.raises(DataError, match="none of the last 51 samples"):
        next(loader)


def test_unexpected_errors_of_the_thread_surface(
    good: str, tokenizer: Tokenizer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_later(visuals: Any, size: int) -> list[Tensor | DataError]:
        calls.append(threading.current_thread().name)
        if len(calls) > 20:
            raise ZeroDivisionError("a bug, not a bad sample")
        return decode(visuals, size)

    monkeypatch.setattr("emu2_megatron.data.loader.decode", fail_later)
    with Loader(make_config(shards=(good,)), tokenizer, [0]) as loader:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            _rows(loader, 50)
    assert {name.startswith("emu2-loader") for name in calls} == {True}


def test_close_ends_the_thread_even_in_the_middle_of_a_step(
    good: str, tokenizer: Tokenizer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()

    def slow(*arguments: Any) -> Sample:
        started.set()
        time.sleep(0.02)
        return build_sample(*arguments)

    monkeypatch.setattr("emu2_megatron.data.loader.build_sample", slow)
    loader = Loader(make_config(shards=(good,), global_batch_size=200, sequence_length=512), tokenizer, range(200))
    loader._prefetch = loader._thread.submit(loader._step, loader._places)  # a step of more than 4 s
    assert started.wait(10)
    begin = time.monotonic()
    loader.close()
    loader.close()  # twice does no harm
    assert time.monotonic() - begin < 2
    assert not any(thread.name.startswith("emu2-loader") and thread.is_alive() for thread in threading.enumerate())
    with pytest.raises(RuntimeError, match="closed"):
        next(loader)


def test_a_rank_without_slots(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    with Loader(make_config(shards=(good,)), tokenizer, []) as loader:
        assert (next(loader), loader.state()["slots"]) == ([], {})


def test_fewer_samples_than_slots(tmp_path: Path, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    content = [{"text": "the the the"}]
    write_shard(tmp_path / "s.tar", [RawSample(f"k{i}", {"kind": "interleaved", "content": content}) for i in range(2)])
    with Loader(make_config(shards=(f"{tmp_path}/s.tar",), global_batch_size=5), tokenizer, range(5)) as loader:
        for rows in _rows(loader, 3):
            assert len(rows) == 5 and all(len(row.keys) == 64 // 5 for row in rows)


def test_wrong_arguments(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    config = make_config(shards=(good,))
    for slots in ([4], [-1], [0, 0]):
        with pytest.raises(ValueError, match="slots must be distinct and within 0..3"):
            Loader(config, tokenizer, slots)
    decoder = replace(config.model.decoder, vocab_size=32272)
    with pytest.raises(ConfigError, match="tokenizer has 1272 tokens.*vocab_size is 32272"):
        Loader(replace(config, model=replace(config.model, decoder=decoder)), tokenizer, [0])


def test_one_good_sample_among_bad_ones_is_enough(
    tmp_path: Path, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    """Fewer samples than slots: each draw is a random one, and a run of bad draws is no proof of anything."""
    bad = [RawSample(f"k{i}", {"kind": "none"}) for i in range(9)]
    good = RawSample("good", {"kind": "interleaved", "content": [{"text": "hello"}]})
    write_shard(tmp_path / "s.tar", [*bad, good])
    with Loader(make_config(shards=(f"{tmp_path}/s.tar",), max_bad_share=1.0), tokenizer, [0, 1]) as loader:
        for _ in range(3):
            assert all(set(row.keys) == {"good"} for row in next(loader))
