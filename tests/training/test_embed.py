"""`emu2 embed`: training on features is training on pictures, to the bit; what cannot be embedded stays in place."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from emu2_megatron.config.loading import load
from emu2_megatron.config.schema import Config
from emu2_megatron.data.features import ENCODER
from emu2_megatron.data.shards import RawSample, ShardIndex, write_shard
from emu2_megatron.errors import ConfigError, DataError
from emu2_megatron.training.embed import embed

ROOT = Path(__file__).parents[2]
PHOTOS = sorted((ROOT / "examples" / "data").rglob("*.jpg"))


def emu2(command: str, shards: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    settings = ["parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "training.precision=bf16",
                "parallel.data_parallel_size=1", "training.global_batch_size=4", "training.micro_batch_size=2",
                "training.steps=4", "logging.every=1", "logging.tensorboard=false", "data.max_bad_share=1"]  # fmt: skip
    return subprocess.run(
        [sys.executable, "-m", "emu2_megatron.cli", command, "--config", "tiny_interleaved"]
        + [f"data.shards=[{shards}/**/*.tar]", *settings, *arguments],
        cwd=ROOT, env={**environment, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards in two folders; one picture is cut off, one sample's JSON says nothing known."""
    folder = tmp_path_factory.mktemp("shards")
    photos = [photo.read_bytes() for photo in PHOTOS]
    page = [{"text": "Look:"}, {"image": "0.jpg"}, {"image": "1.jpg"}, {"text": "Nice."}]
    first = [
        RawSample("dog", {"kind": "caption", "text": "A dog.", "image": "0.jpg"}, {"0.jpg": photos[0]}),
        RawSample("cut", {"kind": "caption", "text": "A cut.", "image": "0.jpg"}, {"0.jpg": photos[1][:500]}),
        RawSample("page", {"kind": "interleaved", "content": page}, {"0.jpg": photos[2], "1.jpg": photos[3]}),
        RawSample("text", {"kind": "interleaved", "content": [{"text": "Words alone."}]}),
    ]
    second = [
        RawSample("odd", {"kind": "odd"}),
        *(
            RawSample(f"p{i}", {"kind": "caption", "text": f"Photo {i}.", "image": "0.jpg"}, {"0.jpg": photo})
            for i, photo in enumerate(photos[4:12])
        ),
    ]
    for name, samples in (("b/x.tar", first), ("a/x.tar", second)):
        (folder / name).parent.mkdir()
        write_shard(folder / name, samples)
    return folder


@pytest.fixture(scope="module")
def embedded(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("features")
    done = emu2("embed", shards, "--output", str(folder))
    assert done.returncode == 0, done.stderr
    assert (
        "pictures: 11" in done.stdout and "samples left as they were: picture is cut off or damaged: 1" in done.stdout
    )
    return folder


def test_samples_keep_their_places(shards: Path, embedded: Path) -> None:
    before, after = (ShardIndex([f"{folder}/**/*.tar"]) for folder in (shards, embedded))
    old, new = ([index.read(i) for i in range(len(index))] for index in (before, after))
    assert [sample.key for sample in new] == [sample.key for sample in old]
    by_key = {sample.key: sample for sample in new}
    assert sorted(by_key["page"].files) == ["0.jpg.safetensors", "1.jpg.safetensors"]
    assert by_key["page"].meta["content"][1] == {"image": "0.jpg.safetensors"}
    assert by_key["cut"] == next(sample for sample in old if sample.key == "cut")


def test_the_same_run_to_the_bit(shards: Path, embedded: Path, tmp_path: Path) -> None:
    """bf16, several steps: every loss and norm, and every byte of the weights; with prefetch as well."""
    runs = {"pictures": (shards, "false"), "prefetch": (shards, "true"), "features": (embedded, "false")}
    logs, weights, skipped = {}, {}, {}
    for name, (folder, prefetch) in runs.items():
        directory = f"logging.directory={tmp_path / name}"
        done = emu2("train", folder, directory, f"training.encoder_prefetch={prefetch}")
        assert done.returncode == 0, done.stderr
        records = [json.loads(line) for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        keys = ("text_loss", "image_loss", "mean_predictor_image_loss", "grad_norm")
        logs[name] = [[record[key] for key in keys] for record in records]
        skipped[name] = [record["skipped_samples"] for record in records]
        files = (tmp_path / name / "checkpoints").rglob("*.distcp")
        weights[name] = {file.name: file.read_bytes() for file in files}
        place = tmp_path / name / "checkpoints" / "step_00000004" / "trainer.json"
        weights[name]["place"] = place.read_bytes()
    assert len(logs["pictures"]) == 4 and len(weights["pictures"]) > 1
    assert logs["features"] == logs["pictures"] == logs["prefetch"]
    assert weights["features"] == weights["pictures"] == weights["prefetch"]
    assert skipped["pictures"] == skipped["features"] == skipped["prefetch"] and skipped["pictures"][-1] > 0


def test_started_again(shards: Path, embedded: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in embedded.rglob("*.tar")}
    missing = embedded / "a" / "x.tar"
    content = missing.read_bytes()
    missing.unlink()
    done = emu2("embed", shards, "--output", str(embedded))
    assert done.returncode == 0 and "shards: 1" in done.stdout and "shards that were there: 1" in done.stdout
    assert missing.read_bytes() == content
    kept = embedded / "b" / "x.tar"
    assert kept.stat().st_mtime_ns == before[kept]


@pytest.mark.parametrize(
    "setting, message",
    [
        ("training.seed=2", "precomputed features are from encoder"),
        ("model.encoder.num_attention_heads=2", "precomputed features are from encoder"),
        ("training.train_encoder=true", "training.train_encoder: true"),
        ("training.precision=fp32", "training.precision: torch.float32; the precomputed features of"),
        ("model.image_queries=16", "model.image_queries: 16; the precomputed features of"),
    ],
)
def test_features_of_another_run(embedded: Path, tmp_path: Path, setting: str, message: str) -> None:
    done = emu2("train", embedded, f"logging.directory={tmp_path}", setting)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stderr.splitlines() if not line.startswith("skipped sample")]
    assert len(errors) == 1 and message in errors[0] and "Traceback" not in done.stderr


def test_output_of_another_encoder_or_the_input(shards: Path, embedded: Path) -> None:
    for setting in ("training.seed=2", "model.image_queries=16"):
        other = emu2("embed", shards, "--output", str(embedded), setting)
        assert other.returncode == 1 and "choose another folder" in other.stderr
    same = emu2("embed", shards, "--output", str(shards))
    assert same.returncode == 2 and "is where data.shards come from" in same.stderr


def test_damaged_features_are_skipped(embedded: Path, tmp_path: Path) -> None:
    index = ShardIndex([f"{embedded}/a/*.tar"])
    samples = [index.read(i) for i in range(len(index))]
    broken = next(sample for sample in samples if sample.files)
    broken.files = {name: data[:40] for name, data in broken.files.items()}
    write_shard(tmp_path / "x.tar", samples)
    done = emu2("train", tmp_path, f"logging.directory={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert f"features cannot be read: {broken.key}" in done.stderr


def config_of(*shards: str, **training: bool) -> Config:
    config = load("tiny_interleaved", [f"data.shards=[{','.join(shards)}]"])
    return replace(config, training=replace(config.training, **training))


def test_a_disk_that_fails_loses_nothing(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What may be read another time ends the run; what can never be read is replaced."""
    real = ShardIndex.read

    def read(self: ShardIndex, i: int) -> RawSample:
        if i == 1:
            raise DataError("shard cannot be read: [Errno 5] Input/output error")
        return real(self, i)

    monkeypatch.setattr(ShardIndex, "read", read)
    with pytest.raises(DataError, match="Input/output error"):
        embed(config_of(f"{shards}/b/*.tar"), tmp_path)
    assert not list(tmp_path.rglob("*.tar"))


def test_an_empty_shard_and_a_field_of_ones_own(shards: Path, tmp_path: Path) -> None:
    photo = PHOTOS[0].read_bytes()
    meta = {"kind": "caption", "text": "A dog.", "image": "0.jpg", "encoder": "my camera"}
    (tmp_path / "in").mkdir()
    write_shard(tmp_path / "in" / "a.tar", [RawSample("dog", meta, {"0.jpg": photo})])
    write_shard(tmp_path / "in" / "b.tar", [])
    config = config_of(f"{tmp_path}/in/*.tar")
    assert embed(config, tmp_path / "out")["pictures"] == 1
    assert embed(config, tmp_path / "out")["shards that were there"] == 2
    sample = ShardIndex([f"{tmp_path}/out/*.tar"]).read(0)
    assert sample.meta["encoder"] == "my camera" and sample.meta[ENCODER] != "my camera"


def test_what_could_not_be_trained_on_is_refused(shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="training.train_encoder: true"):
        embed(config_of(f"{shards}/**/*.tar", train_encoder=True), tmp_path)
    # Training sorts paths as they are given: ../b before a. Below the output a comes first.
    monkeypatch.chdir(shards / "a")
    with pytest.raises(ConfigError, match="in another order"):
        embed(config_of("../b/x.tar", f"{shards}/a/x.tar"), tmp_path)
    with pytest.raises(ConfigError, match="in another order, or one twice"):
        embed(config_of("x.tar", f"{shards}/a/x.tar"), tmp_path)
