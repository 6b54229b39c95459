"""A run that is killed between checkpoints goes on at any number of ranks, with exactly the samples it had not used."""

import importlib.util
import json
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest

from emu2_megatron.data.loader import Loader, merged
from emu2_megatron.data.order import sample_at
from emu2_megatron.data.shards import RawSample, write_shard
from emu2_megatron.data.tokenizer import Tokenizer

WORKER = Path(__file__).with_name("resume_worker.py")
SAMPLES, STEPS = 150, 40

_spec = importlib.util.spec_from_file_location("resume_worker", WORKER)
assert _spec is not None and _spec.loader is not None
worker = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(worker)


def _start(folder: Path, shards: str, ranks: int, start: int) -> list[subprocess.Popen[bytes]]:
    arguments = [str(folder), shards]
    return [
        subprocess.Popen([sys.executable, str(WORKER), *arguments, str(rank), str(ranks), str(start), str(STEPS)])
        for rank in range(ranks)
    ]


def _complete(folder: Path, ranks: int) -> list[int]:
    """Steps at which every rank has saved its place."""
    places = {int(p.name.removeprefix("place_")): len(list(p.glob("*.json"))) for p in folder.glob("place_*")}
    return sorted(step for step, files in places.items() if files == ranks)


def _seen(folder: Path, start: int, until: int) -> dict[tuple[int, int], list[str]]:
    """The samples of every (step, slot) up to a step."""
    lines = [line for file in folder.glob(f"seen_{start}_*.jsonl") for line in file.read_text().splitlines(True)]
    entries = [json.loads(line) for line in lines if line.endswith("\n")]  # the last one may have been cut off
    return {(e["step"], int(slot)): keys for e in entries if e["step"] <= until for slot, keys in e["rows"].items()}


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("shards")
    words = random.Random(0)
    texts = [{"kind": "text", "text": " ".join(["the"] * words.randint(1, 30))} for _ in range(SAMPLES)]
    write_shard(folder / "0.tar", [RawSample(f"s{i}", meta) for i, meta in enumerate(texts)])
    return str(folder / "0.tar")


@pytest.fixture(scope="module")
def uninterrupted(shards: str, tokenizer: Tokenizer) -> dict[tuple[int, int], list[str]]:
    """One process that reads all slots."""
    with Loader(worker.config(shards), tokenizer, range(worker.SLOTS)) as loader:
        return {(step, slot): row.keys for step in range(1, STEPS + 1) for slot, row in enumerate(next(loader))}


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [4, 2, 8])
def test_killed_on_four_ranks(
    shards: str, uninterrupted: dict[tuple[int, int], list[str]], tmp_path: Path, ranks: int
) -> None:
    first = _start(tmp_path, shards, 4, 0)
    try:
        deadline = time.monotonic() + 120
        wanted = random.randint(1, 5)  # so many checkpoints, and then in the middle of what follows
        while len(_complete(tmp_path, 4)) < wanted and time.monotonic() < deadline:
            time.sleep(0.002)
    finally:
        for process in first:
            process.send_signal(signal.SIGKILL)
            process.wait()
    start = _complete(tmp_path, 4)[-1]
    assert 0 < start < STEPS
    for place in tmp_path.glob("place_*"):  # what a rank saved later than the others is no checkpoint
        if int(place.name.removeprefix("place_")) > start:
            for file in place.iterdir():
                file.unlink()
    seen = _seen(tmp_path, 0, start)

    processes = _start(tmp_path, shards, ranks, start)
    assert [process.wait(timeout=300) for process in processes] == [0] * len(processes)
    seen |= _seen(tmp_path, start, STEPS)
    assert seen == uninterrupted

    # Of what the slots drew, every sample was used or waits: none lost, none twice.
    final = merged([json.loads(f.read_text()) for f in (tmp_path / f"place_{STEPS}").glob("*.json")])
    used = Counter(key for keys in seen.values() for key in keys)
    drawn: Counter[tuple[int, str]] = Counter()
    for slot, place in final["slots"].items():
        visits = [sample_at(int(slot), c, worker.SLOTS, SAMPLES, (1234, 0)) for c in range(place["drawn"][0])]
        drawn.update((epoch, f"s{number}") for epoch, number in visits)
        used.update(f"s{visits[cursor][1]}" for _, cursor in place["waiting"])
    assert used == Counter(key for _, key in drawn.elements())
    whole_epochs = min(Counter(key for _, key in drawn.elements()).values())
    assert whole_epochs >= 2
    assert all(drawn[epoch, f"s{i}"] == 1 for epoch in range(whole_epochs) for i in range(SAMPLES))
