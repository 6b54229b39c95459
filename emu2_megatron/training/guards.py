"""Keeps a run from being spoilt (updates that would harm are skipped), lost (it saves before it is ended) or stuck.

Everything is decided by all ranks alike, at the end of a step, from numbers that they all have: losses and the gradient
norm, and flags that are counted where the losses are summed. docs/running.md says what a user sees of it.
"""

import signal
import statistics
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import psutil

from emu2_megatron.config.schema import Config
from emu2_megatron.errors import Stopped, TrainingDiverged
from emu2_megatron.parallel.step import Batch
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training import diagnosis
from emu2_megatron.training.launch import EXIT_CODES
from emu2_megatron.training.step import StepReport
from emu2_megatron.training.watchdog import Watchdog

REQUESTS = (
    ("SIGTERM", EXIT_CODES[signal.SIGTERM]),
    ("SIGUSR1", EXIT_CODES[signal.SIGUSR1]),
    ("guards.time_limit_minutes", EXIT_CODES[signal.SIGUSR1]),
)
"""What can end a run early, the most urgent first, and the exit code that it gives."""


class Guards:
    """The guards of one rank; used in a `with` block of the main thread around all steps.

    Attributes: `skipped` (steps whose update was skipped since the run began), `flags` (which of REQUESTS this rank has
    heard), `say` (prints a line, on rank 0 only).
    """

    def __init__(self, config: Config, engine: Engine, say: Callable[[str], None]) -> None:
        self.config, self.engine, self.say = config, engine, say
        self.skipped = 0
        self._in_a_row: list[int] = []
        self._losses: deque[float] = deque(maxlen=config.guards.spike_window)
        self._slow: dict[int, int] = {}
        self._heard = [False] * len(REQUESTS)
        self._ends_at = float("inf")
        if config.guards.time_limit_minutes is not None:
            # From the start of the process: that is what a time limit of a cluster counts from, more or less.
            self._ends_at = psutil.Process().create_time() + 60 * config.guards.time_limit_minutes
        self._folder = Path(config.logging.directory)
        here = engine.here
        self.watchdog = Watchdog(self._folder, here.rank, here.world_size, 60 * config.guards.hang_minutes)
        self._exits = ExitStack()

    def __enter__(self) -> "Guards":
        for i, number in enumerate((signal.SIGTERM, signal.SIGUSR1)):
            before = signal.signal(number, self._hear(i))
            self._exits.callback(signal.signal, number, before)
        self._exits.enter_context(self.watchdog)
        self.engine.step.entered = self.watchdog.enter
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._exits.__exit__(kind, error, trace)

    # Updates ----------------------------------------------------------------------------------------------------------

    def leaves_out(self, step: int) -> bool:
        """Whether a step's batch is not to be trained on."""
        return step in self.config.guards.steps_to_skip

    def judge(self, text_loss: float, image_loss: float) -> str:
        """What is wrong with finite losses: nothing, or that they are a spike."""
        guards, losses = self.config.guards, self._losses
        if not guards.spike_factor or len(losses) < guards.spike_window:
            return ""
        loss, usual = self._weighted(text_loss, image_loss), statistics.median(losses)
        if loss <= guards.spike_factor * usual:
            return ""
        return (
            f"loss {loss:.4g} is a spike, {loss / usual:.3g} times the median of {len(losses)} steps "
            f"(guards.spike_factor {guards.spike_factor:g})"
        )

    def after(self, step: int, batch: Batch, report: StepReport) -> None:
        """Take in what a step came to; called by all ranks together.

        Raises:
            TrainingDiverged: guards.max_skips updates in a row could not be applied; the weights are those before, and
                the batch was written down.
        """
        if not report.problem:
            self._in_a_row.clear()
            if self.config.guards.spike_factor:
                self._losses.append(self._weighted(report.text_loss, report.image_loss))
            return
        self.skipped += 1
        self._in_a_row.append(step)
        notes = diagnosis.gathered(diagnosis.note(self.engine, self.config.training, batch, report))
        cause = diagnosis.explain(notes, report.finite)
        line = f"step {step}: {report.problem}; {cause.text}"
        count, most = len(self._in_a_row), self.config.guards.max_skips
        if count < most:
            self.say(f"{line}; update skipped, {count} in a row, {most} end the run (guards.max_skips)")
            return
        folder = self._folder / "skipped" / f"step_{step:08d}"
        failed = diagnosis.dump(folder, self.engine, batch, notes, cause, report.problem)
        where = f"the batch could not be written to {folder} ({failed})" if failed else f"the batch is in {folder}"
        steps = ",".join(map(str, self._in_a_row))
        raise TrainingDiverged(
            f"{line}; {count} in a row were skipped (guards.max_skips), weights are those before; {where}; "
            f"guards.steps_to_skip=[{steps}] goes on without them"
        )

    def state(self) -> dict[str, Any]:
        """As JSON, for a checkpoint."""
        return {"skipped": self.skipped, "in_a_row": list(self._in_a_row), "losses": list(self._losses)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a `state`; a checkpoint that has none counts as one without skips."""
        self.skipped = int(state.get("skipped", 0))
        self._in_a_row = list(state.get("in_a_row", []))
        self._losses.extend(state.get("losses", []))

    def _weighted(self, text_loss: float, image_loss: float) -> float:
        training = self.config.training
        return training.text_loss_weight * text_loss + training.image_loss_weight * image_loss

    # The end ----------------------------------------------------------------------------------------------------------

    @property
    def flags(self) -> list[bool]:
        """Which of REQUESTS this rank knows of, to be counted over all ranks."""
        return [*self._heard[:-1], time.time() >= self._ends_at]

    def stop(self, report: StepReport) -> Stopped | None:
        """What to raise once the run is saved, if some rank was asked to end it."""
        asked = report.output.flags.tolist()
        for (name, code), count in zip(REQUESTS, asked, strict=True):
            if count:
                return Stopped(f"{name}: saved and ended early; `emu2 train ... --resume auto` goes on", code)
        return None

    def _hear(self, request: int) -> Callable[[int, FrameType | None], None]:
        def handler(number: int, frame: FrameType | None) -> None:
            self._heard[request] = True

        return handler

    # Stragglers -------------------------------------------------------------------------------------------------------

    def stragglers(self, z_scores: list[float]) -> None:
        """Take in a record's z-scores, by rank; name those that have been too slow for long enough, once."""
        guards = self.config.guards
        for rank, z in enumerate(z_scores):
            self._slow[rank] = self._slow.get(rank, 0) + 1 if z > guards.straggler_z else 0
            if self._slow[rank] == guards.straggler_records:
                self.say(
                    f"rank {rank} is a straggler: its own work (loading, encoding) was {z:.1f} deviations slower than "
                    f"the median rank's, for {guards.straggler_records} records in a row; "
                    f"{self._folder}/heartbeat/rank_{rank:05d}.json says where it runs"
                )


def z_scores(seconds: list[float], step_seconds: float) -> list[float]:
    """How many deviations each rank's own work took longer than the median rank's.

    With the ordinary deviation no z-score of n ranks exceeds (n - 1) / √n, so it is that of the ranks around the
    median (1.4826 times the median distance, a normal distribution's), which the slow ones do not change. Where ranks
    are much alike, a hair is no deviation: it is at least 5% of the median and 1% of a step.
    """
    middle = statistics.median(seconds)
    spread = 1.4826 * statistics.median(abs(s - middle) for s in seconds)
    deviation = max(spread, 0.05 * middle, 0.01 * step_seconds, 1e-9)
    return [(s - middle) / deviation for s in seconds]
