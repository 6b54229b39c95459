"""`emu2 generate`: its options, and what it does."""

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from emu2_megatron.data.filetypes import PICTURE_FORMATS, VIDEO_FORMATS
from emu2_megatron.errors import ConfigError, DataError
from emu2_megatron.inference import model_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emu2 generate`."""
    model_options.add_arguments(parser)
    prompt = parser.add_argument_group("the prompt")
    prompt.add_argument(
        "prompt",
        nargs="*",
        metavar="PART",
        help=f"text, and files of pictures ({', '.join(PICTURE_FORMATS)}) and videos ({', '.join(VIDEO_FORMATS)}), in "
        "the order in which the model is to read them; few-shot examples likewise",
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

    answer = parser.add_argument_group("the answer")
    answer.add_argument(
        "--image", type=Path, metavar="FILE", help="continue with a picture: write its visual embeddings (safetensors)"
    )
    answer.add_argument(
        "--draw-boxes", type=Path, metavar="PNG", help="ask for boxes and draw them on the prompt's last picture"
    )
    answer.add_argument("--max-new-tokens", type=int, default=64, metavar="N", help="at most (default %(default)s)")
    answer.add_argument("--min-new-tokens", type=int, default=1, metavar="N", help="at least (default %(default)s)")
    answer.add_argument("--beams", type=int, metavar="N", help="beam search; 1 is greedy (default 5; 1 when sampling)")
    answer.add_argument(
        "--length-penalty",
        type=float,
        default=-1.0,
        metavar="X",
        help="of beams: below 0 favours short answers (default %(default)s, as released)",
    )
    answer.add_argument(
        "--temperature", type=float, default=0.0, metavar="X", help="above 0: draw tokens (default %(default)s)"
    )
    answer.add_argument("--top-p", type=float, default=1.0, metavar="X", help="when drawing: of the likeliest share")
    answer.add_argument("--top-k", type=int, default=0, metavar="N", help="when drawing: of the N likeliest")
    answer.add_argument("--seed", type=int, default=0, metavar="N", help="when drawing (default %(default)s)")
    answer.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at once (default %(default)s)")


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """`emu2 generate`, alone or as one of torchrun's ranks.

    Args:
        options: parsed.
        arguments: as they were given, for ranks that are to be started.
    """
    processes = model_options.ranks_to_start(options)
    if options.batch_size < 1 or options.frames < 1:
        raise ConfigError("--batch-size and --frames: legal are numbers from 1")
    if bool(options.prompt) == bool(options.prompts):
        raise ConfigError("give either a prompt or --prompts FILE")
    if options.draw_boxes and options.prompts:
        raise ConfigError("--draw-boxes: takes a single prompt, not --prompts")
    if options.draw_boxes and not any(_kind(part) == "image" for part in options.prompt):
        raise ConfigError("--draw-boxes: the prompt has no picture to draw on")
    options.grounding = options.grounding or options.draw_boxes is not None

    from emu2_megatron.inference.prompt import encode
    from emu2_megatron.inference.search import Options

    default_beams = 1 if options.temperature > 0 else 5
    search = Options(
        max_new_tokens=options.max_new_tokens, min_new_tokens=options.min_new_tokens,
        beams=default_beams if options.beams is None else options.beams, length_penalty=options.length_penalty,
        temperature=options.temperature, top_p=options.top_p, top_k=options.top_k, seed=options.seed,
    )  # fmt: skip
    found, tokenizer = model_options.find(options)
    asked = _prompts(options, is_chat="[USER]" in tokenizer.ids)
    prompts = [encode(parts, tokenizer, found.config.model, options.frames) for parts in asked]
    if processes:
        from emu2_megatron.training.launch import start_ranks

        start_ranks(arguments, processes)
        return 0

    from emu2_megatron.parallel import topology

    model = found.load()
    first = model.here.rank == 0
    batches = [prompts[i : i + options.batch_size] for i in range(0, len(prompts), options.batch_size)]
    try:
        if options.image is not None:
            _images(model, batches, tokenizer.image_begin, options.image if first else None)
        else:
            _texts(model, batches, tokenizer, search, options, first)
    finally:
        topology.stop()
    return 0


def _images(model: Any, batches: list[Any], image_begin: int, file: Path | None) -> None:
    import torch
    from safetensors.torch import save_file

    from emu2_megatron.inference.generate import generate_image

    images = torch.cat([generate_image(model, batch, image_begin).cpu() for batch in batches])
    if file is not None:
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file({"embeddings": images.contiguous()}, file)
        print(f"wrote {file}: embeddings {list(images.shape)}")


def _texts(
    model: Any, batches: list[Any], tokenizer: Any, search: Any, options: argparse.Namespace, first: bool
) -> None:
    from emu2_megatron.inference import boxes
    from emu2_megatron.inference.generate import generate
    from emu2_megatron.inference.prompt import to_text

    for batch in batches:
        for tokens in generate(model, batch, search):
            said = boxes.parse(to_text(tokens, tokenizer, keep_added=True)) if options.grounding else []
            answer = to_text(tokens, tokenizer)
            if not first:
                continue
            if options.prompts:
                record = {"text": answer, "boxes": [{"phrase": g.phrase, "boxes": g.boxes} for g in said]}
                print(json.dumps(record if options.grounding else {"text": answer}, ensure_ascii=False), flush=True)
                continue
            print(answer)
            for grounded in said:
                for box in grounded.boxes:
                    print(f"{grounded.phrase or 'box'}: " + " ".join(f"{share:.3f}" for share in box))
            if options.draw_boxes:
                _draw(said, options)


def _draw(said: list[Any], options: argparse.Namespace) -> None:
    from PIL import Image

    from emu2_megatron.inference import boxes

    picture = next(part for part in reversed(options.prompt) if _kind(part) == "image")
    with Image.open(picture) as opened:
        options.draw_boxes.parent.mkdir(parents=True, exist_ok=True)
        boxes.draw(opened, said).save(options.draw_boxes, "PNG")
    print(f"wrote {options.draw_boxes}: {sum(len(g.boxes) for g in said)} boxes")


def _prompts(options: argparse.Namespace, is_chat: bool) -> Iterator[list[Any]]:
    """The parts of each prompt."""
    from emu2_megatron.inference import records

    if options.prompt:
        parts: list[Any] = [Path(part) if _kind(part) else part for part in options.prompt]
        if options.chat:
            yield records.conversation([(parts, None)], is_chat, options.system, options.grounding)
        else:
            yield [*parts, "<grounding>"] if options.grounding else parts
        return
    folder = Path() if options.prompts == "-" else Path(options.prompts).parent

    def show(kind: str, name: str) -> Path:
        if _kind(name) != kind:
            raise DataError(f"{where}: {name} has no extension of {kind} files")
        return folder / name

    for where, record in _records(options.prompts):
        if options.chat and record.get("content") is not None:
            record["turns"] = [{"user": record["content"]}]
        yield records.parts(record, where, show, is_chat, options.system, options.grounding)


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


def _kind(part: str) -> str:
    """`image` or `video` if a part of a prompt names such a file; a text that merely ends like one has a space."""
    extension = Path(part).suffix[1:].lower()
    if not extension or (any(c.isspace() for c in part) and not Path(part).is_file()):
        return ""
    return "image" if extension in PICTURE_FORMATS else "video" if extension in VIDEO_FORMATS else ""
