"""What data costs: pictures a core prepares, what a training step waits for them, and memory over many samples.

images_per_core    one core and one thread each, the same files: ours (probe, decode, resize, normalise, a batch at a
                   time) over a straightforward Dataset (Pillow decodes and resizes to 448 x 448, bicubic; torch
                   normalises picture by picture). The photos of examples/data as they are, and enlarged to 1280
                   pixels; the lower of the two counts.
not_waiting        share of a training step of emu2_small, from its second batch on, that does not wait for the loader's
                   one background thread
flat_memory        memory in use by a process that only loads, after 2,000 samples over that after 4,000 (1: flat).
                   What malloc keeps of freed memory, which goes up and down by 15 MiB, is given back before each look
"""

import ctypes
import gc
import io
import os
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import _common as common
import numpy as np
import psutil
import torch
from PIL import Image

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, OptimizerConfig, TrainingConfig
from emu2_megatron.data import probe
from emu2_megatron.data.decode import CLIP_MEAN, CLIP_STD, backend, decode, normalize
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.make_shards import Options, make_shards
from emu2_megatron.data.tokenizer import tokenizer_for
from emu2_megatron.data.visuals import EncodedPicture
from emu2_megatron.parallel import topology, wrap

EXAMPLES = Path(__file__).parents[1] / "examples" / "data"
SIZE, BATCH = 448, 16


def photos(longest: int | None) -> list[bytes]:
    """The example photos, as they are or enlarged to so many pixels and encoded again."""
    files = sorted((EXAMPLES / "images").glob("*.jpg"))
    if longest is None:
        return [file.read_bytes() for file in files]
    encoded = []
    for file in files:
        picture = Image.open(file).convert("RGB")
        scale = longest / max(picture.size)
        large = picture.resize((round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC)
        buffer = io.BytesIO()
        large.save(buffer, "JPEG", quality=90)
        encoded.append(buffer.getvalue())
    return encoded


def ours(files: list[bytes]) -> None:
    for start in range(0, len(files), BATCH):
        batch = files[start : start + BATCH]
        for data in batch:
            probe.picture("0.jpg", data)
        results = decode([EncodedPicture(data) for data in batch], SIZE)
        normalize(torch.cat([result for result in results if isinstance(result, torch.Tensor)]), torch.float32)


def plain(files: list[bytes]) -> None:
    mean, std = torch.tensor(CLIP_MEAN).view(3, 1, 1), torch.tensor(CLIP_STD).view(3, 1, 1)
    for start in range(0, len(files), BATCH):
        batch = []
        for data in files[start : start + BATCH]:
            square = Image.open(io.BytesIO(data)).convert("RGB").resize((SIZE, SIZE), Image.Resampling.BICUBIC)
            pixels = torch.from_numpy(np.array(square)).permute(2, 0, 1).float().div(255)
            batch.append((pixels - mean) / std)
        torch.stack(batch)


def images_per_core(rounds: int) -> float:
    """Ours over plain, on one core."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    torch.set_num_threads(1)
    try:
        ratios = []
        for title, files in (("as they are", photos(None)), ("1280 pixels", photos(1280))):
            seconds: dict[str, list[float]] = {"ours": [], "plain": []}
            variants = {"ours": ours, "plain": plain}
            for number in range(rounds + 1):  # the first one is dropped
                for name in list(variants)[:: 1 if number % 2 else -1]:
                    start = time.perf_counter()
                    variants[name](files)
                    if number:
                        seconds[name].append(time.perf_counter() - start)
            speed = {name: len(files) / statistics.median(taken) for name, taken in seconds.items()}
            ratios.append(common.quotient(seconds["plain"], seconds["ours"]))
            print(f"photos {title}: ours ({backend()}) {speed['ours']:.0f} images/s, Pillow and torch "
                  f"{speed['plain']:.0f} images/s, {ratios[-1]:.2f} times")  # fmt: skip
        return min(ratios)
    finally:
        os.sched_setaffinity(0, cores)


def configuration(shards: str) -> Config:
    model = PRESETS["emu2_small"]
    # The example tokenizer's vocabulary is smaller than emu2_small's, which does not matter here.
    return Config(
        model=replace(model, decoder=replace(model.decoder, vocab_size=1272)),
        data=DataConfig(shards=(shards,), tokenizer=str(EXAMPLES / "tokenizer.model"), sequence_length=1024),
        training=TrainingConfig(global_batch_size=2, micro_batch_size=1, precision="fp32", train_encoder=False),
        optimizer=OptimizerConfig(warmup_steps=1),
    )


def not_waiting(shards: str, steps: int) -> float:
    """Share of the time that training steps do not wait for data."""
    config = configuration(shards)
    engine = wrap.build(config, topology.initialize(config))
    waited = worked = 0.0
    with Loader(config, tokenizer_for(config), range(2)) as loader:
        own = next(loader)
        for _ in range(steps):
            start = time.perf_counter()
            common.whole_step(engine, config, own)
            middle = time.perf_counter()
            own = next(loader)
            waited, worked = waited + time.perf_counter() - middle, worked + middle - start
    print(f"emu2_small: {worked / steps:.2f} s of work a step, {1e3 * waited / steps:.1f} ms of waiting for data")
    return worked / (worked + waited)


def flat_memory(shards: str) -> float:
    """Memory in use after 2,000 samples over that after 4,000."""
    config, samples = configuration(shards), 0
    used: dict[int, float] = {}
    with Loader(config, tokenizer_for(config), range(2)) as loader:
        while samples < 4000:
            samples += sum(len(row.keys) for row in next(loader))
            for mark in (2000, 4000):
                if samples >= mark and mark not in used:
                    gc.collect()
                    resident = psutil.Process().memory_info().rss / 2**20
                    ctypes.CDLL(None).malloc_trim(0)
                    used[mark] = psutil.Process().memory_info().rss / 2**20
                    print(f"after {samples:,} samples: {used[mark]:.1f} MiB in use, {resident:.1f} MiB resident")
    return used[2000] / used[4000]


def main() -> int:
    parser = common.arguments(__doc__, rounds=7)
    parser.add_argument("--steps", type=int, default=8, help="training steps that are timed (default 8)")
    options = parser.parse_args()
    speed = images_per_core(options.rounds)
    os.environ.setdefault("MALLOC_ARENA_MAX", "2")  # of the processes below, as `emu2 train` sets it
    with tempfile.TemporaryDirectory() as folder:
        shards = Path(folder) / "shards"
        make_shards(EXAMPLES, shards, Options())
        pattern = f"{shards}/i*.tar"  # images and interleaved
        free = common.on_ranks(1, os.cpu_count() or 1, not_waiting, pattern, options.steps)
        flat = common.on_ranks(1, os.cpu_count() or 1, flat_memory, pattern)
    return common.report([("images_per_core", speed, 2.0), ("not_waiting", free, 0.98), ("flat_memory", flat, 0.98)])


if __name__ == "__main__":
    sys.exit(main())
