"""Says where every rank is, and ends a run in which nothing happens any more.

A thread of each rank writes what its main thread is doing into `heartbeat/rank_00003.json`, once a second. If no step
has ended for too long, each rank writes the stacks of all its threads into `hang/rank_00003.txt`; rank 0 says, from the
heartbeats, who is late. Then all processes end with an error, so that the launcher starts the run again. Ranks on
machines that do not share the folder are not seen; each still ends by itself.
"""

import faulthandler
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import FrameType, TracebackType

from emu2_megatron.errors import Stopped

PHASES = ("load", "exchange", "encode", "decode", "encoder_backward", "update", "log", "save")
"""What a rank does in a step, in this order."""
FIRST_STEP = 3
"""How many times longer the first step may take: there is much to be compiled, allocated and connected."""
_WAITS_IN = (f"torch{os.sep}distributed{os.sep}", "p2p_communication.py", f"torch{os.sep}cuda{os.sep}")
"""Parts of the names of files in whose functions a rank waits for others, or for its GPU, which does."""
_SILENT = 30.0
"""Seconds without a heartbeat after which a process is taken for stopped."""
_PATIENCE = 10.0
"""Seconds that ranks have to notice a hang after the first one did."""


@dataclass
class Heartbeat:
    """What a rank is doing."""

    rank: int
    host: str
    pid: int
    step: int
    """The step it is in, from 1."""
    phase: str
    """One of PHASES; `ended` after the last. After an error it stays where that was."""
    since: float
    """Unix time at which the phase began."""
    written: float
    """Unix time of this heartbeat."""
    waits: bool = False
    """Whether it was seen to wait for others; looked at only when the run hangs."""
    at: str = ""
    """The innermost function it was in then."""


class Watchdog:
    """Watches this rank's main thread, which tells it what it does. Used in a `with` block of that thread."""

    def __init__(self, folder: Path, rank: int, world_size: int, hang_seconds: float) -> None:
        """`folder` gets `heartbeat/` and, if need be, `hang/`."""
        self.folder, self.rank, self.world_size, self.hang_seconds = folder, rank, world_size, hang_seconds
        self._now = (0, "load", time.time())  # one tuple, so that the thread never sees half of a change
        self._progress = time.monotonic()
        self._patience = FIRST_STEP
        self._over = threading.Event()
        self._main = threading.main_thread().ident
        self._thread = threading.Thread(target=self._watch, name="emu2-watchdog", daemon=True)

    def enter(self, phase: str) -> None:
        """The main thread begins a phase."""
        self._now = (self._now[0], phase, time.time())

    def begin(self, step: int) -> None:
        """The main thread begins a step, from 1."""
        self._now = (step, "load", time.time())

    def progressed(self) -> None:
        """A step has ended, or something else that may take as long as a hang is noticed after: now it counts anew."""
        self._progress, self._patience = time.monotonic(), 1

    def __enter__(self) -> "Watchdog":
        (self.folder / "heartbeat").mkdir(parents=True, exist_ok=True)
        # What an earlier start of the run left says nothing about this one.
        (self.folder / "hang" / self._file("txt")).unlink(missing_ok=True)
        if self.rank == 0:
            (self.folder / "hang" / "report.txt").unlink(missing_ok=True)
        self._progress = time.monotonic()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if kind is None or issubclass(kind, Stopped):
            self.enter("ended")
        self._write(self._heartbeat())

    # What follows runs in the thread ----------------------------------------------------------------------------------

    def _watch(self) -> None:
        while not self._over.wait(1.0):
            self._write(self._heartbeat())
            if time.monotonic() - self._progress > self._patience * self.hang_seconds:
                self._hangs()

    def _heartbeat(self) -> Heartbeat:
        step, phase, since = self._now
        return Heartbeat(self.rank, socket.gethostname(), os.getpid(), step, phase, since, time.time())

    def _write(self, beat: Heartbeat) -> None:
        file = self.folder / "heartbeat" / self._file("json")
        temporary = file.with_suffix(".tmp")
        try:
            temporary.write_text(json.dumps(asdict(beat)))
            temporary.replace(file)
        except OSError:
            pass  # a full disk is no reason to end: what needs it will say so

    def _file(self, ending: str) -> str:
        return f"rank_{self.rank:05d}.{ending}"

    def _hangs(self) -> None:
        """Write the stacks, report, and end the process."""
        try:
            beat = self._heartbeat()
            beat.waits, beat.at = _position(sys._current_frames().get(self._main or 0))
            self._write(beat)
            hang = self.folder / "hang"
            hang.mkdir(exist_ok=True)
            with open(hang / self._file("txt"), "w") as stacks:
                faulthandler.dump_traceback(stacks, all_threads=True)
            self._report(hang / "report.txt")
        finally:
            # The main thread cannot be reached; nothing short of this ends the process.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)

    def _report(self, file: Path) -> None:
        """Rank 0 reports; if it cannot, each of the others does."""
        if self.rank == 0:
            _await(lambda: len(list(file.parent.glob("rank_*.txt"))) == self.world_size)
        else:
            _await(file.exists, 2)
            time.sleep(1)  # rank 0 may still be printing, and a launcher kills it once one of us has ended
        if not file.exists():
            text = report(heartbeats(self.folder), self.world_size, self.hang_seconds * self._patience, file.parent)
            print(f"emu2, rank {self.rank}: {text}", file=sys.stderr, flush=True)
            temporary = file.with_name(f"{self._file('report')}.tmp")
            temporary.write_text(text + "\n")
            temporary.replace(file)


def _await(condition: Callable[[], bool], times: int = 1) -> None:
    deadline = time.monotonic() + times * _PATIENCE
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.1)


def heartbeats(folder: Path) -> list[Heartbeat]:
    """Those that can be read, by rank."""
    found = []
    for file in sorted((folder / "heartbeat").glob("rank_*.json")):
        try:
            found.append(Heartbeat(**json.loads(file.read_text())))
        except (OSError, ValueError, TypeError):
            continue
    return found


def late(beats: Sequence[Heartbeat]) -> list[Heartbeat]:
    """Whom the others wait for: processes that are silent, else ranks that have come least far; of those in the same
    phase, the ones that do not wait themselves. Nobody, if all are alike."""
    newest = max((beat.written for beat in beats), default=0.0)
    if silent := [beat for beat in beats if newest - beat.written > _SILENT]:
        return silent

    def reached(beat: Heartbeat) -> tuple[int, int, bool]:
        phase = PHASES.index(beat.phase) if beat.phase in PHASES else len(PHASES)
        return beat.step, phase, beat.waits

    least = min(map(reached, beats), default=None)
    found = [beat for beat in beats if reached(beat) == least]
    return found if len(found) < len(beats) else []


def report(beats: Sequence[Heartbeat], world_size: int, seconds: float, stacks: Path) -> str:
    """What is said about a hang: a line, and one for each rank that is late."""
    newest = max((beat.written for beat in beats), default=0.0)
    missing = sorted(set(range(world_size)) - {beat.rank for beat in beats})
    who = late(beats)
    lines = [f"no step has ended for {seconds:.0f} s (guards.hang_minutes); the stacks of all ranks are in {stacks}"]
    if who:
        lines[0] += f"; late: rank {', '.join(str(beat.rank) for beat in who)}"
    elif not missing:
        phases = ", ".join(f"{beat.rank} {beat.phase} of step {beat.step}" for beat in beats)
        lines[0] += f"; no rank is behind the others: {phases}"
    for beat in who:
        silent = newest - beat.written
        state = f"no heartbeat for {silent:.0f} s" if silent > _SILENT else f"at {beat.at}" if beat.at else ""
        lines.append(
            f"rank {beat.rank} ({beat.host}, process {beat.pid}): in {beat.phase} of step {beat.step} for "
            f"{newest - beat.since:.0f} s{', ' if state else ''}{state}"
        )
    if missing:
        lines.append(f"no heartbeat at all of rank {', '.join(map(str, missing))}")
    return "\n".join(lines)


def _position(frame: FrameType | None) -> tuple[bool, str]:
    """Whether a thread waits for other ranks, and the innermost function it is in."""
    at = f"{frame.f_code.co_name} ({frame.f_code.co_filename}:{frame.f_lineno})" if frame else ""
    while frame is not None:
        if any(part in frame.f_code.co_filename for part in _WAITS_IN):
            return True, at
        frame = frame.f_back
    return False, at
