"""A stored sample to tokens, their roles and pictures: the sequence formats of the paper (arXiv 2312.13286).

    caption       <s>[IMG]<image>*Q[/IMG]text</s>   or, at random,   <s>text[IMG]<image>*Q[/IMG]</s>
    interleaved   <s> texts and [IMG]<image>*Q[/IMG] in reading order </s>

Whatever is wrong with a sample is a DataError whose message is "reason: detail"; `reason_of` gives the part that is the
same for all samples with the same fault.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import decode_image
from emu2_megatron.data.features import EXTENSION, read_features
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, Picture
from emu2_megatron.data.shards import RawSample
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.errors import DataError

Part = str | bytes
"""A piece of a sample in reading order: text, or an encoded picture."""


@dataclass
class Sample:
    """One sample ready to be packed; S is its own length, at most the sequence length."""

    key: str
    """Key of the sample in its shard."""
    tokens_S: np.ndarray
    """int64 [S] token ids."""
    roles_S: np.ndarray
    """uint8 [S] bits of `data/sequence.py`."""
    pictures: list[Picture]
    """uint8 [3, H, W] each, RGB; or features in its place."""
    queries: list[int]
    """Visual embeddings of each picture."""


def build_sample(raw: RawSample, tokenizer: Tokenizer, config: Config, epoch: int, index: int) -> Sample:
    """Tokens, roles and pictures of a stored sample.

    Supervised are text and `</s>` (cross-entropy) and `<image>` (regression), not `<s>`, and `[IMG]` and `[/IMG]` only
    with data.supervise_image_markers. A sample longer than data.sequence_length is cut: text at its end, while a
    picture that does not fit whole is dropped with everything after it; a cut sample has no `</s>`.

    Whether a caption follows its picture is drawn from a generator that depends on (training.seed, epoch, index) only.

    Raises DataError ("reason: detail") if the sample does not follow the format of `data/shards.py`, a picture that is
    kept cannot be decoded, or neither text nor picture is left to learn from; FeaturesError as `read_features` does.
    """
    length, queries = config.data.sequence_length, config.model.image_queries
    marker_role = TEXT_TARGET if config.data.supervise_image_markers else 0
    tokens, roles = [tokenizer.bos], [0]
    pictures: list[_Member] = []
    whole = True
    for part in _parts(raw, _image_first(config, epoch, index)):
        if isinstance(part, str):
            text = tokenizer.encode(part)
            kept = text[: length - len(tokens)]
            whole = len(kept) == len(text)
            tokens += kept
            roles += [TEXT_TARGET] * len(kept)
        else:
            whole = len(tokens) + queries + 2 <= length
            if whole:
                tokens += [tokenizer.image_begin, *[tokenizer.image] * queries, tokenizer.image_end]
                roles += [marker_role, *[VISUAL | VISUAL_TARGET] * queries, marker_role]
                pictures.append(part)
        if not whole:
            break
    if len(tokens) == 1:
        raise DataError(f"nothing to learn: {raw.key} has neither text nor a picture within {length} tokens")
    if whole and len(tokens) < length:
        tokens.append(tokenizer.eos)
        roles.append(TEXT_TARGET)
    return Sample(
        key=raw.key,
        tokens_S=np.array(tokens, dtype=np.int64),
        roles_S=np.array(roles, dtype=np.uint8),
        pictures=[
            read_features(raw, name, config)
            if name.endswith(f".{EXTENSION}")
            else decode_image(raw.files[name], config.model.encoder.image_size)
            for (name,) in pictures
        ],
        queries=[queries] * len(pictures),
    )


def reason_of(error: DataError) -> str:
    """What a bad sample suffers from, without the details: the key under which it is counted."""
    return str(error).partition(": ")[0]


def split_document(parts: Iterable[Part], max_words: int, max_pictures: int = 8) -> list[list[Part]]:
    """Cuts a long interleaved document into sub-documents, keeping every word and picture and their order.

    Each holds at most max_words words and max_pictures pictures (8, as the paper takes from MMC4). A Chinese or
    Japanese character counts as a word, so that texts without spaces are cut as well.
    Raises ValueError for limits below 1.
    """
    if max_words < 1 or max_pictures < 1:
        raise ValueError(f"max_words and max_pictures must be at least 1, got {max_words} and {max_pictures}")
    documents: list[list[Part]] = [[]]
    words = pictures = 0
    for part in parts:
        if isinstance(part, bytes):
            if pictures == max_pictures:
                documents.append([])
                words = pictures = 0
            documents[-1].append(part)
            pictures += 1
            continue
        units = _WORD.findall(part.strip())
        while units:
            if words == max_words:
                documents.append([])
                words = pictures = 0
            room = max_words - words
            taken, units = units[:room], units[room:]
            documents[-1].append("".join(taken).rstrip())
            words += len(taken)
    return [document for document in documents if document]


_CJK = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"[{_CJK}]\s*|[^\s{_CJK}]+\s*")  # with the space after it: joined, words are the text again


def _image_first(config: Config, epoch: int, index: int) -> bool:
    # The 1 keeps this stream apart from the permutation's in data/loader.py.
    generator = np.random.default_rng([config.training.seed, 1, epoch, index])
    return bool(generator.random() < config.data.image_first_probability)


class _Member(NamedTuple):
    """A picture of a sample, by its name in it."""

    name: str


def _parts(raw: RawSample, image_first: bool) -> list[str | _Member]:
    kind = raw.meta.get("kind")
    if kind == "caption":
        text, picture = _text(raw, raw.meta), _picture(raw, raw.meta)
        return [picture, text] if image_first else [text, picture]
    if kind == "interleaved":
        content = raw.meta.get("content")
        if not isinstance(content, list):
            raise _malformed(raw, "an interleaved sample needs a list `content`")
        return [_part(raw, item) for item in content]
    raise _malformed(raw, f"kind is {kind!r}, known are 'caption' and 'interleaved'")


def _part(raw: RawSample, item: object) -> str | _Member:
    if isinstance(item, dict) and ("text" in item) != ("image" in item):
        return _text(raw, item) if "text" in item else _picture(raw, item)
    raise _malformed(raw, 'every item of `content` is {"text": ...} or {"image": ...}')


def _text(raw: RawSample, item: dict[str, object]) -> str:
    text = item.get("text")
    if not isinstance(text, str) or not text.strip():
        raise _malformed(raw, "`text` is missing, empty or not a string")
    return text


def _picture(raw: RawSample, item: dict[str, object]) -> _Member:
    name = item.get("image")
    if not isinstance(name, str) or name not in raw.files:
        raise _malformed(raw, f"`image` is {name!r}, its pictures are {sorted(raw.files)}")
    return _Member(name)


def _malformed(raw: RawSample, detail: str) -> DataError:
    return DataError(f"sample does not follow the format: {raw.key}: {detail}")
