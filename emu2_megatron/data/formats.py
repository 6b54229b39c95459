"""What the kinds of stored samples look like as sequences (arXiv 2312.13286), one function a kind.

    caption       <s> picture text </s>, or, at random, <s> text picture </s>; a video likewise
    interleaved   <s> texts, pictures and videos in reading order </s>
    grounded      <s> picture <grounding> text with phrases </s>, or the picture last
    text          <s> text </s>
    chat          <s> system [USER] : question [ASSISTANT] : answer </s> [USER] ...
    generation    <s> texts, pictures, phrases with their boxes, and last the picture to generate </s>

A function turns a sample's JSON (`docs/data-format.md`) into pieces; `data/samples.py` turns pieces into tokens.
Whatever is wrong with a sample is a DataError whose message is "reason: detail".
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from emu2_megatron.config.schema import DataConfig
from emu2_megatron.data import probe
from emu2_megatron.data.features import EXTENSION
from emu2_megatron.data.shards import PICTURE_EXTENSIONS, VIDEO_EXTENSIONS, RawSample
from emu2_megatron.data.visuals import BoxPicture
from emu2_megatron.errors import DataError


@dataclass(frozen=True)
class Text:
    """A segment of text, tokenised by itself."""

    text: str
    target: bool = True
    """Whether the text loss counts it."""


@dataclass(frozen=True)
class Token:
    """One added token, by name, or `</s>`."""

    name: str
    target: bool = True


@dataclass(frozen=True)
class Show:
    """A picture or a video, with its markers."""

    what: str | BoxPicture
    """Name of the member; or a box to draw."""
    video: bool = False
    regressed: bool = True
    """Whether its embeddings are predicted."""
    markers: bool = True
    """Whether `[IMG]` and `[/IMG]` may be targets of the text loss (data.supervise_image_markers)."""
    size: tuple[int, int] | None = None
    """Width and height it must have, where boxes are given in its pixels."""


Piece: TypeAlias = Text | Token | Show
_Draw: TypeAlias = np.random.Generator


class Format(NamedTuple):
    """How a kind becomes a sequence, and what happens to one that is too long."""

    pieces: Callable[[RawSample, DataConfig, np.random.Generator], list[Piece]]
    """Everything behind `<s>`."""
    too_long: str
    """`refuse`: a bad sample; `cut`: at its end; `window`: a part of it is drawn at random (data.document_tokens)."""


LOCATIONS = 224
"""Steps of a coordinate: 0 is the left or upper edge, 224 the right or lower one."""

_END = Token("</s>")


def _caption(raw: RawSample, data: DataConfig, draw: _Draw) -> list[Piece]:
    names = [name for name in ("image", "video") if name in raw.meta]
    if len(names) != 1:
        raise malformed(raw, "a caption has one `image` or one `video`")
    return [*_around(_shown(raw, raw.meta, names[0]), [_text(raw, raw.meta)], data, draw), _END]


def _interleaved(raw: RawSample, data: DataConfig, draw: _Draw) -> list[Piece]:
    return [*(_part(raw, item) for item in _list(raw, raw.meta, "content")), _END]


def _grounded(raw: RawSample, data: DataConfig, draw: _Draw) -> list[Piece]:
    size = _size(raw)
    said: list[Piece] = [Token("<grounding>")]
    for item in _list(raw, raw.meta, "content"):
        if not isinstance(item, dict) or "phrase" not in item:
            said.append(_text(raw, item))
            continue
        boxes = [_quantised(_box(raw, box, size), size) for box in _list(raw, item, "boxes")]
        if not boxes:
            raise malformed(raw, "`boxes` of a phrase is empty")
        phrase, place = _phrase(_text(raw, item, "phrase")), _locations(boxes)
        said += phrase + place if draw.random() < data.phrase_first_probability else place + phrase
    return [*_around(_shown(raw, raw.meta, "image", size=size), said, data, draw), _END]


def _plain_text(raw: RawSample, data: DataConfig, draw: _Draw) -> list[Piece]:
    return [_text(raw, raw.meta, strip=False), _END]


def _chat(raw: RawSample, data: DataConfig, draw: _Draw) -> list[Piece]:
    pieces: list[Piece] = []
    if raw.meta.get("system"):
        pieces.append(_text(raw, raw.meta, "system", target=False))
    turns = _list(raw, raw.meta, "turns")
    if not turns:
        raise malformed(raw, "`turns` is empty")
    for turn in turns:
        if not isinstance(turn, dict):
            raise malformed(raw, 'every item of `turns` is {"user": ..., "assistant": ...}')
        asked = turn.get("user")
        content = [{"text": asked}] if isinstance(asked, str) else _list(raw, turn, "user")
        pieces += [Token("[USER]", target=False), Text(":", target=False)]
        pieces += [_part(raw, item, learnt=False) for item in content]
        pieces += [Token("[ASSISTANT]", target=False), Text(":", target=False), _text(raw, turn, "assistant"), _END]
    return pieces


def _generation(raw: RawSample, data: DataConfig, draw: _Draw) -> list[Piece]:
    pieces: list[Piece] = []
    boxed = False
    for item in _list(raw, raw.meta, "content"):
        if not isinstance(item, dict) or "phrase" not in item:
            pieces.append(_part(raw, item, learnt=False))
            continue
        boxed = True
        pieces += _phrase(_text(raw, item, "phrase", target=False))
        if "box" in item:
            width, height = _size(raw)
            x0, y0, x1, y1 = _box(raw, item["box"], (width, height))
            outline = BoxPicture((x0 / width, y0 / height, x1 / width, y1 / height))
            pieces += [Token("<object>"), Show(outline), Token("</object>")]
        if "image" in item:
            pieces.append(_shown(raw, item, "image"))
    size = _size(raw) if boxed and "width" in raw.meta else None
    if not pieces:
        raise malformed(raw, "`content` is empty")
    return [*map(_unlearnt, pieces), _shown(raw, raw.meta, "target", markers=False, size=size), _unlearnt(_END)]


FORMATS: dict[str, Format] = {
    "caption": Format(_caption, "refuse"),
    "interleaved": Format(_interleaved, "window"),
    "grounded": Format(_grounded, "refuse"),
    "text": Format(_plain_text, "refuse"),
    "chat": Format(_chat, "cut"),
    "generation": Format(_generation, "refuse"),
}
"""Every `kind` of a sample's JSON."""


def format_of(raw: RawSample) -> Format:
    """The format of a sample. Raises DataError if its `kind` is missing or unknown."""
    kind = raw.meta.get("kind")
    if not isinstance(kind, str) or kind not in FORMATS:
        raise malformed(raw, f"kind is {kind!r}, known are {', '.join(FORMATS)}")
    return FORMATS[kind]


def malformed(raw: RawSample, detail: str) -> DataError:
    """The error of a sample whose JSON is not what `docs/data-format.md` says."""
    return DataError(f"sample does not follow the format: {raw.key}: {detail}")


def _around(shown: Show, said: list[Piece], data: DataConfig, draw: _Draw) -> list[Piece]:
    """The picture before what is said of it, or after."""
    return [shown, *said] if draw.random() < data.image_first_probability else [*said, shown]


def _phrase(text: Text) -> list[Piece]:
    return [Token("<phrase>"), text, Token("</phrase>")]


def _locations(boxes: list[list[int]]) -> list[Piece]:
    """Boxes in 224ths of the picture, four tokens each."""
    pieces: list[Piece] = []
    for box in boxes:
        pieces += [Token("</delimiter_of_multi_objects/>")] if pieces else []
        pieces += [Token(f"<patch_index_{coordinate:04d}>") for coordinate in box]
    return [Token("<object>"), *pieces, Token("</object>")]


def _unlearnt(piece: Piece) -> Piece:
    match piece:
        case Text(text):
            return Text(text, target=False)
        case Token(name):
            return Token(name, target=False)
        case Show(what, video):
            return Show(what, video, regressed=False, markers=False)


def _part(raw: RawSample, item: object, learnt: bool = True) -> Text | Show:
    """`{"text": ...}`, `{"image": ...}` or `{"video": ...}`."""
    names = [name for name in ("text", "image", "video") if isinstance(item, dict) and name in item]
    if not isinstance(item, dict) or len(names) != 1:
        raise malformed(raw, 'every item of `content` is {"text": ...}, {"image": ...} or {"video": ...}')
    if names == ["text"]:
        return _text(raw, item, target=learnt)
    return _shown(raw, item, names[0], regressed=learnt, markers=learnt)


def _text(raw: RawSample, item: Any, name: str = "text", target: bool = True, strip: bool = True) -> Text:
    text = item.get(name) if isinstance(item, dict) else None
    if not isinstance(text, str) or not text.strip():
        raise malformed(raw, f"`{name}` is missing, empty or not a string")
    # The released tokenizer drops white space beside an added token.
    return Text(text.strip() if strip else text, target)


def _shown(
    raw: RawSample,
    item: dict[str, Any],
    field: str,
    regressed: bool = True,
    markers: bool = True,
    size: tuple[int, int] | None = None,
) -> Show:
    name, video = item.get(field), field == "video"
    if not isinstance(name, str) or name not in raw.files:
        raise malformed(raw, f"`{field}` is {name!r}, its files are {sorted(raw.files)}")
    legal = VIDEO_EXTENSIONS if video else (*PICTURE_EXTENSIONS, EXTENSION)
    if name.rpartition(".")[2].lower() not in legal:
        raise malformed(raw, f"`{field}` is {name!r}, legal are {', '.join(f'.{extension}' for extension in legal)}")
    return Show(name, video, regressed, markers, size)


def _list(raw: RawSample, item: dict[str, Any], name: str) -> list[Any]:
    value = item.get(name)
    if not isinstance(value, list):
        raise malformed(raw, f"`{name}` is missing or not a list")
    return value


def _size(raw: RawSample) -> tuple[int, int]:
    """Width and height of the picture that boxes are in."""
    size = raw.meta.get("width"), raw.meta.get("height")
    for name, value in zip(("width", "height"), size, strict=True):
        if type(value) is not int or not 1 <= value <= probe.MAX_PIXELS:
            raise malformed(raw, f"`{name}` is no size of a picture in pixels, which boxes need")
    return size  # type: ignore[return-value]


def _box(raw: RawSample, box: object, size: tuple[int, int]) -> tuple[float, float, float, float]:
    """A box in pixels, checked."""
    width, height = size
    if not isinstance(box, list) or len(box) != 4 or not all(type(x) in (int, float) for x in box):
        raise malformed(raw, f"a box is [left, top, right, bottom] in pixels, not {box!r}")
    x0, y0, x1, y1 = box
    if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
        raise DataError(f"box is outside its picture or empty: {raw.key}: {box} in {width} x {height}")
    return x0, y0, x1, y1


def _quantised(box: tuple[float, float, float, float], size: tuple[int, int]) -> list[int]:
    """A box in steps of the location tokens; halves are rounded up."""
    return [math.floor(LOCATIONS * x / extent + 0.5) for x, extent in zip(box, (*size, *size), strict=True)]
