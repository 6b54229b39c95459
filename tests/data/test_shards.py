"""Tar shards: what is written is read back, and every kind of broken shard is refused by name."""

import errno
import gzip
import io
import os
import tarfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.data import shards
from emu2_megatron.data.index_file import index_path
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
    assert sorted(os.listdir(tmp_path)) == ["s.tar", "s.tar.index.npy"]
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
        ([("a.json", b"{}"), ("a.0.exe", b"")], "a.0.exe is neither KEY.json nor a picture or video KEY.NAME (.json, "),
        ([("a.json", b"{}"), ("a.0.pkl", b"")], "a.0.pkl is neither"),
        ([("a.json", b"{}"), ("a.jpg.pt", b"")], "a.jpg.pt is neither"),
        ([("a.pyd", b"")], "a.pyd is neither"),
        ([("a.json", b"{}"), ("a.0.bin", b"")], "a.0.bin is neither"),
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
    write_shard(tmp_path / "s.tar", [_sample("a", 2), _sample("b")])  # its index is of another size, and not used
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
    with pytest.raises(DataError, match="shard cannot be read"):  # with its index, when it is read
        ShardIndex([str(tmp_path / "s.tar")]).read(1)
    index_path(tmp_path / "s.tar").unlink()
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
    with pytest.raises(DataError, match=r"no file matches .*none\*.tar.*emu2 shards"):
        ShardIndex([f"{tmp_path}/a.tar", f"{tmp_path}/none*.tar"])
    with pytest.raises(DataError, match="data.shards, which is empty.*emu2 shards"):
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
    assert index.locate(0) == (str(path), 0)  # remembered


def test_a_shard_lost_before_its_index_is_looked_at_has_a_name_still(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [_sample("a")])
    index = ShardIndex([f"{tmp_path}/s.tar"])
    (tmp_path / "s.tar").unlink()
    assert index.locate(0) == (f"{tmp_path}/s.tar", -1)
    with pytest.raises(DataError, match="shard cannot be read: .*s.tar"):
        index.read(0)


@pytest.mark.parametrize("indexed", [True, False])
def test_a_file_system_that_fails_for_a_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, indexed: bool) -> None:
    """Two refusals are waited for; a shard that stays away is waited for once, and read again when it is back."""
    path = tmp_path / "s.tar"
    write_shard(path, [_sample("a"), _sample("b")])
    index = ShardIndex([str(path)]) if indexed else _unindexed(path)
    refusals, waited = 2, list[float]()

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        nonlocal refusals
        refusals -= 1
        if refusals >= 0:
            raise OSError(errno.ESTALE, "Stale file handle")
        return original(descriptor, length, offset)

    index.locate(0)  # where samples are is known
    original = os.pread
    monkeypatch.setattr(os, "pread", pread)
    monkeypatch.setattr(time, "sleep", waited.append)
    assert index.read(1).key == "b" and waited == [0.1, 1.0]
    waited.clear()
    refusals = 4
    for waits in ([0.1, 1.0], []):
        with pytest.raises(DataError, match="shard cannot be read: .*Stale file handle"):
            index.read(1)
        assert waited == waits
        waited.clear()
    assert index.read(0).key == "a" and index.read(1).key == "b" and not waited


def _unindexed(path: Path) -> ShardIndex:
    index_path(path).unlink()
    return ShardIndex([str(path)])


def test_every_picture_and_video_extension_is_stored(tmp_path: Path) -> None:
    names = ["a.jpg", "a.jpeg", "a.png", "a.webp", "a.gif", "a.mp4", "a.webm", "a.mkv", "a.mov", "a.avi"]
    sample = RawSample("k", {}, {name: name.encode() for name in [*names, "0.jpg.safetensors"]})
    write_shard(tmp_path / "s.tar", [sample])
    assert ShardIndex([str(tmp_path / "s.tar")]).read(0) == sample


def test_index_file_says_what_tarfile_finds(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    samples = [_sample("b"), _sample("a-long-key-" * 20, 3), _sample("c", 0)]
    write_shard(path, samples)
    with tarfile.open(path) as tar:
        offsets = [member.offset for member in tar.getmembers() if member.name.endswith(".json")]
        last = tar.getmembers()[-1]
    stops = [*offsets[1:], last.offset_data + 512]
    table = np.load(tmp_path / "s.tar.index.npy", allow_pickle=False)
    assert table.dtype == np.int64
    assert table.tolist() == [[path.stat().st_size, 1], *map(list, zip(offsets, stops, strict=True))]


def test_index_file_is_used_and_not_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "s.tar"
    samples = [_sample("a", 2), _sample("b")]
    write_shard(path, samples)

    def scanned(path: str) -> np.ndarray:
        raise AssertionError(f"{path} was scanned")

    with monkeypatch.context() as patch:
        patch.setattr(shards, "scan", scanned)
        index = ShardIndex([str(path)])
        assert [index.read(i) for i in range(len(index))] == samples
    index = _unindexed(path)
    assert [index.read(i) for i in range(len(index))] == samples


def test_writing_a_shard_again_replaces_its_index(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    for samples in ([_sample("a"), _sample("b", 4)], [_sample("a", 4), _sample("b")]):  # of the same size
        write_shard(path, samples)
        index = ShardIndex([str(path)])
        assert [index.read(i) for i in range(len(index))] == samples


def test_a_shard_never_has_the_index_of_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also when writing it again is cut short between the two files."""
    path = tmp_path / "s.tar"
    write_shard(path, [_sample("a"), _sample("b", 4)])
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if str(target).endswith(".npy"):
            raise OSError("cut short")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    again = [_sample("a", 4), _sample("b")]  # of the same size
    with pytest.raises(OSError, match="cut short"):
        write_shard(path, again)
    assert os.listdir(tmp_path) == ["s.tar"]
    index = ShardIndex([str(path)])
    assert [index.read(i) for i in range(len(index))] == again


def test_an_empty_shard_has_an_index(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [])
    assert np.load(tmp_path / "s.tar.index.npy").tolist() == [[10240, 1]]
    assert len(ShardIndex([str(tmp_path / "s.tar")], may_be_empty=True)) == 0


def test_samples_beyond_the_last_are_refused(tmp_path: Path) -> None:
    write_shard(tmp_path / "s.tar", [_sample("a")])
    index = ShardIndex([str(tmp_path / "s.tar")])
    for i in (-1, 1):
        with pytest.raises(IndexError):
            index.read(i)


def test_memory_does_not_grow_with_the_samples(tmp_path: Path) -> None:
    """All that an index holds, counted in bytes of its arrays."""
    sizes = []
    for number in (1, 500):
        path = tmp_path / f"{number}.tar"
        write_shard(path, (_sample(f"k{i}", 0) for i in range(number)))
        index = ShardIndex([str(path)])
        assert len(index) == number
        sizes.append(index._firsts.nbytes + index._versions.nbytes + sum(a.nbytes for a in index._scanned.values()))
    assert sizes[0] == sizes[1]


def test_more_shards_than_are_remembered_and_many_threads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "_spans", shards.lru_cache(maxsize=3)(shards._spans.__wrapped__))
    samples = [_sample(f"{i:03d}", i % 3) for i in range(60)]
    for start in range(0, 60, 4):
        write_shard(tmp_path / f"{start:02d}.tar", samples[start : start + 4])
    index = ShardIndex([f"{tmp_path}/*.tar"])
    order = np.random.default_rng(0).integers(60, size=600).tolist()
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(index.read, order)) == [samples[i] for i in order]
    assert shards._spans.cache_info().currsize == 3


@pytest.mark.parametrize(
    "tamper",
    [
        lambda table: table[:-1],  # the last sample left out
        lambda table: np.delete(table, 1, axis=0),  # the first
        lambda table: np.delete(table, 2, axis=0),  # one between
        lambda table: table[[0, 2, 1, 3]],  # another order
        lambda table: np.vstack([table[0], [table[1, 0], table[2, 1]], table[3:]]),  # two taken for one
        lambda table: np.vstack([table[:3], [[table[3, 0], table[3, 0] + 1024], [table[3, 0] + 1024, table[3, 1]]]]),
        lambda table: table + [[0, 0], [0, 0], [512, 512], [512, 0]],  # shifted by a block
        lambda table: np.vstack([table, [table[3, 1], table[3, 1] + 512]]),  # one more
        lambda table: table * [[1, 1], [1, -1], [1, 1], [1, 1]],
        lambda table: table + [[0, 0], [0, 0], [0, 0], [0, 1 << 62]],
    ],
)
def test_a_wrong_index_never_gives_a_wrong_sample(tmp_path: Path, tamper) -> None:  # type: ignore[no-untyped-def]
    """Its first row fits: it is either found out and the tar scanned, or reading some sample is an error. What is read
    is a sample of the shard; cut in two, its JSON names a picture that is not there, which `build_sample` refuses."""
    path = tmp_path / "s.tar"
    samples = [_sample("a"), _sample("b", 2), _sample("c", 1)]
    write_shard(path, samples)
    table = tamper(np.load(index_path(path)))
    np.save(index_path(path), table)
    index = ShardIndex([str(path)])
    read: list[RawSample | None] = []
    for i in range(len(index)):
        try:
            read.append(index.read(i))
        except DataError as error:
            assert "shard cannot be read" in str(error) or "sample has no JSON" in str(error)
            read.append(None)
    assert None in read or read == samples
    assert all(sample in [*samples, None, RawSample("c", samples[2].meta)] for sample in read)


@pytest.mark.parametrize(
    "content",
    [
        b"", b"junk", b"PK\x03\x04 not an archive", b"\x80\x04]\x94.", b"\x93NUMPY\x01\x00",
        b"\x93NUMPY\x01\x00v\x00{'descr': '|O', 'fortran_order': False, 'shape': (1, 2), }" + b" " * 57 + b"\n",
        b"\x93NUMPY\x01\x00v\x00{'descr': '<i8', 'fortran_order': False, 'shape': (%d, 2), }" % 10**30,
    ],
)  # fmt: skip
def test_an_unreadable_index_is_not_used(tmp_path: Path, content: bytes) -> None:
    write_shard(tmp_path / "s.tar", [_sample("a"), _sample("b")])
    index_path(tmp_path / "s.tar").write_bytes(content)
    index = ShardIndex([str(tmp_path / "s.tar")])
    assert [index.read(i) for i in range(len(index))] == [_sample("a"), _sample("b")]


def test_an_index_of_other_size_version_or_type_is_not_used(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_shard(path, [_sample("a"), _sample("b")])
    table = np.load(index_path(path))
    wrong = [table[:0], table[0], table[:, :1], table.astype(np.float64), table[:2] + [[512, 0], [0, 0]]]
    for other in (*wrong, table[:2] + [[0, 1], [0, 0]]):
        np.save(index_path(path), other)
        assert len(ShardIndex([str(path)])) == 2


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("../a.json", b"{}")], "points outside"), ([("a.json", b"{}"), ("a.0.pkl", b"")], "a.0.pkl is neither"),
        ([("a.json", b"{}"), ("a.json", b"{}")], "has changed"), ([("a.json", b"{}"), ("b.0.jpg", b"")], "has changed"),
    ],
)  # fmt: skip
def test_an_index_cannot_smuggle_in_what_a_scan_refuses(
    tmp_path: Path, members: list[tuple[str, bytes]], message: str
) -> None:
    path = Path(_tar(tmp_path / "s.tar", members))
    with tarfile.open(path) as tar:
        end = max(member.offset_data + -(-member.size // 512) * 512 for member in tar)
    np.save(index_path(path), np.array([[path.stat().st_size, 1], [0, end]]))
    with pytest.raises(DataError, match=f"shard cannot be read: .*{message}"):
        ShardIndex([str(path)]).read(0)


def test_an_index_cannot_smuggle_in_a_link(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    write_shard(path, [_sample("a")])
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        link = tar.getmember("a.0.jpg")
    link.type, link.linkname, size = tarfile.SYMTYPE, "/etc/passwd", link.size
    link.size = size
    data[link.offset : link.offset + 512] = link.tobuf(tarfile.PAX_FORMAT)
    path.write_bytes(data)
    with pytest.raises(DataError, match="a.0.jpg is not a plain file"):
        ShardIndex([str(path)]).read(0)


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20479), st.integers(0, 255)), max_size=20), st.booleans(), st.data())
def test_a_shard_damaged_at_random_gives_only_data_errors(
    tmp_path_factory: pytest.TempPathFactory, changes: list[tuple[int, int]], indexed: bool, data: st.DataObject
) -> None:
    path = tmp_path_factory.mktemp("fuzz") / "s.tar"
    write_shard(path, [_sample("a" * 120, 2), _sample("b", 3), _sample("c" * 300)])
    target = data.draw(st.sampled_from([path, index_path(path)]))
    if not indexed:
        index_path(path).unlink()
        target = path
    content = bytearray(target.read_bytes())
    for position, value in changes:
        content[position % len(content)] = value
    target.write_bytes(content)
    try:
        index = ShardIndex([str(path)])
    except DataError:
        return
    for i in range(len(index)):
        try:
            index.read(i)
        except DataError:
            pass
