"""Location tokens to boxes, by hand, and boxes to pixels."""

import numpy as np
import pytest
from PIL import Image

from emu2_megatron.inference.boxes import Grounded, draw, parse


def _box(*numbers: int) -> str:
    return "".join(f"<patch_index_{number:04d}>" for number in numbers)


WHOLE, HALF = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.5, 1.0)
ALL, LEFT = _box(0, 0, 224, 224), _box(0, 0, 112, 224)
TEXTS = [
    (f"A photo of<phrase>a man</phrase><object>{ALL}</object>.", [Grounded("a man", [WHOLE])]),
    (f"<object>{ALL}</object><phrase>a man</phrase>", [Grounded("a man", [WHOLE])]),
    (
        f"<object>{ALL}</object><phrase>a man</phrase><object>{LEFT}</object><phrase> a dog </phrase>",
        [Grounded("a man", [WHOLE]), Grounded("a dog", [HALF])],
    ),
    (
        f"<phrase>two</phrase><object>{ALL}</delimiter_of_multi_objects/>{LEFT}</object>",
        [Grounded("two", [WHOLE, HALF])],
    ),
    (f"<object>{LEFT}</object>", [Grounded("", [HALF])]),
    (f"It is at {LEFT}", [Grounded("", [HALF])]),
    (f"<phrase>far</phrase> and then <object>{LEFT}</object>", [Grounded("", [HALF])]),
    (f"<phrase>a</phrase><object>{_box(1, 2, 3)}</object>", []),  # three numbers
    (f"<phrase>a</phrase><object>{_box(0, 0, 225, 224)}</object>", []),  # a spare token
    (f"<phrase>a</phrase><object>{_box(9, 0, 9, 224)}</object>", []),  # nothing within
    ("<phrase>a</phrase><object>", []),
    ("no boxes", []),
]


@pytest.mark.parametrize(("text", "wanted"), TEXTS)
def test_parse(text: str, wanted: list[Grounded]) -> None:
    assert parse(text) == wanted


def test_draw() -> None:
    """Lines are where the box says, and nowhere else; the picture given stays as it is."""
    blank = Image.new("L", (225, 113))
    drawn = np.asarray(draw(blank, [Grounded("", [(0.25, 0.25, 0.75, 0.75)])])).any(axis=2)
    assert drawn.shape == (113, 225)
    rows, columns = drawn.any(axis=1).nonzero()[0], drawn.any(axis=0).nonzero()[0]
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (28, 84, 56, 168)
    assert not drawn[40:70, 70:150].any()
    assert not np.asarray(blank).any()
    named = np.asarray(draw(blank, [Grounded("a dog", [(0.25, 0.25, 0.75, 0.75)])])).any(axis=2)
    assert named.sum() > drawn.sum()
