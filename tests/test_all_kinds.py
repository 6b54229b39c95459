"""Every kind of sample in examples/data trains in the tiny recipe: videos of two codecs, French and Chinese text."""

import json
import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from emu2_megatron.config.loading import load
from emu2_megatron.config.validate import validate
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.tokenizer import tokenizer_for

ROOT = Path(__file__).parents[1]
STEPS = 40


def run(*command: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    return subprocess.run(
        [sys.executable, "-m", "emu2_megatron.cli", *command],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_all_kinds(tmp_path: Path) -> None:
    made = run("shards", "--input", "examples/data", "--output", str(tmp_path / "shards"),
               "--tokenizer", "examples/data/tokenizer.model", "--max-tokens", "160")  # fmt: skip
    assert made.returncode == 0, made.stderr
    sources = ("images", "videos", "interleaved", "grounded", "vqa", "text")
    overrides = [
        f"data.shards=[{', '.join(f'{tmp_path}/shards/{source}-*.tar' for source in sources)}]",
        f"logging.directory={tmp_path}/run", f"training.steps={STEPS}", "parallel.tensor_parallel_size=1",
        "parallel.pipeline_parallel_size=1", "training.train_encoder=true", "logging.every=10",
    ]  # fmt: skip
    done = run("train", "--config", "tiny_all_kinds", *overrides)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert records[-1]["text_loss"] < 0.85 * records[0]["text_loss"]
    assert records[-1]["image_loss"] < records[-1]["mean_predictor_image_loss"]
    # 200 boxes do not fit; all else is fine.
    listed = [json.loads(line) for line in (tmp_path / "run/quarantine/rank_00000.jsonl").read_text().splitlines()]
    assert [(entry["key"], entry["reason"]) for entry in listed] == [
        ("grounded/digits_200-000001", "longer than the context")
    ]

    # The rows it trained on, once more: what is in them.
    config = load("tiny_all_kinds", overrides)
    assert validate(config, 1) == 1
    seen = defaultdict(set)
    with Loader(config, tokenizer_for(config), range(config.training.global_batch_size)) as loader:
        for _ in range(STEPS):
            for key in (key for row in next(loader) for key in row.keys):
                seen[key.partition("/")[0]].add(key)
    assert set(seen) == set(sources)
    assert len(seen["videos"]) == 3 and len(seen["grounded"]) == 4 and len(seen["images"]) == 44
    assert {language for key in seen["interleaved"] for language in ("fr-FR", "zh-CN") if language in key} == {
        "fr-FR",
        "zh-CN",
    }
