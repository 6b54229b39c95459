"""`emu2 generate`: its options, and what it does."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emu2_megatron.errors import ConfigError
from emu2_megatron.inference import film_command, image_command, model_options, prompt_options


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emu2 generate`."""
    model_options.add_arguments(parser)
    prompt_options.add_arguments(parser)
    answer = parser.add_argument_group("text as the answer")
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
    image_command.add_arguments(parser)
    both = parser.add_argument_group("both")
    both.add_argument(
        "--seed",
        type=int,
        default=0,
        metavar="N",
        help="of what is drawn: tokens, or the noise that a picture is painted from (default %(default)s)",
    )


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """`emu2 generate`, alone or as one of torchrun's ranks.

    Args:
        options: parsed.
        arguments: as they were given, for ranks that are to be started.
    """
    if options.video_out is not None:
        return film_command.run(options)
    if image_command.is_wanted(options):
        return image_command.run(options, arguments)
    processes = model_options.ranks_to_start(options)
    prompt_options.check(options)
    if options.draw_boxes and options.prompts:
        raise ConfigError("--draw-boxes: takes a single prompt, not --prompts")
    if options.draw_boxes and not any(prompt_options.kind_of(part) == "image" for part in options.prompt):
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
    asked = prompt_options.read(options, is_chat="[USER]" in tokenizer.ids)
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
        _texts(model, batches, tokenizer, search, options, first)
    finally:
        topology.stop()
    return 0


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

    picture = next(part for part in reversed(options.prompt) if prompt_options.kind_of(part) == "image")
    with Image.open(picture) as opened:
        options.draw_boxes.parent.mkdir(parents=True, exist_ok=True)
        boxes.draw(opened, said).save(options.draw_boxes, "PNG")
    print(f"wrote {options.draw_boxes}: {sum(len(g.boxes) for g in said)} boxes")
