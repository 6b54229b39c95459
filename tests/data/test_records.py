"""Records of every source, compared with samples written by hand, and every kind of bad record."""

import io
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from emu2_megatron.data import conventions
from emu2_megatron.data.media import sniff
from emu2_megatron.data.records import Rejected, find_blocks, find_files, read_block
from emu2_megatron.data.shards import RawSample
from emu2_megatron.errors import DataError

MakePng = Callable[..., bytes]


def read(source: Path, records: int = 1000) -> list[RawSample | Rejected]:
    return [r for file in find_files(source) for block in find_blocks(file, records)[0] for r in read_block(block)]


def jsonl(path: Path, records: list[Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A folder with files; what is in them does not matter."""
    for name in ("a.jpg", "b.PNG", "sub/c.gif", "v.mp4", "w.mkv", "notes.txt"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(f"content of {name}".encode())
    return tmp_path / "in"


def of(name: str) -> bytes:
    return f"content of {name}".encode()


KINDS: list[tuple[dict[str, Any], dict[str, Any], dict[str, bytes]]] = [
    (
        {"kind": "caption", "text": "Ein Bär, 熊.", "image": "a.jpg", "licence": "CC0", "note": "left out"},
        {"kind": "caption", "text": "Ein Bär, 熊.", "image": "0.jpg", "licence": "CC0"},
        {"0.jpg": of("a.jpg")},
    ),
    (
        {"kind": "caption", "text": "x", "video": "v.mp4", "image": None},
        {"kind": "caption", "text": "x", "video": "0.mp4"},
        {"0.mp4": of("v.mp4")},
    ),
    (
        {"kind": "interleaved", "content": [{"text": "1"}, {"image": "b.PNG"}, {"video": "w.mkv"}, {"image": "a.jpg"}]},
        {"kind": "interleaved", "content": [{"text": "1"}, {"image": "0.png"}, {"video": "1.mkv"}, {"image": "2.jpg"}]},
        {"0.png": of("b.PNG"), "1.mkv": of("w.mkv"), "2.jpg": of("a.jpg")},
    ),
    (
        {
            "kind": "grounded", "image": "sub/c.gif", "width": 20, "height": 10,
            "content": [{"text": "A photo of"}, {"phrase": "a man", "boxes": [[0, 1, 2, 3], [4, 5, 6, 7]]}],
        },
        {
            "kind": "grounded", "image": "0.gif", "width": 20, "height": 10,
            "content": [{"text": "A photo of"}, {"phrase": "a man", "boxes": [[0, 1, 2, 3], [4, 5, 6, 7]]}],
        },
        {"0.gif": of("sub/c.gif")},
    ),
    ({"kind": "text", "text": " two\u2028lines "}, {"kind": "text", "text": " two\u2028lines "}, {}),
    (
        {
            "kind": "chat", "system": "Be kind.",
            "turns": [{"user": [{"image": "a.jpg"}, {"text": "What?"}], "assistant": "A."}],
        },
        {
            "kind": "chat", "system": "Be kind.",
            "turns": [{"user": [{"image": "0.jpg"}, {"text": "What?"}], "assistant": "A."}],
        },
        {"0.jpg": of("a.jpg")},
    ),
    (
        {
            "target": "b.PNG", "kind": "generation", "width": 5, "height": 6,
            "content": [{"text": "a"}, {"phrase": "dog", "box": [0, 1, 2, 3], "image": "a.jpg"}],
        },
        {
            "kind": "generation", "width": 5, "height": 6, "target": "1.png",
            "content": [{"text": "a"}, {"phrase": "dog", "box": [0, 1, 2, 3], "image": "0.jpg"}],
        },
        {"0.jpg": of("a.jpg"), "1.png": of("b.PNG")},
    ),
]  # fmt: skip


def expected(stem: str) -> list[RawSample]:
    return [RawSample(f"{stem}-{line:06d}", meta, files) for line, (_, meta, files) in enumerate(KINDS, start=1)]


def test_jsonl_of_every_kind(media: Path) -> None:
    path = jsonl(media / "all.v2.jsonl", [record for record, _, _ in KINDS])
    assert read(path) == expected("all_v2")
    assert read(media) == expected("all_v2")  # found in its folder; notes.txt is none of ours


def test_jsonl_paths_are_relative_to_the_file(media: Path) -> None:
    jsonl(media / "sub" / "x.jsonl", [{"kind": "caption", "text": "c", "image": "c.gif"}])
    assert read(media) == [
        RawSample("sub/x-000001", {"kind": "caption", "text": "c", "image": "0.gif"}, {"0.gif": of("sub/c.gif")})
    ]


def test_blocks_are_the_whole_file_whatever_their_size(media: Path) -> None:
    text = "".join(json.dumps({"kind": "text", "text": f"{i}", "id": i}) + "\n" for i in range(10))
    lines = text.split("\n")
    lines[3] = "  "  # blank: no record, but a line
    (media / "x.jsonl").write_text("\ufeff" + "\n".join(lines).rstrip("\n"), encoding="utf-8")
    whole = read(media / "x.jsonl")
    assert [r.key for r in whole if isinstance(r, RawSample)] == [f"x-{i:06d}" for i in (1, 2, 3, 5, 6, 7, 8, 9, 10)]
    assert [r.meta["id"] for r in whole if isinstance(r, RawSample)] == [0, 1, 2, 4, 5, 6, 7, 8, 9]
    for records in (1, 3, 4, 10):
        blocks, _ = find_blocks(find_files(media / "x.jsonl")[0], records)
        assert max(block.count for block in blocks) == records
        assert read(media / "x.jsonl", records) == whole


def test_parquet_is_jsonl_in_columns(media: Path) -> None:
    """Paths in columns of strings, nested columns as JSON or as structs and lists; fields without a value are null."""
    records = [record for record, _, _ in KINDS]
    names = sorted({name for record in records for name in record})
    nested = [{n: json.dumps(r[n]) if isinstance(r.get(n), list) else r.get(n) for n in names} for r in records]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(nested), media / "as_json.parquet", row_group_size=3)
    assert read(media / "as_json.parquet") == expected("as_json")
    assert len(find_blocks(find_files(media / "as_json.parquet")[0], 1000)[0]) == 3
    native = pyarrow.Table.from_pylist([{name: record.get(name) for name in names} for record in records])
    pyarrow.parquet.write_table(native, media / "native.parquet")
    assert read(media / "native.parquet") == expected("native")


def test_parquet_with_the_files_themselves(media: Path, make_png: MakePng, example_data: Path) -> None:
    png, video = make_png(), (example_data / "videos" / "bigbuckbunny.mp4").read_bytes()
    (media / "p.png").write_bytes(png)
    (media / "v.mp4").write_bytes(video)
    by_path = [
        {"kind": "caption", "text": "a", "image": "p.png", "content": None},
        {"kind": "interleaved", "content": [{"text": "a"}, {"image": "p.png"}, {"video": "v.mp4"}]},
    ]
    content = [{"text": "a"}, {"image": png}, {"video": video}]
    as_bytes = [
        {"kind": "caption", "text": "a", "image": {"bytes": png, "path": "somewhere/else.png"}, "content": None},
        {"kind": "interleaved", "text": None, "image": None, "content": content},
    ]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(as_bytes), media / "x.parquet")
    from_parquet = read(media / "x.parquet")
    (media / "x.parquet").unlink()
    assert from_parquet == read(jsonl(media / "x.jsonl", by_path))
    assert [isinstance(record, RawSample) for record in from_parquet] == [True, True]


def test_parquet_that_cannot_be_read_is_a_bad_record(media: Path) -> None:
    rows = [{"kind": "text", "text": f"{i} " * 500} for i in range(10)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), media / "x.parquet", compression="none")
    data = (media / "x.parquet").read_bytes()
    for damaged in (b"", b"PAR1", data[:100], data[:-20], b"PAR1" + bytes(len(data) // 2) + data[len(data) // 2 + 4 :]):
        (media / "x.parquet").write_bytes(damaged)
        found = read(media / "x.parquet")
        assert isinstance(found[-1], Rejected) and found[-1].reason == "Parquet file cannot be read"


def test_example_data_by_convention(example_data: Path) -> None:
    found = read(example_data)
    assert [r for r in found if isinstance(r, Rejected)] == []
    by_key = {r.key: r for r in found if isinstance(r, RawSample)}
    assert len(by_key) == len(found)
    groups = [key.partition("/")[0] for key in by_key]
    assert groups == sorted(groups)
    questions = [q for path in (example_data / "vqa").glob("*.json") for q in json.loads(path.read_text())]
    numbers = {"grounded": 5, "images": 44, "interleaved": 9, "text": 5, "videos": 3, "vqa": len(questions)}
    assert {group: groups.count(group) for group in groups} == numbers

    dragon = by_key["images/captions-000002"]
    assert dragon.meta == {
        "kind": "caption", "image": "0.jpg", "text": "Komodo dragon. Varanus komodoensis (5)", "licence": "PD",
        "author": "TimVickers", "source": "https://commons.wikimedia.org/wiki/File:Varanus_komodoensis_(5).jpg",
    }  # fmt: skip
    assert dragon.files == {"0.jpg": (example_data / "images" / "gc_dragon.jpg").read_bytes()}
    screen = by_key["videos/captions-000003"]
    assert screen.meta["video"] == "0.webm" and screen.meta["text"].startswith("Screencast: ")
    assert screen.files == {"0.webm": (example_data / "videos" / "display-dual-monitors.webm").read_bytes()}

    labels = by_key["grounded/classcv_1_1Mat-000001"]
    assert labels.meta["kind"] == "grounded" and (labels.meta["width"], labels.meta["height"]) == (870, 80)
    assert labels.meta["content"][0] == {"phrase": "cv::Mat_< uchar >", "boxes": [[0, 56, 166, 80]]}
    digits = by_key["grounded/digits_200-000001"].meta["content"]
    assert [phrase["phrase"] for phrase in digits] == [str(digit) for digit in range(10)]
    assert [len(phrase["boxes"]) for phrase in digits] == [20] * 10
    assert digits[0]["boxes"][:2] == [[0, 0, 20, 20], [20, 0, 40, 20]]

    shape = by_key["vqa/easy_vqa-000001"]
    assert shape.meta == {
        "kind": "chat", "system": "You are a helpful assistant, dedicated to provide concise and efficient answers.",
        "turns": [{"user": [{"image": "0.png"}, {"text": "what is the red shape?"}], "assistant": "triangle"}],
    }  # fmt: skip
    assert shape.files == {"0.png": (example_data / "vqa" / "easy_vqa" / "0.png").read_bytes()}
    book = by_key["text/us_constitution-000001"]
    assert book == RawSample(
        book.key, {"kind": "text", "text": (example_data / "text" / "us_constitution.txt").read_text(encoding="utf-8")}
    )
    page = by_key["interleaved/ski_swirl-000001"]
    parts = json.loads((example_data / "interleaved" / "ski_swirl.json").read_text(encoding="utf-8"))["content"]
    assert [item.get("text", "picture") for item in page.meta["content"]] == [p.get("text", "picture") for p in parts]


def test_conventions_by_hand(media: Path) -> None:
    objects = [{"label": "dog", "bbox_xyxy": [0, 0, 1, 1]}, {"label": "cat", "bbox_xyxy": [0, 1, 2, 2]}]
    objects += [{"label": "dog", "bbox_xyxy": [3, 3, 4, 4]}]
    grounded = {"image": "a.jpg", "width": 9, "height": 8, "objects": objects, "caption": "Pets.", "title": "T"}
    question = {"image": "a.jpg", "question": "Q?", "answers": ["b", "a", "a", "b", "c"]}
    document = {"content": [{"type": "video", "file": "v.mp4"}, {"type": "text", "text": "t"}], "url": "u"}
    for group, value in (("grounded", grounded), ("vqa", [question]), ("interleaved", [document, document])):
        jsonl(media / group / "x.json", [value])
    (media / "text").mkdir()
    (media / "text" / "y.1.txt").write_bytes("\ufeffDer Bär\r\n熊".encode())
    (media / "text" / ".hidden.txt").write_text("hidden")
    content = [{"text": "Pets."}, {"phrase": "dog", "boxes": [[0, 0, 1, 1], [3, 3, 4, 4]]}]
    content += [{"phrase": "cat", "boxes": [[0, 1, 2, 2]]}]
    one, two, three, four, five = read(media)
    assert isinstance(one, RawSample) and isinstance(five, RawSample)
    assert one.meta == {
        "kind": "grounded", "image": "0.jpg", "width": 9, "height": 8, "content": content, "title": "T"
    }  # fmt: skip
    meta = {"kind": "interleaved", "content": [{"video": "0.mp4"}, {"text": "t"}], "url": "u"}
    assert two == RawSample("interleaved/x-000001", meta, {"0.mp4": of("v.mp4")})
    assert three == RawSample("interleaved/x-000002", meta, {"0.mp4": of("v.mp4")})
    assert four == RawSample("text/y_1-000001", {"kind": "text", "text": "Der Bär\n熊"})
    assert five.meta["turns"][0]["assistant"] == "b"  # two votes each: the first that was given


CAPTION = {"kind": "caption", "text": "x"}


@pytest.mark.parametrize(
    ("line", "reason", "detail"),
    [
        ("{", "JSON is broken", ""), ("\udcff", "JSON is broken", "utf-8"),
        ("[" * 100_000, "JSON is broken", "deeper than 32 levels"),
        ('{"kind": "text", "text": "a", "id": ' + "[" * 30 + "]" * 30 + "}", None, ""),
        ('{"kind": "text", "text": "a", "id": ' + "[" * 33 + "]" * 33 + "}", "JSON is broken", "deeper than 32 levels"),
        ({"kind": "interleaved", "content": "[" * 33 + "]" * 33}, "JSON is broken", "deeper than 32 levels"),
        ("[1]", "record is not an object", "a list"), ("null", "record is not an object", "NoneType"),
        ({}, "record does not follow the format", "kind is None, known are caption, interleaved, grounded, text"),
        ({"kind": ["x"]}, "record does not follow the format", "kind is ['x']"),
        ({"kind": "text"}, "record does not follow the format", "`text` is missing"),
        ({"kind": "text", "text": " \n"}, "record does not follow the format", "`text` is empty"),
        ({"kind": "text", "text": 5}, "record does not follow the format", "`text` is a int"),
        ({"kind": "text", "text": "\ud800"}, "text is not valid Unicode", "surrogates not allowed"),
        ('{"kind": "text", "text": "a", "id": NaN}', "JSON is broken", "not JSON compliant"),
        (CAPTION, "record does not follow the format", "either `image` or `video`"),
        ({**CAPTION, "image": "a.jpg", "video": "v.mp4"}, "record does not follow the format", "either"),
        ({**CAPTION, "image": "none.jpg"}, "file is missing", "'none.jpg'"),
        ({**CAPTION, "image": "sub.jpg"}, "file is missing", "'sub.jpg'"),
        ({**CAPTION, "image": "a.jpg/x.jpg"}, "file is missing", ""),
        ({**CAPTION, "image": "a\0.jpg"}, "file is missing", ""),
        ({**CAPTION, "image": "x" * 300 + ".jpg"}, "file cannot be read", ""),
        ({**CAPTION, "image": "pipe.jpg"}, "file is missing", "pipe"),
        ({**CAPTION, "image": "notes.txt"}, "file type is unknown", "'notes.txt' for `image`, which may be jpg, jpeg"),
        ({**CAPTION, "image": "v.mp4"}, "file type is unknown", ""),
        ({**CAPTION, "video": "a.jpg"}, "file type is unknown", ""),
        ({**CAPTION, "image": "../outside.jpg"}, "path points outside its folder", "'../outside.jpg'"),
        ({**CAPTION, "image": "sub/../a.jpg"}, "path points outside its folder", ""),
        ({**CAPTION, "image": "OUTSIDE"}, "path points outside its folder", "outside.jpg"),
        ({**CAPTION, "image": "INSIDE"}, None, ""),
        ({**CAPTION, "image": 5}, "record does not follow the format", "`image` is neither a path"),
        ({**CAPTION, "image": {"path": "a.jpg"}}, None, ""),
        ({"kind": "interleaved", "content": []}, "record does not follow the format", "`content` is empty"),
        ({"kind": "interleaved", "content": [{"text": " "}]}, "record does not follow the format", "empty"),
        ({"kind": "interleaved", "content": ["a"]}, "record does not follow the format", "an item of `content`"),
        ({"kind": "interleaved", "content": [{"text": 1}]}, "record does not follow the format", "not a string"),
        ({"kind": "interleaved", "content": [{"text": "a", "image": "a.jpg"}]}, "record does not follow", "an item"),
        ({"kind": "interleaved", "content": "[{"}, "JSON is broken", ""),
        ({"kind": "grounded", "image": "a.jpg", "width": "9"}, "record does not follow the format", "`width` is a str"),
        ({"kind": "chat", "turns": []}, "record does not follow the format", "`turns` is empty"),
        ({"kind": "generation", "content": ["a"]}, "record does not follow the format", "`target` is missing"),
    ],
)  # fmt: skip
def test_bad_records_are_named(media: Path, line: Any, reason: str | None, detail: str) -> None:
    (media.parent / "outside.jpg").write_bytes(b"not for us")
    (media / "sub.jpg").mkdir()
    os.mkfifo(media / "pipe.jpg")
    text = line if isinstance(line, str) else json.dumps(line)
    text = text.replace("OUTSIDE", str(media.parent / "outside.jpg")).replace("INSIDE", str(media / "a.jpg"))
    good = json.dumps({"kind": "text", "text": "good"})
    (media / "x.jsonl").write_bytes(f"{good}\n{text}\n{good}".encode(errors="surrogateescape"))
    first, bad, last = read(media / "x.jsonl")
    assert isinstance(first, RawSample) and isinstance(last, RawSample) and last.key == "x-000003"
    if reason is None:
        assert isinstance(bad, RawSample)
    else:
        assert isinstance(bad, Rejected) and bad.reason.startswith(reason) and detail in bad.detail
        assert (bad.file, bad.line) == ("x.jsonl", 2) and len(bad.detail) <= 300


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("images/captions.jsonl", {"file": "a.jpg"}, "record does not follow the format: `caption` is missing"),
        ("images/captions.jsonl", {"caption": "a", "file": "../a.jpg"}, "path points outside its folder: '../a.jpg'"),
        ("videos/captions.json", [{"caption": "a"}], "record does not follow the format: `file` is missing"),
        ("interleaved/d.json", {"content": [{"type": "text", "text": 5}]}, "record does not follow the format: a `t"),
        ("interleaved/d.json", {"content": [{"type": "image"}]}, "record does not follow the format: an item of"),
        ("interleaved/d.json", {"content": [{"type": "audio"}]}, "record does not follow the format: the `type`"),
        ("interleaved/d.json", {"content": ["a"]}, "record does not follow the format: the `type`"),
        ("interleaved/d.json", 5, "record is not an object: it is a int"),
        ("grounded/d.json", {"objects": [5]}, "record does not follow the format: an item of `objects`"),
        ("grounded/d.json", {"objects": [{"label": "a"}]}, "record does not follow the format: `bbox_xyxy` is missing"),
        ("vqa/d.json", [{"answers": []}], "record does not follow the format: needs `answer`"),
        ("vqa/d.json", [{"answer": "a", "question": "b"}], "record does not follow the format: `image` is missing"),
        ("text/d.txt", None, "record does not follow the format: `text` is empty"),
    ],
)  # fmt: skip
def test_bad_records_of_the_conventions_are_named(media: Path, name: str, content: Any, reason: str) -> None:
    jsonl(media / name, [content] if content is not None else [])
    (bad,) = read(media)
    assert isinstance(bad, Rejected) and f"{bad.reason}: {bad.detail}".startswith(reason)
    assert (bad.file, bad.line) == (name, 1)


def test_text_that_is_not_utf_8(media: Path) -> None:
    (media / "text").mkdir()
    (media / "text" / "latin1.txt").write_bytes("Bär".encode("latin1"))
    assert read(media) == [Rejected("text/latin1.txt", 1, "text is not UTF-8", "invalid continuation byte at byte 1")]


def test_links_inside_the_folder_are_followed(media: Path) -> None:
    (media / "link.jpg").symlink_to(media / "a.jpg")
    (found,) = read(jsonl(media / "x.jsonl", [{**CAPTION, "image": "link.jpg"}]))
    assert isinstance(found, RawSample) and found.files == {"0.jpg": of("a.jpg")}


def test_sources_that_cannot_be(media: Path) -> None:
    with pytest.raises(DataError, match=r"in: no records there: neither images/captions.jsonl, .* nor any \*.jsonl"):
        find_files(media)
    with pytest.raises(DataError, match="notes.txt: not a .jsonl or .parquet file, and not a folder"):
        find_files(media / "notes.txt")
    for name in ("x.1.jsonl", "x_1.jsonl"):
        jsonl(media / name, [])
    with pytest.raises(DataError, match="x.1.jsonl and x_1.jsonl would give samples the same keys"):
        find_files(media)


def test_checksums_know_the_content(media: Path) -> None:
    def checksum(name: str) -> str:
        return find_blocks(find_files(media / name)[0], 10)[1]

    jsonl(media / "a.jsonl", [{"kind": "text", "text": "a"}])
    table = pyarrow.Table.from_pylist([{"kind": "text", "text": "a"}])
    pyarrow.parquet.write_table(table, media / "b.parquet")
    before = checksum("a.jsonl"), checksum("b.parquet")
    assert before == (checksum("a.jsonl"), checksum("b.parquet"))
    jsonl(media / "a.jsonl", [{"kind": "text", "text": "b"}])
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([{"kind": "text", "text": "b"}]), media / "b.parquet")
    assert checksum("a.jsonl") != before[0] and checksum("b.parquet") != before[1]


def test_types_are_known_by_content(example_data: Path) -> None:
    for extension, format in (("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP"), ("gif", "GIF")):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4)).save(buffer, format)
        assert sniff(buffer.getvalue()) == extension
    for path in (example_data / "videos").iterdir():
        assert path.suffix == ".json" or sniff(path.read_bytes()) == path.suffix[1:]
    assert sniff(b"RIFF\0\0\0\0AVI LIST") == "avi" and sniff(b"\0\0\0\x14ftypqt  ") == "mov"
    assert sniff(b"\x1a\x45\xdf\xa3\x01\x42\x82\x88matroska") == "mkv"
    assert [sniff(data) for data in (b"", b"RIFF", b"BM junk", b"RIFF\0\0\0\0WAVE")] == [""] * 4


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4) | st.sampled_from(["a.jpg", "text"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from("kind text image video content turns user target objects label answers bytes path".split())
            | st.text(max_size=3),
            inner,
            max_size=5,
        )
    ),
    max_leaves=12,
)
RECORDS = st.fixed_dictionaries(
    {"kind": st.sampled_from("caption interleaved grounded text chat generation".split())},
    optional={name: JSON for name in "text image video content turns target width height file caption objects".split()},
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.one_of(st.binary(max_size=30), RECORDS, JSON), max_size=4), st.sampled_from(["images", "vqa", ""]))
def test_whatever_stands_there_is_a_sample_or_a_bad_record(
    tmp_path_factory: pytest.TempPathFactory, records: list[Any], group: str
) -> None:
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a.jpg").write_bytes(b"")
    lines = [r.replace(b"\n", b"") if isinstance(r, bytes) else json.dumps(r).encode() for r in records]
    if group == "vqa":
        content = b"[" + b",".join(lines) + b"]"
    else:
        content = b"\n".join([*lines, b"{}"])
    path = folder / {"images": "images/captions.jsonl", "vqa": "vqa/x.json", "": "x.jsonl"}[group]
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(content)
    for found in read(folder):
        if isinstance(found, Rejected):
            assert found.reason and "\n" not in found.reason
        else:
            json.dumps(found.meta, ensure_ascii=False).encode()


def test_examples_of_the_documentation_follow_the_format() -> None:
    page = (Path(__file__).parents[2] / "docs" / "data-format.md").read_text(encoding="utf-8")
    blocks = [block.partition("```")[0] for block in page.split("```json\n")[1:]]
    examples = [json.loads(line) for block in blocks for line in block.splitlines()]
    for example in examples:
        conventions.check(example)
    assert {example["kind"] for example in examples} == set(conventions.REQUIRED)
