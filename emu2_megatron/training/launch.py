"""From a validated configuration to running ranks."""

import errno
import os
import signal
import tempfile
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
import torch.distributed as dist

from emu2_megatron.config.layout import part_layers
from emu2_megatron.config.loading import to_yaml
from emu2_megatron.config.schema import Config
from emu2_megatron.config.validate import replica_size
from emu2_megatron.errors import ConfigError, Emu2Error, PeerLost, Stopped
from emu2_megatron.parallel import estimate_memory
from emu2_megatron.parallel.estimate_memory import Work
from emu2_megatron.platform import kernels
from emu2_megatron.training import objective

EXIT_CODES = {signal.SIGTERM: 128 + signal.SIGTERM, signal.SIGUSR1: os.EX_TEMPFAIL}
"""What a run that a signal asked to end returns once it has saved: SIGTERM's is the shell's for it, SIGUSR1's means
"start me again". Neither is 0: torchrun, SLURM's dependencies and Kubernetes would take the run for finished."""
SECONDS_TO_SAVE = "300"
"""How long the launcher waits for ranks that it has told to end."""


def train(config: Config, nproc_per_node: int | None = None) -> None:
    """Train: as one rank of torchrun's world if there is one, else with as many processes as the layout needs.

    Raises:
        ConfigError: this machine cannot hold the processes or the model or cannot run FP8, or an earlier run's
            checkpoints are there.
        Stopped: the run was asked to end, and has saved.
        Emu2Error: a rank failed.
    """
    kernels.require_fp8(config.fp8)
    _check_directory(config)
    objective.tokenizer(config)  # a wrong one is cheaper to notice before the model is built
    if "RANK" in os.environ:
        # Ctrl-C reaches every rank at once: each ends without a traceback, and the launcher says it once.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        _run(config)
        return
    processes = nproc_per_node or replica_size(config) * (config.parallel.data_parallel_size or 1)
    _check_machine(config, processes)
    if processes == 1:
        _run(config)
    else:
        _launch(config, processes)


def _run(config: Config) -> None:
    from emu2_megatron.training import loop

    if os.environ.get("RANK", "0") == "0" and (line := _layout_line(config)):
        print(line, flush=True)
    if config.fp8.emulate and os.environ.get("RANK", "0") == "0":
        print(
            f"FP8 IS EMULATED (recipe {config.fp8.recipe}) in plain PyTorch, to show how training converges: slower "
            "than bf16, and its times say nothing about a GPU.",
            flush=True,
        )
    try:
        loop.run(config)
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        cause = str(error).strip().partition("\n")[0].partition(". ")[0]
        raise PeerLost(f"another rank ended or cannot be reached; its message says why ({cause})") from error
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO):
            raise
        raise Emu2Error(f"a file of the run cannot be written or read: {error}") from error


def _is_lost_peer(error: BaseException) -> bool:
    """Whether a collective failed, which has no type of its own in gloo."""
    words = ("gloo", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
    return isinstance(error, dist.DistError) or any(word in str(error) for word in words)


def _layout_line(config: Config) -> str:
    """Who has how many decoder layers, unless all parts have the same number."""
    layers, stages = part_layers(config), config.parallel.pipeline_parallel_size
    if len(set(layers)) == 1:
        return ""
    return "decoder layers of each stage: " + ", ".join(" + ".join(map(str, layers[s::stages])) for s in range(stages))


def resume(config: Config) -> str:
    """What to go on from: checkpoint.resume, or `auto` in a run that torchrun or SLURM has started again."""
    restarts = (os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), os.environ.get("SLURM_RESTART_COUNT", "0"))
    return config.checkpoint.resume or ("auto" if any(int(count) > 0 for count in restarts) else "")


def _check_directory(config: Config) -> None:
    """Refuse now what would fail at the first save, hours later, or write over an earlier run."""
    wanted, own = resume(config), checkpoint_directory(config).resolve()
    goes_on = wanted == "auto" or own in Path(wanted).resolve().parents
    for key, directory, pattern in (
        ("logging.directory", Path(config.logging.directory), "log.jsonl"),
        ("checkpoint.directory", checkpoint_directory(config), "step_*"),
    ):
        try:
            directory.mkdir(parents=True, exist_ok=True)
            # A run that ended before its first step leaves an empty log.
            earlier = sorted(path.name for path in directory.glob(pattern) if path.is_dir() or path.stat().st_size)
        except OSError as error:
            raise ConfigError(f"{key}: {directory} cannot be used: {error}") from error
        if not os.access(directory, os.W_OK):
            raise ConfigError(f"{key}: {directory} is not writable")
        if earlier and not goes_on:
            raise ConfigError(
                f"{key}: {directory} already has {earlier[-1]} of an earlier run; go on with it by --resume auto, "
                "choose another logging.directory, or move it away"
            )


def checkpoint_directory(config: Config) -> Path:
    """Where this run's checkpoints go."""
    return Path(config.checkpoint.directory or Path(config.logging.directory) / "checkpoints")


def _check_machine(config: Config, processes: int) -> None:
    if torch.cuda.is_available():
        if processes > torch.cuda.device_count():
            raise ConfigError(
                f"parallel: {processes} ranks wanted, this machine has {torch.cuda.device_count()} GPUs; on several "
                "machines start `emu2 train` under torchrun"
            )
        return
    needed = _memory(config, processes)
    memory = psutil.virtual_memory().total
    if needed > memory:
        raise ConfigError(
            f"model.preset: {config.model.preset} needs about {needed / 2**30:.0f} GiB on {processes} CPU processes, "
            f"this machine has {memory / 2**30:.0f} GiB and no GPU; try model.preset=emu2_tiny, or a cluster"
        )


def _memory(config: Config, processes: int) -> float:
    """Bytes that all ranks of a run need together, about."""
    if config.training.objective != "language":
        return objective.state_bytes(config) * processes
    replicas = processes // replica_size(config)
    stages = estimate_memory.memory(Work(config, replicas, estimate_memory.default_images(config), False))
    return sum(stage.total for stage in stages) * (processes // len(stages))


def _launch(config: Config, processes: int) -> None:
    """Start the ranks on this machine; they read the resolved configuration."""
    parallel = config.parallel
    context = f" x CP{parallel.context_parallel_size}" if parallel.context_parallel_size > 1 else ""
    print(
        f"starting {processes} processes: TP{parallel.tensor_parallel_size}{context} x "
        f"PP{parallel.pipeline_parallel_size} x DP{processes // replica_size(config)}",
        flush=True,
    )
    # Ranks that are told to end finish their step and save first.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", SECONDS_TO_SAVE)
    # Not in the run's own directory, which may turn out to be another run's.
    with tempfile.TemporaryDirectory(prefix="emu2-") as folder:
        resolved = Path(folder) / "config.yaml"
        resolved.write_text(to_yaml(config))
        start_ranks(["train", "--config", str(resolved)], processes)


def start_ranks(arguments: Sequence[str], processes: int) -> None:
    """Run `emu2` with these arguments as so many ranks on this machine, by torchrun.

    Raises:
        Stopped: the run was asked to end, and has saved.
        Emu2Error: a rank failed.
    """
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    # A torch thread pool in every process would fight over the cores.
    threads = max(1, (os.cpu_count() or 1) // processes)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    # glibc gives threads arenas of their own, in which what decoding frees stays for long: memory would creep up.
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")
    launcher = ["--standalone", f"--nproc-per-node={processes}", "-m", "emu2_megatron.cli"]
    if "--signals-to-handle" in run.get_args_parser().format_help():  # newer than the oldest torch we take
        launcher.insert(0, "--signals-to-handle=SIGTERM,SIGINT,SIGHUP,SIGQUIT,SIGUSR1")
    try:
        run.main([*launcher, *arguments])
    except SignalException as error:
        if code := EXIT_CODES.get(error.sigval):
            raise Stopped("", code) from error  # rank 0 has said it
        raise KeyboardInterrupt from error
    except ChildFailedError as error:
        codes = {rank: failure.exitcode for rank, failure in error.failures.items()}
        first, failure = error.get_first_failure()
        if failure.exitcode in EXIT_CODES.values():
            raise Stopped("", failure.exitcode) from None
        raise Emu2Error(_failed(codes, first)) from None


def _failed(codes: dict[int, int], first: int) -> str:
    """Which rank is to blame, given exit codes and the rank that torchrun noticed first: the launcher ends the others
    by SIGTERM, and a rank that lost its peer fails within the same moment as the peer."""
    killed = [rank for rank, code in codes.items() if code < 0 and code != -signal.SIGTERM]
    rank = killed[0] if killed else first
    if codes[rank] >= 0:
        return f"rank {rank} failed with exit code {codes[rank]}; its message is above"
    try:
        name = signal.Signals(-codes[rank]).name
    except ValueError:
        name = f"signal {-codes[rank]}"
    hint = "; the kernel does that when memory runs out" if name == "SIGKILL" else ""
    return f"rank {rank} was killed by {name}{hint}; --resume auto goes on from the last checkpoint"
