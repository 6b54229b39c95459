"""The planted faults are faults, as Pillow, PyAV and tarfile see them; the data system refuses each for its reason."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import av
import bad_samples as bad
import pytest
from bad_inputs import bad_shards, good_samples, write_shards
from bad_samples import BadSample, bad_samples
from PIL import Image

from emu2_megatron.config.schema import Config
from emu2_megatron.data.shards import ShardIndex
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import DataError

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
