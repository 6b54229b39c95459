"""One data-parallel rank that only loads: notes the samples of every step, saves its place, and may be killed.

    python resume_worker.py FOLDER SHARDS RANK RANKS START STEPS

goes on from FOLDER/place_START (all ranks' files there, merged), or from the beginning where START is 0.
"""

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, TrainingConfig
from emu2_megatron.data.loader import Loader, merged
from emu2_megatron.data.tokenizer import Tokenizer

SLOTS, SAVE_EVERY = 8, 5
TOKENIZER = Path(__file__).parents[2] / "examples/data/tokenizer.model"


def config(shards: str) -> Config:
    data = DataConfig(shards=(shards,), sequence_length=64, packing_buffer=5)
    return Config(model=PRESETS["emu2_tiny"], data=data, training=replace(TrainingConfig(), global_batch_size=SLOTS))


def main(folder: Path, shards: str, rank: int, ranks: int, start: int, steps: int) -> None:
    with Loader(config(shards), Tokenizer(TOKENIZER), range(rank, SLOTS, ranks)) as loader:
        if start:
            saved = [json.loads(file.read_text()) for file in (folder / f"place_{start}").glob("*.json")]
            loader.load_state(merged(saved))
        with (folder / f"seen_{start}_{rank}.jsonl").open("w") as seen:
            for step in range(start + 1, steps + 1):
                rows = {slot: row.keys for slot, row in zip(loader.slots, next(loader), strict=True)}
                seen.write(json.dumps({"step": step, "rows": rows}) + "\n")
                seen.flush()
                time.sleep(0.03)  # or a run could end before it is killed
                if step % SAVE_EVERY == 0 or step == steps:
                    place = folder / f"place_{step}"
                    place.mkdir(exist_ok=True)
                    (place / f"{rank}.tmp").write_text(json.dumps(loader.state()))
                    os.replace(place / f"{rank}.tmp", place / f"{rank}.json")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))
