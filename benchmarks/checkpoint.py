"""What a checkpoint costs, beside writing and reading the same tensors with safetensors, one process.

save, load         seconds of writing the tensors with safetensors (one file, synced as a checkpoint is) over those of
                   saving, and of loading, a whole checkpoint: checksums, checks and renaming included. (Reading them
                   with safetensors, into the memory the model is in, is printed beside it.)
not_stalled        with checkpoint.asynchronous, the share of a synchronous save that the training loop does not wait
                   (files are written while nothing else runs)
"""

import gc
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import _common as common
import psutil
from safetensors import safe_open
from safetensors.torch import save_file

from emu2_megatron.checkpoint import adam, files
from emu2_megatron.checkpoint.load import load
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.checkpoint.state import stored
from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import CheckpointConfig, Config, TrainingConfig
from emu2_megatron.parallel import topology, wrap

MODEL = PRESETS["emu2_small"]


def configuration(layers: int) -> Config:
    model = replace(MODEL, decoder=replace(MODEL.decoder, num_layers=layers))
    return Config(model=model, training=TrainingConfig(global_batch_size=1, micro_batch_size=1, train_encoder=True))


def measure(layers: int, rounds: int, folder: str) -> dict[str, list[float]]:
    """Seconds of each thing in each round; the first round is dropped."""
    config, root = configuration(layers), Path(folder)
    engine = wrap.build(config, topology.initialize(config))
    adam.make_moments(engine)
    state = stored(engine)
    tensors = {f"{name} {offset}": box for name, pieces in state.items() for offset, box in pieces.boxes.items()}
    total = sum(tensor.nbytes for tensor in tensors.values())
    parameters = sum(p.numel() for part in engine.wrapped for p in part.parameters())
    print(
        f"{parameters / 1e6:.0f} M parameters, bf16 with fp32 masters: {total / 1e9:.2f} GB in {len(tensors)} tensors"
    )
    before = psutil.Process().memory_info().rss
    now = Saver(CheckpointConfig(), root / "now", engine, print)
    later = Saver(CheckpointConfig(asynchronous=True), root / "later", engine, print)
    step = 0

    def write_safetensors() -> None:
        save_file(tensors, root / "all.safetensors")
        files.sync(root / "all.safetensors")

    def read_safetensors() -> None:
        with safe_open(root / "all.safetensors", "pt") as file:
            for name, tensor in tensors.items():
                tensor.copy_(file.get_tensor(name))

    variants: dict[str, Callable[[], Any]] = {
        "write": write_safetensors,
        "save": lambda: now.save(step, {"data": {}}),
        "stall": lambda: later.save(step, {"data": {}}),
        "read": read_safetensors,
        "load": lambda: load(files.folder(root / "now", step), engine),
    }
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for number in range(rounds + 1):
        step = number
        for name in variants:
            gc.collect()
            start = time.perf_counter()
            variants[name]()
            if number:
                seconds[name].append(time.perf_counter() - start)
            later.finish()
        for name in ("now", "later"):
            shutil.rmtree(root / name)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"peak memory {peak / 1e9:.1f} GB; before the first save {before / 1e9:.1f} GB")
    for name, taken in seconds.items():
        speed = total / 1e9 / statistics.median(taken)
        print(f"{name:6} {min(taken):6.2f} to {max(taken):6.2f} s, {speed:.2f} GB/s")
    return seconds


def main() -> int:
    parser = common.arguments(__doc__, rounds=5)
    parser.add_argument("--layers", type=int, default=MODEL.decoder.num_layers, help="decoder layers of emu2_small")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:  # /tmp may be memory
        seconds = common.on_ranks(1, 2, measure, options.layers, options.rounds, folder)
    stalled = common.quotient(seconds["stall"], seconds["save"])
    return common.report([
        ("checkpoint_save", common.quotient(seconds["write"], seconds["save"]), 0.5),
        ("checkpoint_load", common.quotient(seconds["write"], seconds["load"]), 0.5),
        ("checkpoint_not_stalled", 1 - stalled, 0.85),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
