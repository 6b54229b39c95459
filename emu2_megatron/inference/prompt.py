"""Prompts as people write them, text with pictures and videos in it, to tokens and pixels; and tokens to text.

Names of added tokens in a text (`<grounding>`, `<phrase>`, `[USER]`) are those tokens, as in the released code: a
prompt is the user's own. Only the places of embeddings cannot be written, since there would be nothing to put there.
"""

import re
from collections.abc import Iterable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import TypeAlias

import torch
from PIL import Image

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.data import probe
from emu2_megatron.data.conventions import CONCISE
from emu2_megatron.data.decode import decode, prepare
from emu2_megatron.data.filetypes import VIDEO_FORMATS
from emu2_megatron.data.samples import frame_indices
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.data.visuals import BoxPicture, Encoded, EncodedPicture, EncodedVideo
from emu2_megatron.errors import DataError
from emu2_megatron.inference.model import Prompt

Part: TypeAlias = str | Path | Image.Image | EncodedPicture | BoxPicture
"""Text; a file, by its name a picture or a video; an opened picture; what a picture's file contains; or the picture of
a box."""
Turn: TypeAlias = tuple[Sequence[Part], str | None]
"""What the user said, and the answer; None is for the model to give."""

COMPREHENSIVE = "You are a helpful assistant, dedicated to delivering comprehensive and meticulous responses."
"""Emu2-Chat's system message for conversations; CONCISE is that for short answers and for grounding."""

_EMBEDDINGS = ("<image>", "[gIMG]")


def encode(parts: Sequence[Part], tokenizer: Tokenizer, model: ModelConfig, frames: int = 8) -> Prompt:
    """A prompt, from `<s>` on. Texts that follow each other are one text.

    Args:
        parts: few-shot examples are just more of them.
        tokenizer: the model's.
        model: says how many embeddings a picture and a frame have, and the size of pictures.
        frames: taken from each video, evenly spread.

    Raises:
        DataError: a file cannot be read, is damaged or is no picture or video; or a text has a token that it cannot.
    """
    tokens, visual = [tokenizer.bos], [False]
    pictures: list[torch.Tensor] = []
    queries: list[int] = []
    text = ""

    def show(shown: torch.Tensor, token: int, embeddings: int) -> None:
        for picture in shown:
            tokens.extend([tokenizer.image_begin, *[token] * embeddings, tokenizer.image_end])
            visual.extend([False, *[True] * embeddings, False])
            pictures.append(picture)
            queries.append(embeddings)

    def say(ids: list[int]) -> None:
        tokens.extend(ids)
        visual.extend([False] * len(ids))

    for part in [*parts, ""]:
        if isinstance(part, str):
            text += part
            continue
        say(_ids(text, tokenizer))
        text = ""
        if isinstance(part, Image.Image):
            show(prepare(part, model.encoder.image_size)[None], tokenizer.image, model.image_queries)
        elif isinstance(part, EncodedPicture | BoxPicture):
            shown = _decoded(part, model.encoder.image_size, f"picture {len(pictures) + 1}")
            show(shown, tokenizer.image, model.image_queries)
        elif is_video(part):
            say([tokenizer.ids["[VIDEO]"]])
            show(_read(part, model.encoder.image_size, frames), tokenizer.frame, model.frame_queries)
        else:
            show(_read(part, model.encoder.image_size, 0), tokenizer.image, model.image_queries)
    say(_ids(text, tokenizer))
    return Prompt(tokens, visual, pictures, queries)


def chat(turns: Sequence[Turn], system: str | None = None, grounding: bool = False) -> list[Part]:
    """A conversation as Emu2-Chat was trained on it, as parts of a prompt.

    Args:
        turns: from the first on; the last answer is None.
        system: stands first; may be empty. None is the authors': COMPREHENSIVE, for grounding CONCISE.
        grounding: ask for boxes in the answer.
    """
    parts: list[Part] = [system_message(grounding) if system is None else system]
    for said, answer in turns:
        parts += ["[USER]:", *_after_colon(said), "[ASSISTANT]:"]
        if answer is not None:
            parts += [*_after_colon([answer]), "</s>"]
    return [*parts, "<grounding>"] if grounding else parts


def system_message(grounding: bool) -> str:
    """What stands before a conversation unless another message is given."""
    return CONCISE if grounding else COMPREHENSIVE


def to_text(tokens: Iterable[int], tokenizer: Tokenizer, keep_added: bool = False) -> str:
    """What was generated, without added tokens unless they are to be kept (for boxes)."""
    added = set() if keep_added else set(tokenizer.ids.values())
    return tokenizer.decode(token for token in tokens if token not in added).strip()


def is_video(path: Path) -> bool:
    """By its name."""
    return path.suffix[1:].lower() in VIDEO_FORMATS


def is_picture(parts: Sequence[Part]) -> bool:
    """Whether a prompt is exactly one picture, and no text, not even an empty one."""
    (first, *others) = parts or [""]
    return not others and not isinstance(first, str) and not (isinstance(first, Path) and is_video(first))


def _read(path: Path, size: int, frames: int) -> torch.Tensor:
    """uint8 [pictures, 3, size, size] of a picture (frames 0) or video."""
    try:
        data = path.read_bytes()
        video = EncodedVideo(data, frame_indices(probe.video(path.name, data), frames)) if frames else None
    except OSError as error:
        raise DataError(f"{path}: {error.strerror}") from error
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
    return _decoded(video or EncodedPicture(data), size, str(path))


def _decoded(visual: Encoded, size: int, name: str) -> torch.Tensor:
    (pixels,) = decode([visual], size)
    if isinstance(pixels, DataError):
        raise DataError(f"{name}: {pixels}")
    return pixels


def _after_colon(said: Sequence[Part]) -> list[Part]:
    """Without space around its texts but one before the first, unless it begins with an added token or a picture:
    in training no space stands beside those."""
    parts: list[Part] = []
    for part in said:
        if isinstance(part, str) and parts and isinstance(parts[-1], str):
            parts[-1] += part
        else:
            parts.append(part)
    parts = [part.strip() if isinstance(part, str) else part for part in parts]
    first = parts[0] if parts else ""
    if isinstance(first, str) and not re.match(r"\[[A-Z]+\]|<[/a-z]", first):
        parts[:1] = [f" {first}"]
    return parts


def _ids(text: str, tokenizer: Tokenizer) -> list[int]:
    """Between added tokens, each stretch of text is a segment of its own."""
    special = {**tokenizer.ids, "<s>": tokenizer.bos, "</s>": tokenizer.eos}
    ids: list[int] = []
    for piece in _pattern(tuple(special)).split(text):
        if piece in _EMBEDDINGS:
            raise DataError(f"{piece} in a prompt stands for an embedding: give the picture or video itself")
        ids += [special[piece]] if piece in special else tokenizer.encode(piece)
    return ids


@lru_cache
def _pattern(names: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile(f"({'|'.join(map(re.escape, names))})")


__all__ = [
    "COMPREHENSIVE",
    "CONCISE",
    "Part",
    "Turn",
    "chat",
    "encode",
    "is_picture",
    "is_video",
    "system_message",
    "to_text",
]
