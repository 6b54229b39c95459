"""Order, layout independence, resumption and the skipping of bad samples."""

import logging
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from emu2_megatron.config.schema import Config
from emu2_megatron.data.loader import Loader, sample_at
from emu2_megatron.data.sequence import PackedSequence
from emu2_megatron.data.shards import RawSample, ShardIndex, write_shard
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import CheckpointError, ConfigError, DataError

MakeConfig = Callable[..., Config]
NUM_SAMPLES = 23
BAD = {"s03": "picture cannot be decoded", "s11": "sample does not follow the format", "s17": "nothing to learn"}


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
            case "picture cannot be decoded":
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


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 2))
def test_slots_together_visit_every_sample_once_an_epoch(num_slots: int, num_samples: int, epochs: int) -> None:
    visited: Counter[tuple[int, int]] = Counter()
    for slot in range(num_slots):
        cursor = 0
        while (visit := sample_at(slot, cursor, num_slots, num_samples, seed=3))[0] <= epochs:
            visited[visit] += 1
            cursor += 1
        assert cursor > epochs  # no slot is ever without samples, however few there are
    if num_samples >= num_slots:
        assert visited == Counter({(e, i): 1 for e in range(epochs + 1) for i in range(num_samples)})
    else:
        assert sum(visited.values()) == num_slots * (epochs + 1)
        assert {i for e, i in visited if e == 0} == set(range(num_samples))


def test_order_is_a_fresh_permutation_each_epoch_and_seed() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        return [sample_at(0, epoch * 50 + i, 1, 50, seed)[1] for i in range(50)]

    orders = [order(0, 0), order(0, 1), order(1, 0), list(range(50))]
    assert order(0, 0) == orders[0]
    assert all(sorted(each) == orders[3] for each in orders)
    assert len({tuple(each) for each in orders}) == 4


@pytest.mark.parametrize("owners", [1, 2, 4])
def test_rows_do_not_depend_on_who_reads_a_slot(
    owners: int, mixed: str, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    config = make_config(shards=(mixed,))
    with Loader(config, tokenizer, range(4)) as whole:
        expected = [[_content(row) for row in step] for step in _rows(whole, 6)]
        end_state, skipped = whole.state(), whole.skipped
    state: dict[int, int] = {}
    counted: Counter[str] = Counter()
    for owner in range(owners):
        slots = [slot for slot in reversed(range(4)) if slot % owners == owner]
        with Loader(config, tokenizer, slots) as loader:
            for step, rows in enumerate(_rows(loader, 6)):
                assert [_content(row) for row in rows] == [expected[step][slot] for slot in slots]
            state.update(loader.state())
            counted += loader.skipped
    assert state == end_state and counted == skipped


def test_rows_are_the_slots_samples_in_order(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    """Keys of successive rows of a slot are the visits of sample_at, none left out, repeated or swapped."""
    with Loader(make_config(shards=(good,)), tokenizer, [2]) as loader:
        keys = [key for (row,) in _rows(loader, 12) for key in row.keys]
        state = loader.state()
    expected = [f"s{sample_at(2, cursor, 4, NUM_SAMPLES, 7)[1]:02d}" for cursor in range(len(keys))]
    assert keys == expected
    assert state == {2: len(keys)}
    assert len(keys) > 6  # more than an epoch of this slot


@pytest.mark.parametrize("split", [(4,), (1, 3), (2, 2)])
def test_resuming_continues_exactly(
    split: tuple[int, ...], mixed: str, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    config = make_config(shards=(mixed,))
    with Loader(config, tokenizer, range(4)) as loader:
        before = _rows(loader, 5)
        state = loader.state()
        expected = [[_content(row) for row in step] for step in _rows(loader, 5)]
        # Going back in the same loader drops what it had read ahead.
        loader.load_state(state)
        assert loader.state() == state
        assert [[_content(row) for row in step] for step in _rows(loader, 5)] == expected
    assert len(before) == 5 and set(state) == {0, 1, 2, 3}
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
        assert loader.state() == {0: 0, 1: 0}
        rows = next(loader)
        assert loader._prefetch is not None
        loader._prefetch.result()  # the next step is ready
        assert loader.state() == {slot: len(row.keys) for slot, row in zip((0, 1), rows, strict=True)}


def test_load_state_refuses_another_run(good: str, tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    with Loader(make_config(shards=(good,)), tokenizer, [0, 3]) as loader:
        for state in ({0: 1}, {0: 1, 3: -1}, {0: 1, 3: "2"}):
            with pytest.raises(CheckpointError, match="slot 3.*global_batch_size"):
                loader.load_state(state)  # type: ignore[arg-type]


def test_bad_samples_are_skipped_counted_and_logged_once(
    mixed: str, tokenizer: Tokenizer, make_config: MakeConfig, caplog: pytest.LogCaptureFixture
) -> None:
    config = make_config(shards=(mixed,), global_batch_size=1)
    seen: Counter[str] = Counter()
    with caplog.at_level(logging.WARNING), Loader(config, tokenizer, [0]) as loader:
        while loader.state()[0] < 3 * NUM_SAMPLES:
            seen.update(key for row in next(loader) for key in row.keys)
        consumed = loader.state()[0]
        skipped = loader.skipped
    assert set(seen) == {f"s{i:02d}" for i in range(NUM_SAMPLES)} - set(BAD)
    assert min(seen.values()) >= 3  # three whole epochs
    # The cursor counts good and bad; every bad one was met in each epoch and counted under its own reason.
    assert sum(seen.values()) + sum(skipped.values()) == consumed
    assert set(skipped) == set(BAD.values()) and min(skipped.values()) >= 3
    messages = [record.getMessage() for record in caplog.records if record.name == "emu2_megatron.data.loader"]
    assert len(messages) == 3
    for key, reason in BAD.items():
        shard = "0.tar" if key < "s10" else "1.tar"
        assert sum(f"sample {key} of " in text and shard in text and reason in text for text in messages) == 1


def test_unreadable_shard_is_skipped_and_named(
    tmp_path: Path, make_png: Callable[..., bytes], tokenizer: Tokenizer, make_config: MakeConfig,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    config = make_config(shards=(_write(tmp_path, make_png, {}),), global_batch_size=1)
    index = ShardIndex(config.data.shards)
    (tmp_path / "1.tar").unlink()
    with caplog.at_level(logging.WARNING), Loader(config, tokenizer, [0], index) as loader:
        while loader.state()[0] < NUM_SAMPLES:
            assert all(key < "s10" for row in next(loader) for key in row.keys)
        assert loader.skipped["shard cannot be read"] >= NUM_SAMPLES - 10
    assert all("1.tar" in record.getMessage() and "(at byte" in record.getMessage() for record in caplog.records)


def test_only_bad_samples_is_an_error_that_repeats(
    tmp_path: Path, tokenizer: Tokenizer, make_config: MakeConfig
) -> None:
    write_shard(tmp_path / "s.tar", [RawSample(f"k{i}", {"kind": "none"}) for i in range(3)])
    with Loader(make_config(shards=(f"{tmp_path}/s.tar",)), tokenizer, [1]) as loader:
        for _ in range(2):
            with pytest.raises(DataError, match=r"none of the 3 samples can be used.*kind is 'none'"):
                next(loader)
        assert loader.state() == {1: 0}


def test_unexpected_errors_of_the_thread_surface(
    good: str, tokenizer: Tokenizer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def fail_later(data: bytes, size: int) -> torch.Tensor:
        calls.append(threading.current_thread().name)
        if len(calls) > 20:
            raise ZeroDivisionError("a bug, not a bad sample")
        return torch.zeros(3, size, size, dtype=torch.uint8)

    monkeypatch.setattr("emu2_megatron.data.samples.decode_image", fail_later)
    with Loader(make_config(shards=(good,)), tokenizer, [0]) as loader:
        with pytest.raises(ZeroDivisionError, match="a bug"):
            _rows(loader, 50)
    assert {name.startswith("emu2-loader") for name in calls} == {True}


def test_close_ends_the_thread_even_in_the_middle_of_a_step(
    good: str, tokenizer: Tokenizer, make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = threading.Event()

    def slow(data: bytes, size: int) -> torch.Tensor:
        started.set()
        time.sleep(0.02)
        return torch.zeros(3, size, size, dtype=torch.uint8)

    monkeypatch.setattr("emu2_megatron.data.samples.decode_image", slow)
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
        assert (next(loader), loader.state()) == ([], {})


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
    with Loader(make_config(shards=(f"{tmp_path}/s.tar",)), tokenizer, [0, 1]) as loader:
        for _ in range(3):
            assert all(set(row.keys) == {"good"} for row in next(loader))
