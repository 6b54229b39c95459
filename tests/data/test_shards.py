"""Tar shards: what is written is read back, and every kind of broken shard is refused by name."""

import gzip
import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from emu2_megatron.data.shards import RawSample, ShardIndex, write_shard
from emu2_megatron.errors import DataError


def _sample(key: str, pictures: int = 1) -> RawSample:
    meta = {"kind": "caption", "text": f"Ein Bär, 熊: {key}"}
    return RawSample(key, meta, {f"{i}.jpg": b"x" * (i + 1) for i in range(pictures)})


def _tar(path: Path, members: list[tuple[str, bytes]]) -> str:
    with tarfile.open(path, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return str(path)


def test_samples_come_back_in_any_order_of_access(tmp_path: Path) -> None:
    first = [_sample("b"), _sample("a", 3)]
    second = [_sample("folder/c", 0), _sample("a-long-key-" * 20, 2)]  # longer than a plain tar header can name
    assert write_shard(tmp_path / "1.tar", second) == 2
    assert write_shard(tmp_path / "0.tar", first) == 2
    index = ShardIndex([f"{tmp_path}/*.tar"])
    assert len(index) == 4
    for i, expected in reversed(list(enumerate(first + second))):
        assert index.read(i) == expected
    assert index.locate(0) == (f"{tmp_path}/0.tar", 0)
    assert index.locate(2)[0] == f"{tmp_path}/1.tar"


def test_member_names_are_those_of_webdataset(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [_sample("k", 2)])
    with tarfile.open(tmp_path / "s.tar") as tar:
        assert tar.getnames() == ["k.json", "k.0.jpg", "k.1.jpg"]


def test_equal_samples_give_equal_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_shard(tmp_path / "a.tar", [_sample("k"), _sample("l", 0)])
    monkeypatch.setattr("time.time", lambda: 2e9)
    monkeypatch.setattr("os.getuid", lambda: 77)
    write_shard(tmp_path / "b.tar", [_sample("k"), _sample("l", 0)])
    assert (tmp_path / "a.tar").read_bytes() == (tmp_path / "b.tar").read_bytes()


def test_failed_write_leaves_nothing_and_keeps_the_old_shard(tmp_path: Path) -> None:
    def broken() -> Iterator[RawSample]:
        yield _sample("a")
        raise RuntimeError("source failed")

    path = tmp_path / "s.tar"
    with pytest.raises(RuntimeError, match="source failed"):
        write_shard(path, broken())
    assert os.listdir(tmp_path) == []
    write_shard(path, [_sample("old")])
    with pytest.raises(RuntimeError, match="source failed"):
        write_shard(path, broken())
    assert os.listdir(tmp_path) == ["s.tar"]
    assert ShardIndex([str(path)]).read(0).key == "old"


@pytest.mark.parametrize(
    "sample",
    [
        RawSample("a.b", {}), RawSample("", {}), RawSample("/a", {}), RawSample("../a", {}),
        RawSample("a", {}, {"0.exe": b""}), RawSample("a", {}, {"plain": b""}), RawSample("a", {}, {"0/1.jpg": b""}),
    ],
)  # fmt: skip
def test_writer_refuses_what_the_reader_would(tmp_path: Path, sample: RawSample) -> None:
    with pytest.raises(DataError, match="s.tar"):
        write_shard(tmp_path / "s.tar", [sample])
    assert os.listdir(tmp_path) == []


def test_writer_refuses_a_key_used_twice(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="two samples have the key a"):
        write_shard(tmp_path / "s.tar", [_sample("a"), _sample("b"), _sample("a")])


def test_foreign_tars_with_folders_and_dot_slash_are_read(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.GNU_FORMAT) as tar:
        folder = tarfile.TarInfo("./")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
        for name, data in (("./x/a.0.JPG", b"j"), ("./x/a.json", b'{"kind": 1}')):
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(data), 1234567
            tar.addfile(info, io.BytesIO(data))
    assert ShardIndex([str(tmp_path / "s.tar")]).read(0) == RawSample("x/a", {"kind": 1}, {"0.JPG": b"j"})


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("/etc/a.json", b"{}")], "/etc/a.json points outside"),
        ([("../a.json", b"{}")], "../a.json points outside"),
        ([("x/../../a.json", b"{}")], "points outside"),
        ([("a.json", b"{}"), ("a.0.exe", b"")], "a.0.exe is neither"),
        ([("README", b"")], "README is neither"),
        ([(".hidden.jpg", b"")], "hidden.jpg is neither"),
        ([("a.json", b"{}"), ("a.json", b"{}")], "a.json appears twice"),
        ([("a.json", b"{}"), ("b.json", b"{}"), ("a.0.jpg", b"")], "sample a do not lie side by side"),
    ],
)
def test_shards_against_the_rules_are_refused_by_name(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = _tar(tmp_path / "bad.tar", members)
    with pytest.raises(DataError) as caught:
        ShardIndex([path])
    assert message in str(caught.value) and path in str(caught.value)


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE])
def test_links_and_devices_are_refused(tmp_path: Path, kind: bytes) -> None:
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        info = tarfile.TarInfo("a.0.jpg")
        info.type, info.linkname = kind, "/etc/passwd"
        tar.addfile(info)
    with pytest.raises(DataError, match="a.0.jpg is not a plain file"):
        ShardIndex([str(tmp_path / "s.tar")])


def test_sparse_files_are_refused(tmp_path: Path) -> None:
    """Their data in the tar is not the file's."""
    with tarfile.open(tmp_path / "s.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        info = tarfile.TarInfo("a.0.jpg")
        info.pax_headers = {"GNU.sparse.map": "0,0", "GNU.sparse.size": "4096"}
        tar.addfile(info)
    with pytest.raises(DataError, match="a.0.jpg is not a plain file"):
        ShardIndex([str(tmp_path / "s.tar")])


def test_a_shard_cut_anywhere_is_refused(tmp_path: Path) -> None:
    """Also between two members, where tarfile itself sees a normal end."""
    write_shard(tmp_path / "s.tar", [_sample("a", 2), _sample("b")])
    with tarfile.open(tmp_path / "s.tar") as tar:
        members = tar.getmembers()
    end = members[-1].offset_data + 512  # one block of data each
    whole = (tmp_path / "s.tar").read_bytes()
    for length in [0, 1, 511, *range(512, end + 1, 512), end + 511]:
        (tmp_path / "s.tar").write_bytes(whole[:length])
        with pytest.raises(DataError, match="s.tar"):
            ShardIndex([str(tmp_path / "s.tar")])
    (tmp_path / "s.tar").write_bytes(whole[: end + 512])
    assert len(ShardIndex([str(tmp_path / "s.tar")])) == 2


def test_a_damaged_header_is_refused_not_taken_for_the_end(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [_sample("a"), _sample("b")])
    data = bytearray((tmp_path / "s.tar").read_bytes())
    with tarfile.open(tmp_path / "s.tar") as tar:
        data[tar.getmember("b.json").offset + 3] ^= 0xFF
    (tmp_path / "s.tar").write_bytes(data)
    with pytest.raises(DataError, match="s.tar: cut off or damaged after byte 2048"):
        ShardIndex([str(tmp_path / "s.tar")])


def test_compressed_shards_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [_sample("a")])
    (tmp_path / "z.tar").write_bytes(gzip.compress((tmp_path / "s.tar").read_bytes()))
    with pytest.raises(DataError, match="z.tar: not a readable uncompressed tar"):
        ShardIndex([str(tmp_path / "z.tar")])


def test_patterns(tmp_path: Path) -> None:
    for name in ("b", "a", "[x]"):
        write_shard(tmp_path / f"{name}.tar", [_sample(name)])
    # The literal path is taken although it reads as a glob; a shard matched twice counts once.
    index = ShardIndex([f"{tmp_path}/[x].tar", f"{tmp_path}/b.tar", f"{tmp_path}/?.tar", f"{tmp_path}/./a.tar"])
    assert [index.read(i).key for i in range(len(index))] == ["[x]", "a", "b"]
    with pytest.raises(DataError, match=r"no file matches .*none\*.tar.*make_shards"):
        ShardIndex([f"{tmp_path}/a.tar", f"{tmp_path}/none*.tar"])
    with pytest.raises(DataError, match="data.shards, which is empty.*make_shards"):
        ShardIndex([])
    write_shard(tmp_path / "empty.tar", [])
    with pytest.raises(DataError, match="no samples in .*empty.tar"):
        ShardIndex([f"{tmp_path}/empty.tar"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"{", "JSON is broken: k.json"), (b"\xff\xfe", "JSON is broken"), (b"[1]", "k.json is not an object"),
        (b"[" * 200_000, "JSON is broken"), (None, "has no JSON: k has only 0.jpg"),
    ],
)  # fmt: skip
def test_bad_content_is_an_error_of_the_sample_only(tmp_path: Path, text: bytes | None, message: str) -> None:
    json_member = [("k.json", text)] if text is not None else []
    path = _tar(tmp_path / "s.tar", [("k.0.jpg", b"1"), *json_member, ("ok.json", b"{}")])
    index = ShardIndex([path])
    with pytest.raises(DataError, match=message):
        index.read(0)
    assert index.read(1) == RawSample("ok", {})


def test_a_shard_changed_or_lost_after_indexing(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_shard(path, [_sample("a"), _sample("b")])
    index = ShardIndex([str(path)])
    whole = path.read_bytes()
    _, start = index.locate(1)
    cut = [whole[: start + length] for length in (0, 700, 1024)]  # 1024: right after a member
    for damaged in (*cut, whole[:start] + bytes(5000), whole[512:], b""):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            index.read(1)
    path.unlink()
    with pytest.raises(DataError, match="cannot be read"):
        index.read(0)
