"""Which prompts: the options of `emu2 generate` that say it, and what they mean."""

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu2_megatron.data.filetypes import PICTURE_FORMATS, VIDEO_FORMATS
from emu2_megatron.errors import ConfigError, DataError

if TYPE_CHECKING:
    from emu2_megatron.inference.prompt import Part


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A group of options."""
    prompt = parser.add_argument_group("the prompt")
    prompt.add_argument(
        "prompt",
        nargs="*",
        metavar="PART",
        help=f"text, and files of pictures ({', '.join(PICTURE_FORMATS)}) and videos ({', '.join(VIDEO_FORMATS)}), in "
        "the order in which the model is to read them; few-shot examples likewise. box:LEFT,TOP,RIGHT,BOTTOM (0 to 1) "
        "says where something belongs in the picture wanted",
    )
    prompt.add_argument(
        "--prompts",
        metavar="FILE",
        help="many prompts, one JSON a line (- is standard input): "
        '{"content": [{"image": "dog.jpg"}, {"text": "..."}]}, or {"system": "...", "turns": [{"user": "...", '
        '"assistant": "..."}, {"user": [{"image": "dog.jpg"}, {"text": "..."}]}]}; files relative to FILE. Answers '
        "come as JSON lines",
    )
    prompt.add_argument("--chat", action="store_true", help="the prompt is what a user says to a chat model")
    prompt.add_argument(
        "--system", metavar="TEXT", help="chat: the message before it; default: Emu2-Chat's, for grounding the concise"
    )
    prompt.add_argument("--grounding", action="store_true", help="ask for boxes, and print them")
    prompt.add_argument("--frames", type=int, default=8, metavar="N", help="of each video (default %(default)s)")
    prompt.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default %(default)s)")


def check(options: argparse.Namespace) -> None:
    """Raise ConfigError unless the options name prompts, and one way only."""
    if options.batch_size < 1 or options.frames < 1:
        raise ConfigError("--batch-size and --frames: legal are numbers from 1")
    if bool(options.prompt) == bool(options.prompts):
        raise ConfigError("give either a prompt or --prompts FILE")


def read(options: argparse.Namespace, is_chat: bool) -> "list[list[Part]]":
    """The parts of each prompt.

    Args:
        options: parsed.
        is_chat: whether the model knows conversations.

    Raises:
        DataError: a file of prompts cannot be read, or something in it or in a prompt has another form.
        ConfigError: a conversation, for a model that is no chat model.
    """
    from emu2_megatron.inference import records

    if options.prompt:
        parts = [_part(part) for part in options.prompt]
        if options.chat:
            return [records.conversation([(parts, None)], is_chat, options.system, options.grounding)]
        return [[*parts, "<grounding>"] if options.grounding else parts]
    folder = Path() if options.prompts == "-" else Path(options.prompts).parent

    def show(kind: str, name: str) -> Path:
        if kind_of(name) != kind:
            raise DataError(f"{where}: {name} has no extension of {kind} files")
        return folder / name

    prompts = []
    for where, record in _records(options.prompts):
        if options.chat and record.get("content") is not None:
            record["turns"] = [{"user": record["content"]}]
        prompts.append(records.parts(record, where, show, is_chat, options.system, options.grounding))
    return prompts


def kind_of(part: str) -> str:
    """`image` or `video` if a part of a prompt names such a file; a text that merely ends like one has a space."""
    extension = Path(part).suffix[1:].lower()
    if not extension or (any(c.isspace() for c in part) and not Path(part).is_file()):
        return ""
    return "image" if extension in PICTURE_FORMATS else "video" if extension in VIDEO_FORMATS else ""


def _part(part: str) -> "Part":
    from emu2_megatron.inference import records

    if kind_of(part):
        return Path(part)
    if part.startswith("box:") and not any(c.isspace() for c in part):
        try:
            numbers: Any = [float(number) for number in part.removeprefix("box:").split(",")]
        except ValueError:
            numbers = None
        return records.box(numbers, part)
    return part


def _records(file: str) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        lines = sys.stdin.read().splitlines() if file == "-" else Path(file).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {error}") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                record = json.loads(line)
            except ValueError as error:
                raise DataError(f"{file}, line {number}: not JSON ({error})") from error
            if not isinstance(record, dict):
                raise DataError(f"{file}, line {number}: an object with `content` or `turns` is wanted")
            yield f"{file}, line {number}", record
