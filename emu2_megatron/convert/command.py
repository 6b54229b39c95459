"""`emu2 convert` and the two programs in `tools/`: their options, and what they do."""

import argparse
import re
import sys
from functools import partial
from pathlib import Path

from emu2_megatron.config.schema import Config
from emu2_megatron.errors import ConfigError, ConversionError

DTYPES = ("bf16", "fp16", "fp32")
_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def add_to_hf_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emu2 convert to-hf`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="checkpoint, such as step_00000400"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the Hugging Face folder to be made")
    _add_config(parser)
    parser.add_argument("--no-tokenizer", action="store_true", help="export none")
    _add_common(parser)


def add_to_diffusers_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emu2 convert to-diffusers`."""
    parser.add_argument(
        "--checkpoint", type=Path, required=True, metavar="DIR", help="of the language model, such as step_00000400"
    )
    parser.add_argument(
        "--decoder",
        type=Path,
        required=True,
        metavar="DIR",
        help="what paints: a checkpoint of a run that trained a visual decoder on these embeddings, or a folder with "
        "unet and vae in diffusers' layout",
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="Emu2-Gen's folder, to be made")
    _add_config(parser)
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights; default: as they are")


def add_from_hf_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of `emu2 convert from-hf`."""
    parser.add_argument(
        "--input",
        type=Path,
        metavar="PATH",
        help="released folder of Emu2, Emu2-Chat or Emu2-Gen, an export, or a native file (which needs --config)",
    )
    parser.add_argument("--decoder", type=Path, metavar="PATH", help="LLaMA to start from, with --encoder and --config")
    parser.add_argument("--encoder", type=Path, metavar="PATH", help="EVA-02-CLIP-E-plus to start from, with --decoder")
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="the checkpoint's folder, to be made")
    parser.add_argument(
        "--config", metavar="NAME_OR_FILE", help="says which model; default: the config.json of --input says it"
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="LLaMA's tokenizer.model; default: that of --input or --decoder"
    )
    _add_common(parser)


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        metavar="NAME_OR_FILE",
        help="the run's configuration; default: the config.yaml of the checkpoint's folder, or of its run's",
    )
    parser.add_argument(
        "--tokenizer", type=Path, metavar="FILE", help="SentencePiece file; default: the checkpoint's or the run's"
    )


def _add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--dtype", choices=DTYPES, help="round the weights; default: as they are")
    parser.add_argument(
        "--shard-size", type=_bytes, default=5 * 10**9, metavar="SIZE", help="of a file: 5GB (default), 500MB, ..."
    )
    parser.add_argument(
        "--verify",
        action="store_true",
        help="then compare every tensor of both, and, if two models fit into memory, what they compute",
    )


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMG]i?B|)", text, re.IGNORECASE)
    if match is None or float(match[1]) <= 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no size: write 5GB, 500MB or 1GiB")
    return int(float(match[1]) * _UNITS[match[2].lower()])


def run_to_hf(options: argparse.Namespace) -> int:
    """`emu2 convert to-hf`."""
    config = run_config(options.checkpoint, options.config)
    tokenizer = (
        None
        if options.no_tokenizer
        else _run_tokenizer(options.checkpoint, options.tokenizer, config, ", or --no-tokenizer to export none")
    )

    from emu2_megatron.convert.to_hf import to_hf
    from emu2_megatron.platform.precision import DTYPES as TYPES

    dtype = TYPES[options.dtype] if options.dtype else None
    to_hf(options.checkpoint, options.output, config.model, tokenizer, dtype, options.shard_size)
    print(f"wrote {options.output}")
    if options.verify:
        from emu2_megatron.convert.verify import verify_export

        _tell(verify_export(options.output, options.checkpoint, config.model, dtype))
    return 0


def run_to_diffusers(options: argparse.Namespace) -> int:
    """`emu2 convert to-diffusers`."""
    config = run_config(options.checkpoint, options.config)
    tokenizer = _run_tokenizer(options.checkpoint, options.tokenizer, config, "")

    from emu2_megatron.convert.decoders import decoder_at
    from emu2_megatron.convert.stored import check_model, open_checkpoint
    from emu2_megatron.convert.to_diffusers import to_diffusers
    from emu2_megatron.convert.to_hf import to_hf
    from emu2_megatron.platform.precision import DTYPES as TYPES

    check_model(open_checkpoint(options.checkpoint), config.model)  # before a UNet is read and written
    width = config.model.encoder.hidden_size
    decoder = decoder_at(options.decoder, width)
    dtype = TYPES[options.dtype] if options.dtype else None
    encoder = partial(to_hf, options.checkpoint, model=config.model, tokenizer=tokenizer, dtype=dtype)
    to_diffusers(options.output, config.model, decoder.config, *decoder.load(), encoder, tokenizer, dtype)
    print(f"wrote {options.output}")
    return 0


def run_from_hf(options: argparse.Namespace) -> int:
    """`emu2 convert from-hf`."""
    parts = options.decoder is not None or options.encoder is not None
    if parts == (options.input is not None) or (options.decoder is None) != (options.encoder is None):
        raise ConfigError("give either --input, or --decoder and --encoder")
    if parts and options.config is None:
        raise ConfigError("--config: say which model decoder and encoder become, for example --config stage2")
    from emu2_megatron.config import loading

    config = loading.load(options.config) if options.config else None

    from emu2_megatron.convert import from_hf
    from emu2_megatron.platform.precision import DTYPES as TYPES

    dtype = TYPES[options.dtype] if options.dtype else None
    if parts:
        assert config is not None
        released = from_hf.parts(options.decoder, options.encoder, config.model, config.training.seed)
        beside = options.decoder
    else:
        released, beside = from_hf.whole(options.input, config.model if config else None), options.input
    tokenizer = options.tokenizer or from_hf.find_tokenizer(beside)
    from_hf.write(released, options.output, tokenizer, dtype, options.shard_size)
    print(f"wrote {options.output}" + ("" if tokenizer else ", without a tokenizer: none was found"))
    if options.verify:
        from emu2_megatron.convert.verify import verify_import

        _tell(verify_import(options.output, released))
    return 0


def _tell(lines: list[str]) -> None:
    for line in lines:
        print(line)


def run_config(checkpoint: Path, given: str | None) -> Config:
    """The configuration of the run that wrote a checkpoint: a run has it beside the folder of its checkpoints."""
    from emu2_megatron.config import loading

    if given is not None:
        return loading.load(given)
    folder = checkpoint.resolve()
    places = [parent / "config.yaml" for parent in (folder, folder.parent, folder.parent.parent)]
    for place in places:
        if place.is_file():
            return loading.load(str(place))
    raise ConfigError(f"--config: {checkpoint} has no config.yaml, and neither has its run's folder; give the run's")


def _run_tokenizer(checkpoint: Path, given: Path | None, config: Config, or_else: str) -> Path:
    candidates = [given] if given else [checkpoint / "tokenizer.model", Path(config.data.tokenizer or "/")]
    for path in candidates:
        if path.is_file():
            return path
    named = f"{given} is not there" if given else "neither the checkpoint nor its configuration has a tokenizer"
    raise ConversionError(f"{named}: give --tokenizer FILE{or_else}")


RUN = {"to-hf": run_to_hf, "to-diffusers": run_to_diffusers, "from-hf": run_from_hf}
"""Every direction of `emu2 convert`."""


def main(tool: str, description: str | None, arguments: list[str] | None = None) -> int:
    """One of the two as a program of its own; returns its exit code."""
    from emu2_megatron.errors import Emu2Error

    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    {"to-hf": add_to_hf_arguments, "from-hf": add_from_hf_arguments}[tool](parser)
    try:
        return RUN[tool](parser.parse_args(arguments))
    except Emu2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
