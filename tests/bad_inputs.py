"""Shards for tests of bad data: bad samples hidden among good ones, and shards that are bad as a whole.

Written with `tarfile` and `json` alone: `write_shard` would refuse to store most of it.
"""

import io
import json
import random
import tarfile
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import media
from bad_samples import PICKLE, BadSample

from emu2_megatron.data.shards import RawSample


def good_samples(count: int) -> list[RawSample]:
    """Sound samples of every kind but chat, in turn; none has more than 100 tokens with 4 embeddings a picture."""
    jpeg, png = media.picture("JPEG"), media.picture()
    mp4, webm = media.video(9), media.video(9, "webm", "libvpx")
    boxes = [{"text": "A photo of"}, {"phrase": "a man", "boxes": [[0, 0, 20, 30]]}]
    entity = [{"text": "A photo of"}, {"phrase": "a man", "box": [0, 0, 20, 30], "image": "1.png"}]
    kinds: list[tuple[dict[str, Any], dict[str, bytes]]] = [
        ({"kind": "caption", "text": "A dog.", "image": "0.jpg"}, {"0.jpg": jpeg}),
        ({"kind": "caption", "text": "Un chien.", "video": "0.mp4"}, {"0.mp4": mp4}),
        ({"kind": "interleaved", "content": [{"text": "一只猫"}, {"image": "0.webp"}]},
         {"0.webp": media.picture("WEBP")}),
        ({"kind": "grounded", "image": "0.png", "width": 40, "height": 30, "content": boxes}, {"0.png": png}),
        ({"kind": "text", "text": "Call me Ishmael."}, {}),
        ({"kind": "caption", "text": "A cat.", "video": "0.webm"}, {"0.webm": webm}),
        ({"kind": "generation", "width": 40, "height": 30, "target": "0.jpg", "content": entity},
         {"0.jpg": jpeg, "1.png": png}),
        ({"kind": "caption", "text": "A cow.", "image": "0.gif"}, {"0.gif": media.picture("GIF")}),
    ]  # fmt: skip
    return [RawSample(f"good_{i:04d}", *kinds[i % len(kinds)]) for i in range(count)]


def write_shards(
    folder: Path, bad: Iterable[BadSample], good: Iterable[RawSample], count: int = 2, seed: int = 0
) -> list[Path]:
    """Shuffles bad and good samples together and writes them into `count` shards of `folder`."""
    stored = [(sample.key, sample.members) for sample in bad]
    stored += [(raw.key, {"json": json.dumps(raw.meta).encode(), **raw.files}) for raw in good]
    random.Random(seed).shuffle(stored)
    paths = [folder / f"mixed_{number:02d}.tar" for number in range(count)]
    for number, path in enumerate(paths):
        members = [(f"{key}.{name}", data) for key, files in stored[number::count] for name, data in files.items()]
        path.write_bytes(tar(members))
    return paths


def bad_shards() -> dict[str, bytes]:
    """Shards of which nothing may be used, by what is wrong with them."""
    text = b'{"kind": "text", "text": "Call me Ishmael."}'
    plain = tar([("a.json", text)])
    return {
        "absolute_name": tar([("a.json", text), ("/etc/b.json", text)]),
        "parent_folder": tar([("a.json", text), ("../b.json", text)]),
        "parent_folder_inside": tar([("c/../../b.json", text)]),
        "pickled_member": tar([("a.json", text), ("a.0.pkl", PICKLE)]),
        "pickled_weights": tar([("a.json", text), ("a.0.pt", PICKLE)]),
        "program": tar([("a.json", text), ("a.run.py", b"print()")]),
        "no_name": tar([("a.json", text), (".json", text)]),
        "symlink": tar([("a.json", text)], link=("a.0.jpg", tarfile.SYMTYPE)),
        "hard_link": tar([("a.json", text)], link=("a.0.jpg", tarfile.LNKTYPE)),
        "device": tar([("a.json", text)], link=("a.0.jpg", tarfile.CHRTYPE)),
        "member_twice": tar([("a.json", text), ("a.json", text)]),
        "members_apart": tar([("a.json", text), ("b.json", text), ("a.0.jpg", media.picture("JPEG"))]),
        "cut_in_member": tar([("a.json", text), ("b.json", text * 100)])[:3000],
        "cut_in_header": plain[: 1024 + 100],
        "no_end_mark": plain[:1024],
        "damaged_header": tar([("a.json", text), ("b.json", text)]).replace(b"b.json", b"\xff.json"),
        "compressed": zlib.compress(plain, wbits=31),
        "zero_bytes": b"",
        "no_tar": b"not a tar file\n" * 100,
    }


def tar(members: Sequence[tuple[str, bytes]], link: tuple[str, bytes] | None = None) -> bytes:
    """An uncompressed tar of (name, content), and at its end something that is no file: (name, tarfile's type)."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
        if link:
            member = tarfile.TarInfo(link[0])
            member.type, member.linkname = link[1], "/etc/passwd"
            archive.addfile(member)
    return buffer.getvalue()
