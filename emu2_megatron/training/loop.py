"""The training loop of one rank."""

import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.config.loading import to_yaml
from emu2_megatron.config.schema import Config, trained_decoder
from emu2_megatron.data.loader import Loader, State, merged
from emu2_megatron.errors import CheckpointError, Stopped
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.parallel.step import Batch
from emu2_megatron.training import begin, objective, panels
from emu2_megatron.training.guards import Guards
from emu2_megatron.training.launch import checkpoint_directory
from emu2_megatron.training.meters import Meter, peak
from emu2_megatron.training.step import train_step
from emu2_megatron.training.writers import Writers


def run(config: Config) -> None:
    """Train on this rank until the last step. `config` is validated; torchrun's environment says which rank this is.

    Raises:
        Stopped: the run was asked to end earlier, and has saved.
        Emu2Error: it cannot go on.
    """
    topology.start()
    try:
        _train(config)
    finally:
        # After an error the other ranks may be waiting in a collective: leave without asking them.
        if sys.exc_info()[0] in (None, Stopped):
            topology.stop()


def _train(config: Config) -> None:
    here = topology.initialize(config)
    tokenizer = objective.tokenizer(config)
    folder = Path(config.logging.directory)
    quarantine = folder / "quarantine" / f"rank_{here.rank:05d}.jsonl"
    slots = here.slots(config.training.global_batch_size)
    with begin.only_run(config), Loader(config, tokenizer, slots, quarantine=quarantine) as loader:
        engine = objective.build(config, here)
        trainer, lines = begin.begin(config, engine, loader)
        frozen = engine.step.frozen()
        for name, found in frozen.items():
            if (saved := trainer.get(name, found)) != found:
                raise CheckpointError(
                    f"{config.training.objective}.{name}: the checkpoint was trained on the embeddings of "
                    f"{name} {saved}, this run's is {found}; give the one that the saved run had"
                )
        writers = None
        if here.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / "config.yaml").write_text(to_yaml(config))
            writers = Writers(config, int(trainer["step"]))
        say = writers.say if writers else _say_nothing
        for line in lines:
            say(line)
        guards = Guards(config, engine, say)
        guards.load_state(trainer.get("guards", {}))
        try:
            with guards:
                saved = _steps(config, engine, loader, guards, writers, int(trainer["step"]), frozen)
        finally:
            if writers:
                writers.close()
        if writers:
            writers.summary({"checkpoint": saved, "log": str(folder / "log.jsonl"),
                             "curves": f"tensorboard --logdir {folder}"})  # fmt: skip


def _say_nothing(_: str) -> None:
    """What ranks other than the first do with a line."""


def _steps(
    config: Config, engine: wrap.Engine, loader: Loader, guards: Guards, writers: Writers | None, done: int,
    frozen: dict[str, str],
) -> str:  # fmt: skip
    """All steps after the first `done`, logs and checkpoints; returns where the last checkpoint is.

    Raises:
        Stopped: the run was asked to end earlier, and has saved.
    """
    saved = ""
    best, what_is_counted = peak(config, engine.step.flops_formula)
    guards.say(what_is_counted)
    meter = Meter(config, best, engine.step.flops)
    saver = Saver(config.checkpoint, checkpoint_directory(config), engine, guards.say)
    for step, (batch, place, skipped) in enumerate(_batches(config, engine, loader, guards, done), start=done + 1):
        stop = None
        if guards.leaves_out(step):
            guards.say(f"step {step}: left out (guards.steps_to_skip)")
        else:
            report = train_step(engine, config, batch, step - 1, guards.flags, guards.judge)
            meter.add(report)
            guards.after(step, batch, report)
            stop = guards.stop(report)
        guards.watchdog.enter("log")
        if step == config.training.steps:
            stop = None  # the run is over anyway
        last = step == config.training.steps or stop is not None
        if writers:
            writers.advance(step)
        if meter.steps and (step == 1 or last or step % config.logging.every == 0):
            record = meter.record(step, report, skipped, guards.skipped)
            guards.stragglers(meter.z_scores)
            meter = Meter(config, best, engine.step.flops)
            if writers:
                writers.write(record)
        if last or (config.checkpoint.every and step % config.checkpoint.every == 0):
            guards.watchdog.enter("save")
            guards.watchdog.progressed()
            saved = str(saver.save(step, {"data": _of_all_ranks(place), "guards": guards.state(), **frozen}))
        guards.watchdog.progressed()
        if stop:
            saver.finish()
            raise stop
        if config.training.objective != "language":  # after the save, which is worth more
            every = trained_decoder(config).paint_every
            if last or (every and step % every == 0):
                guards.watchdog.enter("log")
                panels.show(config, engine, loader.sources, writers, step, last)
                guards.watchdog.progressed()
    saver.finish()
    return saved


def _batches(
    config: Config, engine: wrap.Engine, loader: Loader, guards: Guards, done: int
) -> Iterator[tuple[Batch, State, int]]:
    """The batch of every step after the first `done`, the place in the data after it, and the samples skipped until
    then; prepared one step ahead if the encoder runs ahead."""
    ahead: deque[tuple[Batch, State, int]] = deque()
    for step in range(done + 1, config.training.steps + 1):
        guards.watchdog.begin(step)
        left = config.training.steps + 1 - step
        while len(ahead) < min(left, 1 + config.training.encoder_prefetch):
            guards.watchdog.enter("load")
            start = time.perf_counter()
            own = next(loader)
            load_seconds = time.perf_counter() - start
            batch = engine.step.prepare(own)
            batch.seconds["load"] = batch.seconds["own"] = load_seconds
            ahead.append((batch, loader.state(), sum(loader.skipped.values())))
        yield ahead.popleft()


def _of_all_ranks(place: State) -> State:
    """The place in the data of every slot of the global batch, given this rank's; called by all ranks together."""
    return merged(topology.of_all_ranks(place, topology.world_group()))
