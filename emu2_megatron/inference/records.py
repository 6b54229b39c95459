"""Prompts as JSON: a line of `emu2 generate --prompts`, or what the page of `emu2 serve` asks.

{"content": [{"image": ...}, {"text": ...}, {"box": [...]}]}, or
{"system": ..., "turns": [{"user": ..., "assistant": ...}, ...]}
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from emu2_megatron.data.visuals import BoxPicture
from emu2_megatron.errors import ConfigError, DataError
from emu2_megatron.inference.prompt import Part, Turn, chat

Show: TypeAlias = Callable[[str, str], Part]
"""`image` or `video`, and the string that stands for one, to a part of a prompt."""


def parts(
    record: dict[str, Any], where: str, show: Show, is_chat: bool, system: str | None = None, grounding: bool = False
) -> list[Part]:
    """The parts of the prompt that a record asks for.

    Args:
        record: with `turns`, or else `content`.
        where: it stands, for messages.
        show: makes a picture or a video of what the record says.
        is_chat: whether the model knows conversations.
        system: stands before `turns` that have none of their own.
        grounding: ask for boxes.

    Raises:
        DataError: the record has another form. ConfigError: `turns`, for a model that is no chat model.
    """
    turns = record.get("turns")
    if turns is None:
        content = _parts(record.get("content"), where, show)
        return [*content, "<grounding>"] if grounding else content
    if not isinstance(turns, list) or not turns or not all(isinstance(turn, dict) for turn in turns):
        raise DataError(f'{where}: `turns` is a list of {{"user": ..., "assistant": ...}}, the last without answer')
    said: list[Turn] = [(_parts(turn.get("user"), where, show), turn.get("assistant")) for turn in turns]
    answers = [answer for _, answer in said]
    if answers[-1] is not None or not all(isinstance(answer, str) for answer in answers[:-1]):
        raise DataError(f"{where}: every turn but the last has an `assistant`, and only those")
    system = record.get("system", system)
    if not isinstance(system, str | None):
        raise DataError(f"{where}: `system` is a text")
    return conversation(said, is_chat, system, grounding)


def conversation(turns: Sequence[Turn], is_chat: bool, system: str | None, grounding: bool) -> list[Part]:
    """`prompt.chat`, if the model knows conversations; else a ConfigError."""
    if not is_chat:
        raise ConfigError("--chat, or `turns`: the model has no [USER] and [ASSISTANT], it is no chat model")
    return chat(turns, system, grounding)


def box(numbers: Any, where: str) -> BoxPicture:
    """A part of a prompt that says where something belongs.

    Args:
        numbers: left, top, right and bottom as shares of the picture's width and height.
        where: they stand, for messages.

    Raises:
        DataError: they are anything else.
    """
    if not isinstance(numbers, list) or len(numbers) != 4 or not all(type(n) in (int, float) for n in numbers):
        raise DataError(f"{where}: a box is four numbers: left, top, right, bottom, from 0 to 1")
    x0, y0, x1, y1 = map(float, numbers)
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise DataError(f"{where}: the box {numbers} is none: left < right and top < bottom, all from 0 to 1")
    return BoxPicture((x0, y0, x1, y1))


def _parts(content: Any, where: str, show: Show) -> list[Part]:
    """Of a text, or a list of texts, pictures, videos and boxes."""
    if isinstance(content, str):
        return [content]
    found: list[Part] = []
    items: list[Any] = content if isinstance(content, list) else [{}]
    for item in items:
        kinds = [kind for kind in ("text", "image", "video", "box") if isinstance(item, dict) and kind in item]
        if kinds == ["box"]:
            found.append(box(item["box"], where))
            continue
        if len(kinds) != 1 or not isinstance(item[kinds[0]], str):
            raise DataError(
                f'{where}: wanted is text, or a list of {{"text": ...}}, {{"image": ...}}, {{"video": ...}} and '
                '{"box": [...]}'
            )
        value = item[kinds[0]]
        found.append(value if kinds[0] == "text" else show(kinds[0], value))
    return found
