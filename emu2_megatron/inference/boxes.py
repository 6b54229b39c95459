"""Boxes in what a model says, and on a picture.

    <phrase>a dog</phrase><object><patch_index_0010><patch_index_0020><patch_index_0100><patch_index_0200></object>

A box is left, top, right and bottom in steps of 1/224 of the picture; several of one phrase have
`</delimiter_of_multi_objects/>` between them. The phrase comes before its boxes or after them.
"""

import re
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from emu2_megatron.data.formats import LOCATIONS

Box = tuple[float, float, float, float]
"""Left, top, right, bottom as shares of the picture's width and height, 0 to 1."""

_ITEMS = re.compile(
    r"<phrase>(?P<phrase>.*?)</phrase>|<object>(?P<object>.*?)</object>|(?P<bare>(?:<patch_index_\d+>)+)"
)
_DELIMITER = "</delimiter_of_multi_objects/>"
_COLORS = ("#e6194b", "#3cb44b", "#4363d8", "#f58231", "#911eb4", "#008080")


@dataclass(frozen=True)
class Grounded:
    """What is said to be where."""

    phrase: str
    """Empty if the answer is boxes alone."""
    boxes: list[Box]


def parse(text: str) -> list[Grounded]:
    """What a text with location tokens says, in order. Of boxes that are none (not four numbers of 0 to 224, or nothing
    within), there is nothing in the result."""
    items = list(_ITEMS.finditer(text))
    used: set[int] = set()
    found = []
    for i, item in enumerate(items):
        if item["phrase"] is not None:
            continue
        inside = item["object"] if item["object"] is not None else item["bare"]
        boxes = [box for part in inside.split(_DELIMITER) if (box := _box(part))]
        phrase = ""
        for j in (i - 1, i + 1):
            if 0 <= j < len(items) and j not in used and items[j]["phrase"] is not None and _touch(items, min(i, j)):
                used.add(j)
                phrase = items[j]["phrase"].strip()
                break
        if boxes:
            found.append(Grounded(phrase, boxes))
    return found


def draw(picture: Image.Image, found: list[Grounded]) -> Image.Image:
    """A copy of the picture with every box and its phrase on it."""
    picture = picture.convert("RGB")
    canvas = ImageDraw.Draw(picture)
    width = max(2, min(picture.size) // 150)
    font = ImageFont.load_default(max(12, min(picture.size) // 30))
    for i, grounded in enumerate(found):
        color = _COLORS[i % len(_COLORS)]
        for box in grounded.boxes:
            x0, y0, x1, y1 = (round(share * (extent - 1)) for share, extent in zip(box, picture.size * 2, strict=True))
            canvas.rectangle((x0, y0, x1, y1), outline=color, width=width)
            if grounded.phrase:
                place = (x0 + width + 1, y0 + width + 1)
                canvas.rectangle(canvas.textbbox(place, grounded.phrase, font=font), fill=color)
                canvas.text(place, grounded.phrase, fill="white", font=font)
    return picture


def _touch(items: list[re.Match[str]], i: int) -> bool:
    """Whether nothing but space stands between an item and the next."""
    return not items[i].string[items[i].end() : items[i + 1].start()].strip()


def _box(text: str) -> Box | None:
    numbers = [int(number) for number in re.findall(r"<patch_index_(\d+)>", text)]
    if len(numbers) != 4 or max(numbers) > LOCATIONS:
        return None
    x0, y0, x1, y1 = (number / LOCATIONS for number in numbers)
    return (x0, y0, x1, y1) if x0 < x1 and y0 < y1 else None
