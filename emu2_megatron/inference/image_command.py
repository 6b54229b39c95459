"""`emu2 generate --image` and `--image-out`: a picture as the answer, as embeddings or painted.

All ranks regress the embeddings of all prompts. Then the language model goes, and rank 0 alone loads the visual decoder
and paints, one picture after the other: where memory is enough for the language model, it is enough.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from emu2_megatron.errors import ConfigError, DataError
from emu2_megatron.inference import model_options, prompt_options

if TYPE_CHECKING:
    from torch import Tensor

    from emu2_megatron.data.tokenizer import Tokenizer
    from emu2_megatron.inference.load import Found, FoundDecoder
    from emu2_megatron.inference.model import Prompt


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A group of options."""
    picture = parser.add_argument_group("a picture as the answer")
    picture.add_argument(
        "--image", type=Path, metavar="FILE", help="continue with a picture: write its visual embeddings (safetensors)"
    )
    picture.add_argument(
        "--image-out",
        type=Path,
        metavar="PNG",
        help="continue with a picture and paint it; a prompt of one picture and nothing else is painted again from its "
        "own embeddings. With --prompts a folder, of 00000.png and so on",
    )
    picture.add_argument(
        "--video-out",
        type=Path,
        metavar="FILE",
        help="the prompt is one video: paint it again from the embeddings of its frames, as .mp4 or .gif; --decoder is "
        "a checkpoint of a video decoder",
    )
    picture.add_argument(
        "--decoder",
        type=Path,
        metavar="DIR",
        help="what paints: a checkpoint of a visual decoder, a folder of Emu2-Gen, or any with unet and vae in "
        "diffusers' layout; default: --model",
    )
    picture.add_argument(
        "--embeddings", type=Path, metavar="FILE", help="paint what --image has written, without a language model"
    )
    picture.add_argument("--steps", type=int, default=50, metavar="N", help="of the sampler (default %(default)s)")
    picture.add_argument(
        "--guidance",
        type=float,
        default=3.0,
        metavar="X",
        help="how far to lead away from the picture of no prompt (default %(default)s; 1: not at all)",
    )
    picture.add_argument(
        "--size", type=_size, metavar="N|HxW", help="pixels, height first (default: what the decoder was trained on)"
    )


def is_wanted(options: argparse.Namespace) -> bool:
    """Whether a picture is the answer."""
    return any(getattr(options, name) is not None for name in ("image", "image_out", "decoder", "embeddings"))


def run(options: argparse.Namespace, arguments: Sequence[str]) -> int:
    """`emu2 generate`, alone or as one of torchrun's ranks, if a picture is the answer.

    Args:
        options: parsed.
        arguments: as they were given, for ranks that are to be started.
    """
    _check(options)
    if options.embeddings is not None:
        embeddings_BQE, null_BQE = _read(options.embeddings, options.guidance)
        files = _files(options.image_out, len(embeddings_BQE), len(embeddings_BQE) > 1)
        _paint(_decoder(options, embeddings_BQE.shape[2]), embeddings_BQE, null_BQE, files, options)
        return 0
    prompt_options.check(options)

    from emu2_megatron.inference.prompt import encode, is_picture

    processes = model_options.ranks_to_start(options)
    found, tokenizer = model_options.find(options)
    model = found.config.model
    asked = prompt_options.read(options, is_chat="[USER]" in tokenizer.ids)
    if not asked:
        raise DataError(f"{options.prompts}: there are no prompts")
    files, decoder = [], None
    if options.image_out is not None:
        files = _files(options.image_out, len(asked), bool(options.prompts))
        decoder = _decoder(options, model.encoder.hidden_size)
    prompts = [encode(parts, tokenizer, model, options.frames) for parts in asked]
    if processes:
        from emu2_megatron.training.launch import start_ranks

        start_ranks(arguments, processes)
        return 0

    again = [decoder is not None and is_picture(parts) for parts in asked]
    embeddings_BQE, null_BQE = _conditions(found, prompts, again, tokenizer, decoder, options.batch_size)
    if os.environ.get("RANK", "0") != "0":
        return 0
    if decoder is not None:
        _paint(decoder, embeddings_BQE, null_BQE, files, options)
    else:
        _write(options.image, embeddings_BQE, null_BQE[0])
    return 0


def _check(options: argparse.Namespace) -> None:
    rules = (
        (options.image is None or options.image_out is None,
         "give either --image, for embeddings, or --image-out, for a picture"),
        (options.image is not None or options.image_out is not None,
         "--decoder and --embeddings are for painting: give --image-out too"),
        (options.embeddings is None or not (options.prompt or options.prompts),
         "--embeddings stands in the place of a prompt: give one of them"),
        (options.embeddings is None or not options.checkpoint,
         "--embeddings are painted without a language model: give no --checkpoint"),
        (options.embeddings is None or options.tensor_parallel_size * options.pipeline_parallel_size == 1,
         "--embeddings are painted by one process: there is nothing to cut"),
        (not options.grounding and not options.draw_boxes,
         "--grounding and --draw-boxes ask for boxes; for a picture begin the prompt with <grounding>"),
        (1 <= options.steps <= 1000, f"--steps: {options.steps}; legal: 1 to 1000"),
        (math.isfinite(options.guidance), f"--guidance: {options.guidance}; legal: a number"),
        (0 <= options.seed < 2**63, f"--seed: {options.seed}; legal: 0 to 2^63 - 1"),
    )  # fmt: skip
    for holds, problem in rules:
        if not holds:
            raise ConfigError(problem)
    if options.image_out is not None and _decoder_folder(options) is None:
        raise ConfigError("--decoder: give a folder with unet and vae, such as Emu2-Gen's; --model has none")


def _decoder_folder(options: argparse.Namespace) -> Path | None:
    own: Path | None = options.model if options.model is not None and (options.model / "unet").is_dir() else None
    return options.decoder or own


def _decoder(options: argparse.Namespace, width: int) -> "FoundDecoder":
    """For embeddings of a width, and the size that is wanted."""
    from emu2_megatron.inference.load import find_decoder
    from emu2_megatron.model.visual_decoder import downsampling

    folder = _decoder_folder(options)
    assert folder is not None
    found = find_decoder(folder, width, options.precision)
    whole = downsampling(found.config) * 2 ** (len(found.config.unet_channels) - 1)
    for side in options.size or ():
        if side < 1 or side % whole:
            raise ConfigError(f"--size: {'x'.join(map(str, options.size))}; legal: multiples of {whole}")
    return found


def _files(path: Path, count: int, many: bool) -> list[Path]:
    """Where so many pictures go: `path` itself, or, if there may be many, a folder of that name."""
    if not many:
        if path.suffix.lower() != ".png" or path.is_dir():
            raise ConfigError(f"--image-out: {path}; a file that ends with .png is wanted for one picture")
        return [path]
    if path.suffix.lower() == ".png" or path.is_file():
        raise ConfigError(f"--image-out: {path}; a folder is wanted for several pictures")
    return [path / f"{number:05d}.png" for number in range(count)]


def _conditions(
    found: "Found", prompts: "Sequence[Prompt]", again: Sequence[bool], tokenizer: "Tokenizer",
    decoder: "FoundDecoder | None", batch_size: int,
) -> "tuple[Tensor, Tensor]":  # fmt: skip
    """`generate.conditions`; the language model's memory is free afterwards."""
    from emu2_megatron.config.schema import VisualDecoderConfig
    from emu2_megatron.inference.generate import conditions
    from emu2_megatron.parallel import topology

    model = found.load()
    try:
        sizes = decoder.config if decoder is not None else VisualDecoderConfig()
        return conditions(model, prompts, again, tokenizer, sizes, batch_size)
    finally:
        topology.stop()


def _paint(
    decoder: "FoundDecoder", embeddings_BQE: "Tensor", null_BQE: "Tensor", files: Sequence[Path],
    options: argparse.Namespace,
) -> None:  # fmt: skip
    """Prompt i has the seed `--seed` + i, so that its picture can be painted alone."""
    from PIL import Image

    from emu2_megatron.model.paint import paint

    unet, vae = decoder.load()
    for i, file in enumerate(files):
        (picture_HW3,) = paint(
            unet, vae, embeddings_BQE[i : i + 1], null_BQE[i], [options.seed + i], options.size, options.steps,
            options.guidance,
        )  # fmt: skip
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture_HW3.cpu().numpy()).save(file, "PNG")
        except OSError as error:
            raise DataError(f"{file} cannot be written: {error.strerror}") from error
        print(json.dumps({"image": str(file)}) if options.prompts else f"wrote {file}", flush=True)


def _write(file: Path, embeddings_BQE: "Tensor", null_QE: "Tensor") -> None:
    from safetensors.torch import save_file

    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({"embeddings": embeddings_BQE.contiguous(), "null": null_QE.contiguous()}, file)
    print(f"wrote {file}: embeddings {list(embeddings_BQE.shape)}")


def _read(file: Path, guidance: float) -> "tuple[Tensor, Tensor]":
    """Embeddings and null, both [B, Q, E]."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Any] = load_file(file)
    except (OSError, SafetensorError) as error:
        raise DataError(f"{file}: {error}") from error
    embeddings_BQE, null_QE = found.get("embeddings"), found.get("null")
    if embeddings_BQE is None or embeddings_BQE.ndim != 3:
        raise DataError(f"{file} has no `embeddings` [pictures, Q, E]: let `emu2 generate --image` write it")
    if null_QE is None and guidance > 1:
        raise DataError(
            f"{file} has no `null`, from which guidance leads away: let `emu2 generate --image` write it, or give "
            "--guidance 1"
        )
    if null_QE is not None and null_QE.shape != embeddings_BQE.shape[1:]:
        raise DataError(f"{file}: `null` {list(null_QE.shape)} and `embeddings` {list(embeddings_BQE.shape)} differ")
    return embeddings_BQE, (embeddings_BQE[:1] if null_QE is None else null_QE).expand_as(embeddings_BQE)


def _size(text: str) -> tuple[int, int]:
    match = re.fullmatch(r"(\d+)(?:x(\d+))?", text)
    if match is None:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 1024, or 768x1024 (height x width)")
    return int(match[1]), int(match[2] or match[1])
