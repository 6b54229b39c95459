"""A stored sample to tokens, their roles and what it shows; nothing is decoded here.

`data/formats.py` says what the kinds look like. Whatever is wrong with a sample is a DataError whose message is
"reason: detail"; `reason_of` gives the part that is the same for all samples with the same fault.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from emu2_megatron.config.schema import Config
from emu2_megatron.data import probe
from emu2_megatron.data.features import EXTENSION, read_features
from emu2_megatron.data.formats import Piece, Show, Text, Token, format_of, malformed
from emu2_megatron.data.sequence import START, TEXT_TARGET, VISUAL, VISUAL_TARGET
from emu2_megatron.data.shards import RawSample
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.data.visuals import BoxPicture, EncodedPicture, EncodedVideo, Visual
from emu2_megatron.errors import DataError


@dataclass(frozen=True)
class Sample:
    """One sample ready to be packed; S is its own length, at most the sequence length."""

    key: str
    """Key of the sample in its shard."""
    tokens_S: np.ndarray
    """int64 [S] token ids."""
    roles_S: np.ndarray
    """uint8 [S] bits of `data/sequence.py`."""
    visuals: list[Visual]
    """What it shows, not decoded, in the order of its visual tokens."""
    queries: list[int]
    """Visual embeddings of each picture; a video is as many pictures as frames are taken from it."""


@dataclass(frozen=True)
class _Block:
    """A piece as tokens."""

    tokens: list[int]
    roles: list[int]
    show: Show | None = None
    queries: tuple[int, ...] = ()
    frames: tuple[int, ...] = ()


def build_sample(raw: RawSample, tokenizer: Tokenizer, config: Config, epoch: int, index: int) -> Sample:
    """Tokens, roles and encoded pictures of a stored sample.

    What is drawn at random (the order of picture and text, of phrase and box, frames, the window of a document) depends
    on (training.seed, epoch, index) alone.

    Args:
        raw: the sample.
        epoch, index: how often the data was seen before, and the sample's number.

    Raises:
        DataError: "reason: detail"; the sample does not follow its format, is longer than the context, has a picture or
            video that is surely bad, or nothing to learn from.
        FeaturesError: as `read_features` does.
    """
    # The 1 keeps this stream apart from the order of the data.
    draw = np.random.default_rng([config.training.seed, 1, epoch, index])
    form = format_of(raw)
    pieces = form.pieces(raw, config.data, draw)
    frames = config.data.video_frames[draw.integers(len(config.data.video_frames))]
    blocks = [_block(raw, piece, tokenizer, config, frames) for piece in pieces]
    room = config.data.sequence_length - 1
    if form.too_long == "window":
        blocks = _window(blocks, min(room, config.data.document_tokens - 1), config.data.document_pictures, draw)
    elif form.too_long == "cut":
        blocks = _cut(blocks, room)
    elif (length := sum(len(block.tokens) for block in blocks)) > room:
        raise DataError(
            f"longer than the context: {raw.key} has {length + 1} tokens, data.sequence_length is {room + 1}"
        )
    tokens_S = np.array([tokenizer.bos, *(token for block in blocks for token in block.tokens)], dtype=np.int64)
    roles_S = np.array([START, *(role for block in blocks for role in block.roles)], dtype=np.uint8)
    if not ((roles_S & (TEXT_TARGET | VISUAL_TARGET)) > 0)[tokens_S != tokenizer.eos].any():
        raise DataError(f"nothing to learn: {raw.key} has no target within {room + 1} tokens")
    return Sample(
        key=raw.key,
        tokens_S=tokens_S,
        roles_S=roles_S,
        visuals=[_visual(raw, block.show, block.frames, config) for block in blocks if block.show is not None],
        queries=[queries for block in blocks for queries in block.queries],
    )


def reason_of(error: DataError) -> str:
    """What a bad sample suffers from, without the details: the key under which it is counted."""
    return str(error).partition(": ")[0]


def frame_indices(total: int, wanted: int) -> tuple[int, ...]:
    """Frames evenly spread over a video, one in the middle of each of `wanted` equal parts; all of them if there are
    no more. As the authors' demo takes them."""
    if total <= wanted:
        return tuple(range(total))
    part = total // wanted
    return tuple(range(part // 2, total, part))[:wanted]


def _block(raw: RawSample, piece: Piece, tokenizer: Tokenizer, config: Config, frames: int) -> _Block:
    match piece:
        case Text(text, target):
            ids = tokenizer.encode(text)
            return _Block(ids, [TEXT_TARGET * target] * len(ids))
        case Token("</s>", target):
            return _Block([tokenizer.eos], [TEXT_TARGET * target])
        case Token(name, target):
            if name not in tokenizer.ids:
                raise DataError(
                    f"vocabulary has no {name}: {raw.key} is a chat; give it Emu2-Chat's two tokens by a "
                    "model.decoder.vocab_size that is two larger"
                )
            return _Block([tokenizer.ids[name]], [TEXT_TARGET * target])
        case Show():
            return _shown(raw, piece, tokenizer, config, frames)


def _shown(raw: RawSample, piece: Show, tokenizer: Tokenizer, config: Config, frames: int) -> _Block:
    marker = TEXT_TARGET * (piece.markers and config.data.supervise_image_markers)
    role = VISUAL | VISUAL_TARGET * piece.regressed
    if not piece.video:
        queries = config.model.image_queries
        tokens = [tokenizer.image_begin, *[tokenizer.image] * queries, tokenizer.image_end]
        return _Block(tokens, [marker, *[role] * queries, marker], piece, (queries,))
    queries, name = config.model.frame_queries, str(piece.what)
    indices = frame_indices(probe.video(name, raw.files[name]), frames)
    tokens = [tokenizer.image_begin, *[tokenizer.frame] * queries, tokenizer.image_end] * len(indices)
    roles = [marker, *[role] * queries, marker] * len(indices)
    video = tokenizer.ids["[VIDEO]"]
    return _Block([video, *tokens], [marker, *roles], piece, (queries,) * len(indices), indices)


def _visual(raw: RawSample, piece: Show, frames: tuple[int, ...], config: Config) -> Visual:
    """What a piece shows. Only what is kept of a sample is looked at."""
    if isinstance(piece.what, BoxPicture):
        return piece.what
    name, data = piece.what, raw.files[piece.what]
    if piece.video:
        return EncodedVideo(data, frames)
    if name.endswith(f".{EXTENSION}"):
        return read_features(raw, name, config)
    size = probe.picture(name, data)
    if piece.size is not None and piece.size != size:
        raise malformed(raw, f"`width` and `height` are {piece.size}, {name} is {size}: boxes would be misplaced")
    return EncodedPicture(data)


def _window(blocks: Sequence[_Block], room: int, pictures: int, draw: np.random.Generator) -> list[_Block]:
    """All of a document if it fits, else a part that begins at random, among the places from which on it fills the
    window, or the first from which on it fits."""
    tokens_left = np.cumsum([len(block.tokens) for block in reversed(blocks)])[::-1]
    pictures_left = np.cumsum([len(block.queries) for block in reversed(blocks)])[::-1]
    fits = (tokens_left <= room) & (pictures_left <= pictures)
    last = max(0, min(int(np.argmax(fits)), len(blocks) - 2))  # the very last block is `</s>`
    start = 0 if fits[0] else int(draw.integers(last + 1))
    return _cut(blocks[start:], room, pictures)


def _cut(blocks: Sequence[_Block], room: int, pictures: int | None = None) -> list[_Block]:
    """The blocks that fit: a text is cut, a picture or video that does not fit whole is left out, both with all that
    follows."""
    kept: list[_Block] = []
    for block in blocks:
        shown = sum(len(b.queries) for b in kept) + len(block.queries)
        if len(block.tokens) > room or (pictures is not None and shown > pictures):
            if block.show is None:
                kept.append(_Block(block.tokens[:room], block.roles[:room]))
            break
        kept.append(block)
        room -= len(block.tokens)
    return kept
