"""Tokens and roles of single samples, computed by hand; where long samples are cut; what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.config.schema import Config
from emu2_megatron.data.samples import build_sample, reason_of, split_document
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET
from emu2_megatron.data.shards import RawSample
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import DataError

MakeConfig = Callable[..., Config]
MakePng = Callable[..., bytes]

# The demo tokenizer: <s> 1, </s> 2, [IMG] 1001, <image> 1003, [/IMG] 1002; Q = 4.
PICTURE = [1001, 1003, 1003, 1003, 1003, 1002]
PICTURE_ROLES = [0, 5, 5, 5, 5, 0]  # VISUAL | VISUAL_TARGET


def _caption(png: bytes, text: str = "the whale") -> RawSample:
    return RawSample("k", {"kind": "caption", "text": text, "image": "0.png"}, {"0.png": png})


def test_caption_in_both_orders(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    text = tokenizer.encode("the whale")
    n = len(text)
    raw = _caption(make_png((9, 8, 7)))

    first = build_sample(raw, tokenizer, make_config(image_first_probability=1.0), 0, 0)
    assert first.tokens_S.tolist() == [1, *PICTURE, *text, 2]
    assert first.roles_S.tolist() == [0, *PICTURE_ROLES, *[2] * n, 2]
    last = build_sample(raw, tokenizer, make_config(image_first_probability=0.0), 0, 0)
    assert last.tokens_S.tolist() == [1, *text, *PICTURE, 2]
    assert last.roles_S.tolist() == [0, *[2] * n, *PICTURE_ROLES, 2]

    for sample in (first, last):
        assert (sample.key, sample.queries) == ("k", [4])
        assert sample.tokens_S.dtype == np.int64 and sample.roles_S.dtype == np.uint8
        (pixels_3HW,) = sample.pictures
        assert pixels_3HW.shape == (3, 56, 56) and pixels_3HW[:, 0, 0].tolist() == [9, 8, 7]


def test_markers_are_supervised_on_request(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    config = make_config(image_first_probability=1.0, supervise_image_markers=True)
    roles = build_sample(_caption(make_png()), tokenizer, config, 0, 0).roles_S
    assert roles[:7].tolist() == [0, 2, 5, 5, 5, 5, 2]


def test_order_depends_on_seed_epoch_and_index_only(
    tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng
) -> None:
    raw = _caption(make_png(size=(1, 1)), "a")

    def image_first(seed: int, epoch: int, index: int, probability: float = 0.5) -> bool:
        config = make_config(seed=seed, image_first_probability=probability)
        return bool(build_sample(raw, tokenizer, config, epoch, index).tokens_S[1] == tokenizer.image_begin)

    draws = [image_first(7, 0, index) for index in range(400)]
    assert draws == [image_first(7, 0, index) for index in range(400)]
    # Each compared with another seed and epoch: independent draws differ in half of 400 places, standard deviation 10.
    for other in ([image_first(8, 0, i) for i in range(400)], [image_first(7, 1, i) for i in range(400)]):
        assert 140 < sum(a != b for a, b in zip(draws, other, strict=True)) < 260
    # 400 draws at 0.5 and 0.9: 200 +- 10 and 360 +- 6; six standard deviations.
    assert 140 < sum(draws) < 260
    assert 324 < sum(image_first(7, 0, index, 0.9) for index in range(400)) < 396


def test_interleaved_keeps_reading_order(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    content = [{"image": "1.png"}, {"text": "the"}, {"text": "ship"}, {"image": "0.png"}, {"image": "1.png"}]
    files = {"0.png": make_png((0, 0, 0)), "1.png": make_png((1, 1, 1))}
    raw = RawSample("k", {"kind": "interleaved", "content": content}, files)
    sample = build_sample(raw, tokenizer, make_config(), 0, 0)
    # Every text is a segment of its own, as after a special token.
    text = tokenizer.encode("the") + tokenizer.encode("ship")
    assert sample.tokens_S.tolist() == [1, *PICTURE, *text, *PICTURE, *PICTURE, 2]
    assert sample.roles_S.tolist() == [0, *PICTURE_ROLES, *[2] * len(text), *PICTURE_ROLES, *PICTURE_ROLES, 2]
    assert [int(pixels_3HW.max()) for pixels_3HW in sample.pictures] == [1, 0, 1]
    assert sample.queries == [4, 4, 4]


@pytest.mark.parametrize(
    ("length", "kept", "pictures"),
    [  # <s> + picture 6 + "the" 1 + picture 6 + "the the the" 3 + </s> = 18
        (64, 18, 2), (18, 18, 2), (17, 17, 2), (16, 16, 2), (15, 15, 2), (14, 14, 2),
        (13, 8, 1), (9, 8, 1), (8, 8, 1), (7, 7, 1),
    ],
)  # fmt: skip
def test_where_a_long_sample_is_cut(
    tokenizer: Tokenizer,
    make_config: MakeConfig,
    make_png: MakePng,
    length: int,
    kept: int,
    pictures: int,
) -> None:
    content = [{"image": "0.png"}, {"text": "the"}, {"image": "0.png"}, {"text": "the the the"}]
    raw = RawSample("k", {"kind": "interleaved", "content": content}, {"0.png": make_png()})
    sample = build_sample(raw, tokenizer, make_config(sequence_length=length), 0, 0)
    the = tokenizer.encode("the")
    assert len(the) == 1 and tokenizer.encode("the the the") == the * 3
    assert sample.tokens_S.tolist() == [1, *PICTURE, *the, *PICTURE, *the * 3, 2][:kept]
    assert len(sample.pictures) == len(sample.queries) == pictures


def test_nothing_after_a_dropped_picture(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    """Text that would still fit is not moved up to where the picture was, and the dropped picture is not decoded."""
    content = [{"text": "the"}, {"image": "0.png"}, {"text": "the"}]
    raw = RawSample("k", {"kind": "interleaved", "content": content}, {"0.png": b"not decoded"})
    sample = build_sample(raw, tokenizer, make_config(sequence_length=7), 0, 0)
    assert sample.tokens_S.tolist() == [1, *tokenizer.encode("the")]
    assert sample.pictures == []


def test_nothing_left_to_learn(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    too_short = make_config(sequence_length=6, image_first_probability=1.0)
    empty = RawSample("k", {"kind": "interleaved", "content": []})
    for raw, config in ((_caption(make_png()), too_short), (empty, make_config())):
        with pytest.raises(DataError, match="nothing to learn: k has neither") as caught:
            build_sample(raw, tokenizer, config, 0, 0)
        assert reason_of(caught.value) == "nothing to learn"


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.none(), st.text("ab the 熊", min_size=1)), max_size=8), length=st.integers(1, 60))
def test_invariants_of_any_sample(
    tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng, parts: list[str | None], length: int
) -> None:
    content = [{"image": "0.png"} if part is None else {"text": part} for part in parts]
    raw = RawSample("k", {"kind": "interleaved", "content": content}, {"0.png": make_png(size=(1, 1))})
    config = make_config(sequence_length=length)
    try:
        sample = build_sample(raw, tokenizer, config, 0, 0)
    except DataError as error:
        blank = any(part is not None and not part.strip() for part in parts)
        first_is_cut = not parts or length == 1 or (parts[0] is None and length < 7)
        assert reason_of(error) == ("sample does not follow the format" if blank else "nothing to learn")
        assert blank or first_is_cut
        return
    tokens, roles = sample.tokens_S, sample.roles_S
    assert 1 < len(tokens) == len(roles) <= length
    assert roles[0] == 0 and tokens[0] == tokenizer.bos
    visual = tokens == tokenizer.image
    assert np.array_equal(roles == VISUAL | VISUAL_TARGET, visual)
    text = tokens < 1000  # pieces and </s>; the first token is <s>
    text[0] = False
    assert np.array_equal(roles == TEXT_TARGET, text)
    assert not roles[~visual & ~text].any()
    assert sum(sample.queries) == visual.sum() and len(sample.queries) == len(sample.pictures)
    full = [tokenizer.bos]
    for part in parts:
        full += PICTURE if part is None else tokenizer.encode(part)
    full.append(tokenizer.eos)
    assert tokens.tolist() == full[: len(tokens)]  # a cut sample is a beginning of the whole one
    if len(full) <= length:
        assert tokens.tolist() == full
    else:
        assert tokenizer.eos not in tokens
        assert length - len(tokens) < len(PICTURE)  # only a picture can leave room


@pytest.mark.parametrize(
    "meta",
    [
        {}, {"kind": "video"}, {"kind": "caption", "text": "a"}, {"kind": "caption", "image": "0.png"},
        {"kind": "caption", "text": " ", "image": "0.png"}, {"kind": "caption", "text": 5, "image": "0.png"},
        {"kind": "caption", "text": "a", "image": "1.png"}, {"kind": "caption", "text": "a", "image": ["0.png"]},
        {"kind": "interleaved"}, {"kind": "interleaved", "content": "text"}, {"kind": ["caption"]},
        {"kind": "interleaved", "content": ["text"]}, {"kind": "interleaved", "content": [{}]},
        {"kind": "interleaved", "content": [{"text": "a", "image": "0.png"}]},
        {"kind": "interleaved", "content": [{"text": None}]},
    ],
)  # fmt: skip
def test_malformed_samples(
    tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng, meta: dict[str, Any]
) -> None:
    with pytest.raises(DataError, match="^sample does not follow the format: k: "):
        build_sample(RawSample("k", meta, {"0.png": make_png()}), tokenizer, make_config(), 0, 0)


def test_undecodable_picture_and_text(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    with pytest.raises(DataError, match="^picture cannot be decoded: "):
        build_sample(_caption(b"junk"), tokenizer, make_config(), 0, 0)
    with pytest.raises(DataError, match="^text is not valid Unicode: "):
        build_sample(_caption(make_png(), "\udc80"), tokenizer, make_config(), 0, 0)


def test_split_document_by_hand() -> None:
    a, b, c = b"A", b"B", b"C"
    # At most 3 words: the picture stays with the text before it, the rest of a text follows in the next document.
    assert split_document(["one two  three", a, "four", b], 3) == [["one two  three", a], ["four", b]]
    assert split_document([a, "one two three four", b], 3) == [[a, "one two three"], ["four", b]]
    assert split_document([a, b, c, "one"], 9, max_pictures=2) == [[a, b], [c, "one"]]
    assert split_document(["图形桌面 ok"], 3) == [["图形桌"], ["面 ok"]]
    assert split_document(["  "], 3) == split_document([], 3) == []
    with pytest.raises(ValueError, match="at least 1"):
        split_document(["a"], 0)


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=2), st.text("ab \n图"))), st.integers(1, 5), st.integers(1, 3))
def test_split_document_keeps_everything(parts: list[str | bytes], max_words: int, max_pictures: int) -> None:
    documents = split_document(parts, max_words, max_pictures)

    def letters(pieces: list[str | bytes]) -> list[str | bytes]:
        return [c for p in pieces for c in ([p] if isinstance(p, bytes) else "".join(p.split()))]

    assert letters([part for document in documents for part in document]) == letters(parts)
    for document in documents:
        assert 0 < len(document)
        assert sum(isinstance(part, bytes) for part in document) <= max_pictures
        spaced = [part.replace("图", " 图 ").split() for part in document if isinstance(part, str)]
        assert sum(map(len, spaced)) <= max_words and all(spaced)
