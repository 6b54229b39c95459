"""The JSON of a sample: which kinds there are, what each must have, and how the records of a folder become them."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from emu2_megatron.errors import DataError

Json = dict[str, Any]

REQUIRED: dict[str, dict[str, type | tuple[type, ...]]] = {
    "caption": {"text": str},
    "interleaved": {"content": list},
    "grounded": {"image": str, "width": (int, float), "height": (int, float), "content": list},
    "text": {"text": str},
    "chat": {"turns": list},
    "generation": {"target": str, "content": list},
}
"""Kind -> what its JSON must have at least, not empty."""

FIELDS = ("kind", "text", "image", "video", "width", "height", "content", "system", "turns", "target")
"""All fields that training looks at."""

CONCISE = "You are a helpful assistant, dedicated to provide concise and efficient answers."
"""Emu2-Chat's system message for questions with short answers."""

_MALFORMED = "record does not follow the format"


def check(meta: Json) -> None:
    """Raises DataError if a sample's JSON lacks what its kind must have. What is inside lists is checked when training
    reads it, but for interleaved documents, which are cut on the way."""
    kind = meta.get("kind")
    if not isinstance(kind, str) or kind not in REQUIRED:
        raise DataError(f"{_MALFORMED}: kind is {kind!r}, known are {', '.join(REQUIRED)}")
    for name, types in REQUIRED[kind].items():
        _need(meta, name, types)
    if kind == "caption" and ("image" in meta) == ("video" in meta):
        raise DataError(f"{_MALFORMED}: a caption needs either `image` or `video`")
    if kind == "interleaved":
        for item in meta["content"]:
            if not isinstance(item, dict) or len({"text", "image", "video"} & set(item)) != 1:
                raise DataError(f"{_MALFORMED}: an item of `content` has either `text`, `image` or `video`")
            if not isinstance(item.get("text", ""), str):
                raise DataError(f"{_MALFORMED}: a `text` of `content` is not a string")
        if all("text" in item and not item["text"].strip() for item in meta["content"]):
            raise DataError(f"{_MALFORMED}: `content` is empty")


def _need(record: Json, name: str, types: type | tuple[type, ...]) -> Any:
    value = record.get(name)
    if value is None:
        raise DataError(f"{_MALFORMED}: `{name}` is missing")
    if not isinstance(value, types) or isinstance(value, bool):
        raise DataError(f"{_MALFORMED}: `{name}` is a {type(value).__name__}")
    if value == [] or (isinstance(value, str) and not value.strip()):
        raise DataError(f"{_MALFORMED}: `{name}` is empty")
    return value


def _captioned_picture(record: Json) -> Json:
    return {"kind": "caption", "text": _need(record, "caption", str), "image": _need(record, "file", str)}


def _captioned_video(record: Json) -> Json:
    return {"kind": "caption", "text": _need(record, "caption", str), "video": _need(record, "file", str)}


def _document(record: Json) -> Json:
    content = []
    for item in _need(record, "content", list):
        kind = item.get("type") if isinstance(item, dict) else None
        if kind not in ("text", "image", "video"):
            raise DataError(f"{_MALFORMED}: the `type` of an item of `content` is {kind!r}, not text, image or video")
        content.append({kind: item.get("text" if kind == "text" else "file")})
    return {"kind": "interleaved", "content": content}


def _grounded(record: Json) -> Json:
    boxes: dict[str, list[Any]] = {}
    for thing in _need(record, "objects", list):
        if not isinstance(thing, dict):
            raise DataError(f"{_MALFORMED}: an item of `objects` is not an object")
        boxes.setdefault(_need(thing, "label", str), []).append(_need(thing, "bbox_xyxy", list))
    caption = [{"text": _need(record, "caption", str)}] if "caption" in record else []
    phrases = [{"phrase": label, "boxes": found} for label, found in boxes.items()]
    size = {name: _need(record, name, (int, float)) for name in ("width", "height")}
    return {"kind": "grounded", "image": _need(record, "image", str), **size, "content": [*caption, *phrases]}


def _text(record: Json) -> Json:
    return {"kind": "text", "text": _need(record, "text", str)}


def _question(record: Json) -> Json:
    answers = record.get("answers", [record.get("answer")])
    if not isinstance(answers, list) or not answers or not all(isinstance(a, str) and a.strip() for a in answers):
        raise DataError(f"{_MALFORMED}: needs `answer`, or a list `answers`, of text")
    # Of several answers with equal votes, the one that was given first.
    answer, _ = Counter(answers).most_common(1)[0]
    user = [{"image": _need(record, "image", str)}, {"text": _need(record, "question", str)}]
    return {"kind": "chat", "system": CONCISE, "turns": [{"user": user, "assistant": answer}]}


def _as_it_is(record: Json) -> Json:
    return {name: record[name] for name in FIELDS if name in record}


TO_SAMPLE: dict[str, Callable[[Json], Json]] = {
    "images": _captioned_picture,
    "videos": _captioned_video,
    "interleaved": _document,
    "grounded": _grounded,
    "text": _text,
    "vqa": _question,
    "records": _as_it_is,
}
"""Group of records (`data/records.py`) -> a sample's JSON, with paths of files for names. DataError if it cannot be."""
