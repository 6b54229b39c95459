"""The page of `emu2 data inspect`: what it counts and shows of rows made by hand, and that nothing in it can run."""

import base64
import io
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from emu2_megatron.config.schema import Config
from emu2_megatron.data.inspect_page import page, tally
from emu2_megatron.data.sequence import Features, PackedSequence
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import DataError

VOID = {"meta", "img", "rect", "line"}
RED = torch.tensor([200, 30, 40], dtype=torch.uint8).view(3, 1, 1).expand(3, 8, 8)


class Reader(HTMLParser):
    """Elements of a page as (name, attributes, text within), in the order in which they begin."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str], list[str]]] = []
        self._open: list[int] = []
        self.feed(html)
        self.close()
        assert not self._open, "elements left open"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))
        if tag not in VOID or tag == "rect":  # a rect of the bar holds a title
            self._open.append(len(self.elements) - 1)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}, []))

    def handle_endtag(self, tag: str) -> None:
        assert self.elements[self._open.pop()][0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data: str) -> None:
        for i in self._open:
            self.elements[i][2].append(data)

    def all(self, tag: str, kind: str = "") -> list[str]:
        """Text of the elements of that name, and of that class among others."""
        found = [(attrs, text) for name, attrs, text in self.elements if name == tag]
        return ["".join(text) for attrs, text in found if kind in (attrs.get("class") or "").split() or not kind]

    def titles(self, kind: str) -> list[str]:
        return [a["title"] for name, a, _ in self.elements if name == "span" and kind in a.get("class", "").split()]


def _rows(tokenizer: Tokenizer) -> list[PackedSequence]:
    """A caption (picture regressed) and an edit (one picture seen, one regressed) with padding; then plain text."""
    dog, red = tokenizer.encode("A dog."), tokenizer.encode("Make it red.")
    assert (len(dog), len(red)) == (4, 6)
    picture = [1001, 1003, 1003, 1003, 1003, 1002]
    tokens = [1, *picture, *dog, 2, 1, *picture, *red, *picture, 2, *[1000] * 8]
    roles = [32, 0, 5, 5, 5, 5, 0, 2, 2, 2, 2, 2, 32, 0, 1, 1, 1, 1, 0, *[0] * 6, 0, 5, 5, 5, 5, 0, 0, 96, *[64] * 7]
    features = Features(torch.zeros(4, 56), "f")
    first = PackedSequence(
        np.array(tokens), np.array(roles, dtype=np.uint8), [RED, features, RED // 2], [4, 4, 4], ["a/dog", "edit"]
    )
    text = tokenizer.encode("la fenêtre, 一只猫 <script>alert('dog')</script> & \"so\" on\nhttps")
    whole = [1, *text, 2]
    roles_S = np.array([32, *[2] * (len(whole) - 1)], dtype=np.uint8)
    return [first, PackedSequence(np.array(whole), roles_S, keys=["<img src=x onerror=alert(1)>"])]


@pytest.fixture
def rows(tokenizer: Tokenizer) -> list[PackedSequence]:
    return _rows(tokenizer)


def test_counts(rows: list[PackedSequence], tokenizer: Tokenizer, make_config: Callable[..., Config]) -> None:
    assert tally(rows[0]) == {
        "samples": 2, "tokens": 32, "padding": 8, "text targets": 5, "pictures": 3, "embeddings": 12, "regressed": 8,
    }  # fmt: skip
    n = len(rows[1].tokens_S)
    reader = Reader(page(rows, tokenizer, make_config(), {"read": 12345, "skipped": {"file is empty": 2}}))
    cells = [cell for cell in reader.all("td") if not cell.startswith(("context", "text", "reg"))]
    numbers = [cell for cell in cells if cell]
    assert numbers[:8] == ["0", "2", "32", "8", "5", "3", "12", "8"]
    assert numbers[8:16] == ["1", "1", str(n), "0", str(n - 1), "0", "0", "0"]
    assert numbers[16:] == ["all", "3", str(32 + n), "8", str(5 + n - 1), "3", "12", "8"]
    assert reader.all("dt") == ["read", "skipped", "file is empty"]
    assert reader.all("dd") == ["12,345", "file is empty2", "2"]


def test_a_sample_token_by_token(
    rows: list[PackedSequence], tokenizer: Tokenizer, make_config: Callable[..., Config]
) -> None:
    reader = Reader(page(rows[:1], tokenizer, make_config(), {}))
    assert reader.all("header") == ["a/dog12 tokens", "edit20 tokens"]
    dog, edit = reader.all("div", "flow")
    assert dog == "<s>[IMG]4 regressed[/IMG] A dog.</s>"
    assert (
        edit
        == "<s>[IMG]features 4 × 56, computed beforehand4 visual input[/IMG] Make it red.[IMG]4 regressed[/IMG]</s>"
    )
    pieces = ["▁A", "▁do", "g", ".", "</s>"]
    ids = [*tokenizer.encode("A dog."), 2]
    assert reader.titles("target") == [f"{p} · {i} · text target" for p, i in zip(pieces, ids, strict=True)]
    assert reader.titles("context")[:3] == ["<s> · 1 · context", "[IMG] · 1001 · context", "[/IMG] · 1002 · context"]
    assert reader.all("span", "padding") == ["[PAD] × 8"]


def test_bar_is_the_row_in_order(
    rows: list[PackedSequence], tokenizer: Tokenizer, make_config: Callable[..., Config]
) -> None:
    reader = Reader(page(rows[:1], tokenizer, make_config(), {}))
    runs = [(int(a["x"]), int(a["width"])) for name, a, _ in reader.elements if name == "rect"]
    wanted = [(0, 2), (2, 4), (6, 1), (7, 5), (12, 2), (14, 4), (18, 8), (26, 4), (30, 2), (32, 8)]
    assert runs == wanted * 2  # in the table and at the row
    assert [a["x1"] for name, a, _ in reader.elements if name == "line"] == ["12", "32"] * 2


def test_pictures_are_in_the_page(
    rows: list[PackedSequence], tokenizer: Tokenizer, make_config: Callable[..., Config]
) -> None:
    reader = Reader(page(rows, tokenizer, make_config(), {}))
    sources = [attrs["src"] for _, attrs, _ in reader.elements if "src" in attrs]
    assert len(sources) == 2
    for source, colour in zip(sources, ((200, 30, 40), (100, 15, 20)), strict=True):
        kind, _, data = source.partition(",")
        assert kind == "data:image/jpeg;base64"
        pixel = Image.open(io.BytesIO(base64.b64decode(data))).getpixel((4, 4))
        assert np.abs(np.array(pixel) - colour).max() <= 6


def test_nothing_runs_and_nothing_is_loaded(
    rows: list[PackedSequence], tokenizer: Tokenizer, make_config: Callable[..., Config]
) -> None:
    html = page(rows, tokenizer, make_config(), {"<script>alert(2)</script>": "<b>bold</b> & {'a': \"b\"}"})
    reader = Reader(html)
    used = {name for name, _, _ in reader.elements}
    assert not used & {"script", "link", "iframe", "object", "embed", "base", "form", "use", "image"}
    attributes = [(name, value) for _, attrs, _ in reader.elements for name, value in attrs.items()]
    assert not [name for name, _ in attributes if name.startswith("on") or name in ("srcset", "action", "data")]
    assert {value[:1] for name, value in attributes if name == "href"} == {"#"}
    assert {value[:5] for name, value in attributes if name == "src"} == {"data:"}
    style = "".join(reader.all("style"))
    assert "url(" not in style and "@import" not in style
    assert "://" not in html
    assert reader.all("header")[-1].startswith("<img src=x onerror=alert(1)>")
    assert reader.all("dt") == ["<script>alert(2)</script>"]
    assert reader.all("dd") == ["<b>bold</b> & {'a': \"b\"}"]


def test_french_and_chinese_are_characters(
    rows: list[PackedSequence], tokenizer: Tokenizer, make_config: Callable[..., Config]
) -> None:
    reader = Reader(page(rows[1:], tokenizer, make_config(), {}))
    (text,) = reader.all("div", "flow")
    assert text == "<s> la fenêtre, 一只猫 <script>alert('dog')</script> & \"so\" on↵\nhttps</s>"
    titles = reader.titles("target")
    assert "<0xE4><0xB8><0x80> · 231 187 131 · text target" in titles
    single = [int(i) for i in rows[1].tokens_S[1:] if not tokenizer.piece(int(i)).startswith("<0x")]
    assert any('"' in tokenizer.piece(i) for i in single) and any("<" in tokenizer.piece(i) for i in single)
    assert [title for title in titles if "<0x" not in title] == [
        f"{tokenizer.piece(i)} · {i} · text target" for i in single
    ]


def test_bytes_that_are_no_character(tokenizer: Tokenizer, make_config: Callable[..., Config]) -> None:
    """A conversation cut within a character; two characters; a byte that begins none."""
    cat = [i for i in tokenizer.encode("猫") if i != tokenizer.encode("a b")[0]][-3:]
    for tokens, wanted in ((cat[:2], "�"), (cat + cat, "猫猫"), ([*cat[1:2], *cat], "�猫"), (cat[:1] * 2, "��")):
        row = PackedSequence(np.array([1, *tokens]), np.array([32, *[2] * len(tokens)], dtype=np.uint8), keys=["k"])
        assert Reader(page([row], tokenizer, make_config(), {})).all("div", "flow") == [f"<s>{wanted}"]


def test_boxes_are_drawn(tokenizer: Tokenizer, make_config: Callable[..., Config]) -> None:
    bins = [26, 22, 112, 202, 0, 112, 56, 168]
    tokens = [1, 1001, 1003, 1002, 1008, 1011, *[1015 + i for i in bins], 1012, 2]
    roles = np.array([32, 0, 5, *[2] * (len(tokens) - 3)], dtype=np.uint8)
    row = PackedSequence(np.array(tokens), roles, [RED], [1], ["k"])
    reader = Reader(page([row], tokenizer, make_config(), {}))
    drawn = [
        tuple(int(a[k]) for k in ("x", "y", "width", "height"))
        for n, a, _ in reader.elements
        if n == "rect" and "y" in a
    ]
    assert drawn == [(26, 22, 86, 180), (0, 112, 56, 56)]
    assert "loc026loc022loc112loc202" in reader.all("div", "flow")[0]


def test_no_rows(tokenizer: Tokenizer, make_config: Callable[..., Config]) -> None:
    reader = Reader(page([], tokenizer, make_config(), {"skipped": {}}))
    assert reader.all("h1") == ["0 packed sequences of 64 tokens"]
    assert reader.all("dd") == ["none"]


def test_piece_of_a_token(tokenizer: Tokenizer, example_data: Path) -> None:
    assert [tokenizer.piece(i) for i in (1, 2, 16, 1003)] == ["<s>", "</s>", "<0x0D>", "<image>"]
    assert [tokenizer.piece(i) for i in tokenizer.encode("A dog.")] == ["▁A", "▁do", "g", "."]
    for token in (-1, tokenizer.vocab_size):
        with pytest.raises(DataError, match="outside the vocabulary"):
            tokenizer.piece(token)
