"""The training loop of one rank."""

import sys
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.config.loading import to_yaml
from emu2_megatron.config.schema import Config
from emu2_megatron.data.loader import Loader, State, merged
from emu2_megatron.data.tokenizer import tokenizer_for
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.parallel.three_phase import Prepared
from emu2_megatron.training import begin
from emu2_megatron.training.launch import checkpoint_directory
from emu2_megatron.training.meters import Meter, peak
from emu2_megatron.training.step import train_step
from emu2_megatron.training.writers import Writers


def run(config: Config) -> None:
    """Train on this rank until the last step. `config` is validated; torchrun's environment says which rank this is."""
    topology.start()
    try:
        _train(config)
    finally:
        # After an error the other ranks may be waiting in a collective: leave without asking them.
        if sys.exc_info()[0] is None:
            topology.stop()


def _train(config: Config) -> None:
    here = topology.initialize(config)
    tokenizer = tokenizer_for(config)
    folder = Path(config.logging.directory)
    quarantine = folder / "quarantine" / f"rank_{here.rank:05d}.jsonl"
    slots = here.slots(config.training.global_batch_size)
    with begin.only_run(config), Loader(config, tokenizer, slots, quarantine=quarantine) as loader:
        engine = wrap.build(config, here)
        done, lines = begin.begin(config, engine, loader)
        writers = None
        if here.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            writers = Writers(config, done)
        say = writers.say if writers else _say_nothing
        for line in lines:
            say(line)
        try:
            saved = _steps(config, engine, loader, writers, say, done)
        finally:
            if writers:
                writers.close()
        if writers:
            writers.summary({"checkpoint": saved, "log": str(folder / "log.jsonl"),
                             "curves": f"tensorboard --logdir {folder}"})  # fmt: skip


def _say_nothing(_: str) -> None:
    """What ranks other than the first do with a line."""


def _steps(
    config: Config, engine: wrap.Engine, loader: Loader, writers: Writers | None, say: Callable[[str], None], done: int
) -> str:
    """All steps after the first `done`, logs and checkpoints; returns where the last checkpoint is."""
    saved = ""
    best, what_is_counted = peak(config)
    say(what_is_counted)
    meter = Meter(config, best)
    saver = Saver(config.checkpoint, checkpoint_directory(config), engine, say)
    for step, (batch, place, skipped) in enumerate(_batches(config, engine, loader, done), start=done + 1):
        report = train_step(engine, config, batch, step - 1)
        meter.add(report)
        last = step == config.training.steps
        if writers:
            writers.advance(step)
        if step == 1 or last or step % config.logging.every == 0:
            record = meter.record(step, report, skipped)
            meter = Meter(config, best)
            if writers:
                writers.write(record)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            saved = str(saver.save(step, {"data": _of_all_ranks(place)}))
    saver.finish()
    return saved


def _batches(config: Config, engine: wrap.Engine, loader: Loader, done: int) -> Iterator[tuple[Prepared, State, int]]:
    """The batch of every step after the first `done`, the place in the data after it, and the samples skipped until
    then; prepared one step ahead if the encoder runs ahead."""
    ahead: deque[tuple[Prepared, State, int]] = deque()
    for left in range(config.training.steps - done, 0, -1):
        while len(ahead) < min(left, 1 + config.training.encoder_prefetch):
            start = time.perf_counter()
            own = next(loader)
            load_seconds = time.perf_counter() - start
            batch = engine.step.prepare(own)
            batch.seconds["load"] = load_seconds
            ahead.append((batch, loader.state(), sum(loader.skipped.values())))
        yield ahead.popleft()


def _of_all_ranks(place: State) -> State:
    """The place in the data of every slot of the global batch, given this rank's; called by all ranks together."""
    places: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(places, place, group=topology.world_group())
    return merged(places)
