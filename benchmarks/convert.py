"""What conversion costs: bytes a second over those of `cp`, and the memory it takes.

to_hf, from_hf     speed of a conversion, SHA-256 of all that is written included, over that of `cp` of the same folder.
                   Both end with the bytes on the disk: conversion syncs each file, and `sync` does so after `cp`. What
                   was written just before is in the page cache for both
memory             two shards and 1 GB, over the largest resident memory of a converting process, which has Python and
                   torch in it

The model is a made-up one of 4.3 GB in bf16 with layers as wide as a 1.5 B LLaMA's; shards have 500 MB. Its folders are
as a run and the Hub have them, without checksums of their own to compare with. Needs 14 GB on the disk of --directory.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import _common as common
import torch
from safetensors.torch import save_file

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import from_hf, huggingface
from emu2_megatron.convert.shards import MANIFEST
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.model.parameters import hf_parameters

SHARD = 500_000_000
ALLOWED = 2 * SHARD + 10**9


def model(layers: int) -> ModelConfig:
    """Small pictures, and decoder layers of 101 MB in bf16."""
    tiny = PRESETS["emu2_tiny"]
    decoder = replace(PRESETS["emu2_37b"].decoder, num_layers=layers, hidden_size=2048, num_attention_heads=16,
                      ffn_hidden_size=5504)  # fmt: skip
    return replace(tiny, decoder=decoder)


def make_folder(folder: Path, config: ModelConfig) -> None:
    """A Hugging Face folder of shards in bf16. Which numbers does not matter, only that they are not all the same."""
    folder.mkdir()
    noise = torch.randint(-(2**15), 2**15, (1 << 24,), dtype=torch.int16, generator=torch.Generator().manual_seed(0))
    groups: list[dict[str, torch.Tensor]] = [{}]
    where: dict[str, str] = {}
    size = 0

    def flush() -> None:
        name = f"model-{len(groups):05d}.safetensors"
        save_file(groups[-1], folder / name)
        where.update(dict.fromkeys(groups[-1], name))
        groups[-1] = {}
        groups.append({})

    for name, (_, shape, natives) in hf_parameters(config).items():
        count = torch.Size(shape).numel()
        if size + 2 * count > SHARD and groups[-1]:
            flush()
            size = 0
        repeated = noise.repeat(-(-count // len(noise)))[:count].view(torch.bfloat16).reshape(shape).clone()
        groups[-1][name] = repeated if natives else torch.ones(shape)
        size += 2 * count
    flush()
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    content = huggingface.config_json(config, torch.bfloat16, False, 32000)
    (folder / "config.json").write_text(json.dumps(content))


def convert(direction: str, source: Path, target: Path, layers: int) -> None:
    """One conversion; prints seconds and the peak of resident memory in bytes."""
    start = time.perf_counter()
    if direction == "to_hf":
        to_hf(source, target, model(layers), None, shard_size=SHARD)
    else:
        from_hf.write(from_hf.whole(source), target, None, shard_size=SHARD)
    seconds = time.perf_counter() - start
    peak = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print(json.dumps([seconds, int(peak.split()[1]) * 1024]))


def in_process(direction: str, source: Path, target: Path, layers: int) -> tuple[float, int]:
    """`convert` in a process of its own: seconds, bytes of memory."""
    command = [sys.executable, __file__, "--convert", direction, str(source), str(target), "--layers", str(layers)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    seconds, peak = json.loads(done.stdout.splitlines()[-1])
    return seconds, peak


def copy(source: Path, target: Path) -> float:
    """Seconds of `cp` and `sync`."""
    start = time.perf_counter()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    copied = time.perf_counter() - start
    subprocess.run(["sync", *map(str, target.iterdir())], check=True)
    print(
        f"  cp {copied:.1f} s, of {size_of(source) / 1e9:.2f} GB, with sync {time.perf_counter() - start:.1f} s",
        flush=True,
    )
    return time.perf_counter() - start


def size_of(folder: Path) -> int:
    """Bytes of all files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def main() -> int:
    parser = common.arguments(__doc__, rounds=3)
    parser.add_argument("--layers", type=int, default=40, help="decoder layers, 101 MB each (default 40)")
    parser.add_argument("--directory", help="where to work; default: the system's folder for temporary files")
    parser.add_argument("--convert", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.convert:
        direction, source, target = options.convert
        convert(direction, Path(source), Path(target), options.layers)
        return 0
    seconds: dict[str, list[float]] = {name: [] for name in ("to_hf", "from_hf", "cp hf", "cp checkpoint")}
    peaks: list[int] = []
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        root = Path(name)
        hf, checkpoint, scratch = root / "hf", root / "checkpoint", root / "scratch"
        make_folder(hf, model(options.layers))
        print(f"a model of {size_of(hf) / 1e9:.2f} GB, shards of {SHARD / 1e9:.1f} GB", flush=True)
        in_process("from_hf", hf, checkpoint, options.layers)  # not timed: it makes what to_hf starts from
        (checkpoint / MANIFEST).unlink()  # a run's checkpoint has none
        for number in range(options.rounds):
            turns = [("from_hf", hf), ("cp hf", hf), ("to_hf", checkpoint), ("cp checkpoint", checkpoint)]
            for what, source in turns[:: 1 if number % 2 else -1]:
                if what.startswith("cp"):
                    taken = copy(source, scratch)
                else:
                    taken, peak = in_process(what, source, scratch, options.layers)
                    peaks.append(peak)
                    print(f"  {what} {taken:.1f} s, {peak / 1e9:.2f} GB of memory", flush=True)
                seconds[what].append(taken)
                shutil.rmtree(scratch)
    for what, taken in seconds.items():
        print(f"{what}: {statistics.median(taken):.1f} s, the median of {len(taken)}")
    return common.report([
        ("convert_to_hf_speed", common.quotient(seconds["cp checkpoint"], seconds["to_hf"]), 0.5),
        ("convert_from_hf_speed", common.quotient(seconds["cp hf"], seconds["from_hf"]), 0.5),
        ("convert_memory", ALLOWED / max(peaks), 1.0),
    ])  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
