"""Tokens and roles of single samples, computed by hand; where long samples are cut; what is refused."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.config.schema import Config
from emu2_megatron.data.samples import build_sample, frame_indices, reason_of
from emu2_megatron.data.sequence import START, TEXT_TARGET, VISUAL, VISUAL_TARGET
from emu2_megatron.data.shards import RawSample
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.data.visuals import EncodedPicture
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
    assert first.roles_S.tolist() == [START, *PICTURE_ROLES, *[2] * n, 2]
    last = build_sample(raw, tokenizer, make_config(image_first_probability=0.0), 0, 0)
    assert last.tokens_S.tolist() == [1, *text, *PICTURE, 2]
    assert last.roles_S.tolist() == [START, *[2] * n, *PICTURE_ROLES, 2]

    for sample in (first, last):
        assert (sample.key, sample.queries) == ("k", [4])
        assert sample.tokens_S.dtype == np.int64 and sample.roles_S.dtype == np.uint8
        assert sample.visuals == [EncodedPicture(raw.files["0.png"])]


def test_markers_are_supervised_on_request(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    config = make_config(image_first_probability=1.0, supervise_image_markers=True)
    roles = build_sample(_caption(make_png()), tokenizer, config, 0, 0).roles_S
    assert roles[:7].tolist() == [START, 2, 5, 5, 5, 5, 2]


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
    assert sample.roles_S.tolist() == [START, *PICTURE_ROLES, *[2] * len(text), *PICTURE_ROLES, *PICTURE_ROLES, 2]
    assert sample.visuals == [EncodedPicture(files[name]) for name in ("1.png", "0.png", "1.png")]
    assert sample.queries == [4, 4, 4]


@pytest.mark.parametrize(
    ("tokens", "pictures", "windows"),
    [  # <s>, the blocks P T P TTT of 6, 1, 6 and 3 tokens, </s>: 18 tokens
        (18, 2, ["PTPTTT."]),  # all of it
        (17, 2, ["PTPTTT", "TPTTT."]),  # the end is cut, or the beginning is left out
        (11, 2, ["PT", "TPTTT", "PTTT."]),  # from T on it does not fit with </s>: the last place is the second picture
        (8, 2, ["PT", "TP", "TTT."]),  # from either picture: it, and one word
        (64, 1, ["PT", "TPTTT."]),  # a second picture ends the first window
        (5, 2, ["", "T", "TTT."]),  # no picture fits, so from a picture there is nothing to learn
    ],
)
def test_windows_of_a_long_document(
    tokenizer: Tokenizer,
    make_config: MakeConfig,
    make_png: MakePng,
    tokens: int,
    pictures: int,
    windows: list[str],
) -> None:
    content = [{"image": "0.png"}, {"text": "the"}, {"image": "0.png"}, {"text": "the the the"}]
    raw = RawSample("k", {"kind": "interleaved", "content": content}, {"0.png": make_png()})
    (the,) = tokenizer.encode("the")
    assert tokenizer.encode("the the the") == [the] * 3
    blocks = {"P": PICTURE, "T": [the], ".": [2]}
    seen = set()
    for index in range(60):  # of at most 4 equally likely windows, one is missed with probability 4 * 0.75^60 < 1e-6
        config = make_config(document_tokens=tokens, document_pictures=pictures)
        try:
            sample = build_sample(raw, tokenizer, config, 0, index)
        except DataError as error:
            assert reason_of(error) == "nothing to learn"
            seen.add("")
            continue
        (found,) = [w for w in windows if sample.tokens_S.tolist() == [1, *(t for b in w for t in blocks[b])]]
        assert len(sample.visuals) == len(sample.queries) == found.count("P")
        seen.add(found)
    assert seen == set(windows)


def test_a_long_text_is_cut_where_the_window_ends(tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    raw = RawSample("k", {"kind": "interleaved", "content": [{"text": "the " * 90}]})
    for index in range(20):
        sample = build_sample(raw, tokenizer, make_config(document_tokens=40), 0, index)
        assert sample.tokens_S.tolist() == [1, *tokenizer.encode("the") * 39]


def test_nothing_after_a_dropped_picture(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    """Text that would still fit is not moved up to where the picture was, and the dropped picture is not looked at."""
    content = [{"text": "the ship"}, {"image": "0.png"}, {"text": "the"}]
    raw = RawSample("k", {"kind": "interleaved", "content": content}, {"0.png": b"not a picture"})
    starts = set()
    for index in range(40):
        try:
            sample = build_sample(raw, tokenizer, make_config(sequence_length=6), 0, index)
        except DataError as error:
            assert reason_of(error) == "nothing to learn"  # began at the picture
            continue
        assert sample.visuals == []
        starts.add(tuple(sample.tokens_S.tolist()))
    assert starts == {(1, *tokenizer.encode("the ship")), (1, *tokenizer.encode("the"), 2)}


@pytest.mark.parametrize("kind", ["caption", "text"])
def test_too_long_for_the_context(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng, kind: str) -> None:
    meta = {"kind": kind, "text": " ".join(["the"] * 30), "image": "0.png"}
    raw = RawSample("k", meta, {"0.png": make_png()})
    length = 32 if kind == "text" else 38
    assert len(build_sample(raw, tokenizer, make_config(sequence_length=length), 0, 0).tokens_S) == length
    with pytest.raises(DataError, match=f"^longer than the context: k has {length} tokens.*{length - 1}$"):
        build_sample(raw, tokenizer, make_config(sequence_length=length - 1), 0, 0)


def test_nothing_to_learn(tokenizer: Tokenizer, make_config: MakeConfig) -> None:
    with pytest.raises(DataError, match="nothing to learn: k has no target") as caught:
        build_sample(RawSample("k", {"kind": "interleaved", "content": []}), tokenizer, make_config(), 0, 0)
    assert reason_of(caught.value) == "nothing to learn"


@pytest.mark.parametrize(
    ("total", "wanted", "frames"),
    [
        (80, 8, (5, 15, 25, 35, 45, 55, 65, 75)), (17, 8, (1, 3, 5, 7, 9, 11, 13, 15)), (8, 8, tuple(range(8))),
        (9, 8, tuple(range(8))), (3, 8, (0, 1, 2)), (0, 8, ()), (100, 3, (16, 49, 82)), (5, 1, (2,)),
    ],
)  # fmt: skip
def test_frames_of_a_video(total: int, wanted: int, frames: tuple[int, ...]) -> None:
    assert frame_indices(total, wanted) == frames


@settings(max_examples=100, deadline=None)
@given(parts=st.lists(st.one_of(st.none(), st.text("ab the 熊", min_size=1)), max_size=8), length=st.integers(1, 60))
def test_invariants_of_any_sample(
    tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng, parts: list[str | None], length: int
) -> None:
    content = [{"image": "0.png"} if part is None else {"text": part} for part in parts]
    raw = RawSample("k", {"kind": "interleaved", "content": content}, {"0.png": make_png(size=(1, 1))})
    config = make_config(sequence_length=length)
    blocks = [PICTURE if part is None else tokenizer.encode(part.strip()) for part in parts]
    full = [1, *(token for block in blocks for token in block), 2]
    try:
        sample = build_sample(raw, tokenizer, config, 0, 0)
    except DataError as error:
        blank = any(part is not None and not part.strip() for part in parts)
        assert reason_of(error) == ("sample does not follow the format" if blank else "nothing to learn")
        assert blank or not parts or length == 1 or (None in parts and length < 7)
        return
    tokens, roles = sample.tokens_S.tolist(), sample.roles_S
    assert 1 < len(tokens) == len(roles) <= length
    assert roles[0] == START and tokens[0] == tokenizer.bos
    visual = sample.tokens_S == tokenizer.image
    assert np.array_equal(roles == VISUAL | VISUAL_TARGET, visual)
    text = sample.tokens_S < 1000  # pieces and </s>; the first token is <s>
    text[0] = False
    assert np.array_equal(roles == TEXT_TARGET, text)
    assert not roles[1:][~visual[1:] & ~text[1:]].any()
    assert sum(sample.queries) == visual.sum() and len(sample.queries) == len(sample.visuals)
    if len(full) <= length and parts.count(None) <= 8:
        assert tokens == full
    else:  # a run of the whole that begins where a block begins
        starts = np.cumsum([1, *map(len, blocks)]).tolist()
        assert any(tokens[1:] == full[start : start + len(tokens) - 1] for start in starts)
        assert tokens[-1] == 2 or length - len(tokens) < len(PICTURE)  # only a picture can leave room


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


def test_what_is_no_picture_and_no_text(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng) -> None:
    with pytest.raises(DataError, match="^file does not match its extension: 0.png is no picture"):
        build_sample(_caption(b"junk"), tokenizer, make_config(), 0, 0)
    with pytest.raises(DataError, match="^text is not valid Unicode: "):
        build_sample(_caption(make_png(), "\udc80"), tokenizer, make_config(), 0, 0)


@pytest.mark.parametrize("kind", ["grounded", "generation"])
def test_a_size_beyond_all_numbers(tokenizer: Tokenizer, make_config: MakeConfig, make_png: MakePng, kind: str) -> None:
    phrase = {"phrase": "the", "boxes": [[0.5, 0, 3, 4]], "box": [0.5, 0, 3, 4], "image": "0.png"}
    meta = {"kind": kind, "image": "0.png", "target": "0.png", "width": 10**400, "height": 5, "content": [phrase]}
    with pytest.raises(DataError, match="^sample does not follow the format: k: `width` is no size"):
        build_sample(RawSample("k", meta, {"0.png": make_png()}), tokenizer, make_config(), 0, 0)
