"""The training loop of one rank."""

import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from emu2_megatron.checkpoint.save import save
from emu2_megatron.config.loading import to_yaml
from emu2_megatron.config.schema import Config
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.tokenizer import tokenizer_for
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.platform.device import device
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
    with Loader(config, tokenizer, here.slots(config.training.global_batch_size)) as loader:
        engine = wrap.build(config, here)
        folder = Path(config.logging.directory)
        writers = None
        if here.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            writers = Writers(config)
        try:
            saved = _steps(config, engine, loader, writers)
        finally:
            if writers:
                writers.close()
        if writers:
            writers.summary({"checkpoint": saved, "log": str(folder / "log.jsonl"),
                             "curves": f"tensorboard --logdir {folder}"})  # fmt: skip


def _steps(config: Config, engine: wrap.Engine, loader: Loader, writers: Writers | None) -> str:
    """All steps, logs and checkpoints; returns where the last checkpoint is."""
    saved = ""
    best, what_is_counted = peak(config)
    if writers:
        writers.say(what_is_counted)
    meter = Meter(config, best)
    for step in range(1, config.training.steps + 1):
        start = time.perf_counter()
        own = next(loader)
        load_seconds = time.perf_counter() - start
        report = train_step(engine, config, own, step - 1)
        report.output.seconds["load"] = load_seconds
        meter.add(report)
        last = step == config.training.steps
        if writers:
            writers.advance(step)
        if step == 1 or last or step % config.logging.every == 0:
            record = meter.record(step, report, sum(loader.skipped.values()))
            meter = Meter(config, best)
            if writers:
                writers.write(record)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            saved = str(save(checkpoint_directory(config), engine, step, _cursors(config, loader)))
    return saved


def _cursors(config: Config, loader: Loader) -> list[int]:
    """Samples consumed by every slot of the global batch; called by all ranks together."""
    cursors = torch.zeros(config.training.global_batch_size, dtype=torch.int64)
    for slot, cursor in loader.state().items():
        cursors[slot] = cursor
    cursors = cursors.to(device())
    dist.all_reduce(cursors, group=topology.world_group())
    return [int(cursor) for cursor in cursors]
