"""The planted faults are faults, as Pillow, PyAV and tarfile see them; the data system refuses each for its reason."""

import io
import json
import math
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import bad_samples as bad
import media
import pytest
from bad_inputs import bad_shards, good_samples, write_shards
from bad_samples import BadSample, bad_samples
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu2_megatron.config.loading import load
from emu2_megatron.config.schema import Config
from emu2_megatron.data.formats import FORMATS
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.samples import build_sample
from emu2_megatron.data.shards import RawSample, ShardIndex
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import DataError

ROOT = Path(__file__).parents[2]
_PNG = media.picture("PNG")
_FIELDS = st.sampled_from(
    "text image video content phrase boxes box width height turns user assistant system target".split()
)

ALL = {sample.key: sample for chat in (False, True) for sample in bad_samples(chat)}
GOOD = {raw.meta["kind"]: raw for raw in good_samples(8)}


def _with(*reasons: str) -> list[BadSample]:
    return [sample for sample in ALL.values() if set(reasons) & set(sample.reasons)]


def _ids(sample: BadSample) -> str:
    return sample.key


def test_there_are_enough_of_them() -> None:
    for chat in (False, True):
        samples = bad_samples(chat)
        assert len({sample.key for sample in samples}) == len(samples) > 40
        assert all(sample.reasons for sample in samples)


@pytest.mark.parametrize("sample", _with(bad.PICTURE, bad.LARGE), ids=_ids)
def test_pillow_refuses_the_damaged_pictures(sample: BadSample, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 2**25)  # Pillow's error comes at twice this, as ours does
    (data,) = [data for name, data in sample.members.items() if name != "json"]
    with pytest.raises((OSError, Image.DecompressionBombError)):
        Image.open(io.BytesIO(data)).convert("RGB")


@pytest.mark.parametrize("sample", _with(bad.ASPECT), ids=_ids)
def test_narrow_pictures_have_no_other_fault(sample: BadSample) -> None:
    (data,) = [data for name, data in sample.members.items() if name != "json"]
    width, height = Image.open(io.BytesIO(data)).convert("RGB").size
    assert max(width / height, height / width) >= 10_000


@pytest.mark.parametrize("sample", _with(bad.VIDEO), ids=_ids)
def test_pyav_cannot_show_all_24_frames_of_the_damaged_videos(sample: BadSample) -> None:
    (data,) = [data for name, data in sample.members.items() if name != "json"]
    if bad.EXTENSION in sample.reasons and sample.key.endswith(("_named_mp4", "_named_webm")):
        assert data[4:8] != b"ftyp" and data[:4] != b"\x1a\x45\xdf\xa3"
        return
    try:
        with av.open(io.BytesIO(data)) as container:
            streams = container.streams.video
            decodable = bool(streams) and streams[0].codec_context is not None
            frames = len(list(container.decode(streams[0]))) if decodable else 0
    except (av.error.FFmpegError, EOFError, OSError):
        return
    assert frames < 24


@pytest.mark.parametrize("sample", _with(bad.JSON), ids=_ids)
def test_python_cannot_read_the_broken_json(sample: BadSample) -> None:
    assert sample.raw is None


def test_good_samples_are_sound() -> None:
    for raw in good_samples(8):
        for name, data in raw.files.items():
            if name.endswith(("mp4", "webm")):
                with av.open(io.BytesIO(data)) as container:
                    assert len(list(container.decode(video=0))) == 9
            else:
                assert Image.open(io.BytesIO(data)).convert("RGB").size == (40, 30)
    assert set(GOOD) == {"caption", "interleaved", "grounded", "text", "generation"}


@pytest.mark.parametrize("fault", bad_shards())
def test_bad_shards_are_refused(fault: str, tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    path.write_bytes(bad_shards()[fault])
    with pytest.raises(DataError, match="shard.tar"):
        ShardIndex([str(path)])


def _reason(sample: BadSample, folder: Path, tokenizer: Tokenizer, config: Config) -> str | None:
    """Why the data system skips a sample that is alone in a shard, None if it does not."""
    from emu2_megatron.data.decode import decode
    from emu2_megatron.data.samples import build_sample, reason_of
    from emu2_megatron.data.sequence import Features

    write_shards(folder, [sample], [], count=1)
    try:
        built = build_sample(ShardIndex([str(folder / "*.tar")]).read(0), tokenizer, config, 0, 0)
        encoded = [visual for visual in built.visuals if not isinstance(visual, Features)]
        for result in decode(encoded, config.model.encoder.image_size):
            if isinstance(result, DataError):
                raise result
    except DataError as error:
        return reason_of(error)
    return None


@pytest.mark.parametrize("chat", [False, True], ids=["base", "chat"])
def test_every_bad_sample_is_refused_for_its_reason(
    chat: bool, tmp_path: Path, example_data: Path, make_config: Callable[..., Config]
) -> None:
    tokenizer = Tokenizer(example_data / "tokenizer.model", chat)
    config = make_config(sequence_length=128)
    found = {sample.key: _reason(sample, tmp_path, tokenizer, config) for sample in bad_samples(chat)}
    wanted = {sample.key: sample.reasons for sample in bad_samples(chat)}
    assert {key: (found[key], wanted[key]) for key in found if found[key] not in wanted[key]} == {}


def test_every_good_sample_is_used(tmp_path: Path, tokenizer: Tokenizer, make_config: Callable[..., Config]) -> None:
    for raw in good_samples(8):
        members = {"json": json.dumps(raw.meta).encode(), **raw.files}
        assert _reason(BadSample(raw.key, members, ()), tmp_path, tokenizer, make_config(sequence_length=128)) is None


@pytest.mark.slow
def test_training_on_a_folder_of_bad_and_good(tmp_path: Path, example_data: Path) -> None:
    """Exactly the bad ones are quarantined, each for its reason; the good ones all arrive; losses are finite."""
    bad_ones, good_ones = bad_samples(), good_samples(60)
    write_shards(tmp_path, bad_ones, good_ones)
    arguments = [
        "train", "--config", "tiny_interleaved", f"data.shards=[{tmp_path}/*.tar]", f"logging.directory={tmp_path}/run",
        "data.max_bad_share=1", "training.steps=6", "training.global_batch_size=8", "training.micro_batch_size=4",
        "parallel.tensor_parallel_size=1", "parallel.pipeline_parallel_size=1", "parallel.data_parallel_size=1",
        "logging.every=1",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "emu2_megatron.cli", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert all(math.isfinite(record["text_loss"] + record["image_loss"]) for record in records)

    reasons = {sample.key: sample.reasons for sample in bad_ones}
    found = _listed(tmp_path / "run" / "quarantine" / "rank_00000.jsonl")
    assert {key: reason for key, reason in found.items() if reason not in reasons.get(key, ())} == {}

    # Six steps do not meet all of them: a loader does, in more than an epoch.
    config = load("tiny_interleaved", arguments[3:])
    seen: set[str] = set()
    everything = tmp_path / "everything.jsonl"
    with Loader(config, Tokenizer(example_data / "tokenizer.model"), range(8), quarantine=everything) as loader:
        for _ in range(40):
            seen.update(key for row in next(loader) for key in row.keys)
    assert seen == {raw.key for raw in good_ones}
    found = _listed(everything)
    assert found.keys() == reasons.keys()
    assert {key: reason for key, reason in found.items() if reason not in reasons[key]} == {}


def _listed(quarantine: Path) -> dict[str, str]:
    """Reason by key; each sample once."""
    entries = [json.loads(line) for line in quarantine.read_text().splitlines()]
    found = {entry["key"] if not entry["key"].startswith("(") else _key_at(entry): entry["reason"] for entry in entries}
    assert len(found) == len(entries)
    return found


def _key_at(entry: dict[str, Any]) -> str:
    """The key of a sample whose JSON could not be read, by the place that the quarantine names."""
    with tarfile.open(entry["shard"]) as tar:
        (name,) = [member.name for member in tar if member.offset == entry["byte"]]
    return name.partition(".")[0]


_json = st.recursive(
    st.none() | st.booleans() | st.integers(-5, 2000) | st.floats() | st.text(max_size=6) | st.just("0.png"),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_FIELDS, inner, max_size=5),
    max_leaves=12,
)


@settings(max_examples=500, deadline=None)
@given(kind=st.sampled_from(list(FORMATS)), fields=st.dictionaries(_FIELDS, _json, max_size=6), data=st.binary())
def test_any_json_is_a_sample_or_a_data_error(
    tokenizer: Tokenizer, make_config: Callable[..., Config], kind: str, fields: dict[str, Any], data: bytes
) -> None:
    raw = RawSample("k", {**fields, "kind": kind}, {"0.png": data or _PNG, "1.mp4": data})
    try:
        sample = build_sample(raw, tokenizer, make_config(), 0, 0)
    except DataError:
        return  # as it should be; anything else fails the test
    assert 1 < len(sample.tokens_S) <= 64
