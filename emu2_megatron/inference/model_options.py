"""Which model: the options that `emu2 generate` and `emu2 serve` have in common, and what they mean."""

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from emu2_megatron.config.validate import PRECISIONS
from emu2_megatron.errors import ConfigError

if TYPE_CHECKING:
    from emu2_megatron.data.tokenizer import Tokenizer
    from emu2_megatron.inference.load import Found


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """A group of options."""
    model = parser.add_argument_group("the model")
    model.add_argument("--checkpoint", type=Path, metavar="DIR", help="a checkpoint of any layout, as step_00000400")
    model.add_argument("--model", type=Path, metavar="DIR", help="or an exported or released Hugging Face folder")
    model.add_argument(
        "--config", metavar="NAME_OR_FILE", help="the checkpoint's run's configuration; default: its config.yaml"
    )
    model.add_argument("--tokenizer", type=Path, metavar="FILE", help="SentencePiece file; default: the model's")
    model.add_argument("--precision", choices=PRECISIONS, help="default: the run's, or the folder's")
    for name in ("tensor", "pipeline"):
        model.add_argument(
            f"--{name}-parallel-size", type=int, default=1, metavar="N", help="default %(default)s; starts the ranks"
        )


def ranks_to_start(options: argparse.Namespace) -> int:
    """How many ranks this process has to start; 0 if it is one itself.

    Raises:
        ConfigError: it is one of another number than the layout has.
    """
    processes: int = options.tensor_parallel_size * options.pipeline_parallel_size
    started = os.environ.get("WORLD_SIZE")
    if started is None:
        return processes if processes > 1 else 0
    if int(started) != processes:
        raise ConfigError(
            f"{started} processes, but tensor_parallel_size {options.tensor_parallel_size} x pipeline_parallel_size "
            f"{options.pipeline_parallel_size}: legal is their product"
        )
    return 0


def find(options: argparse.Namespace) -> "tuple[Found, Tokenizer]":
    """The model, not loaded yet, and its tokenizer.

    Raises:
        Emu2Error: of `load.find`; ConfigError or DataError: there is no tokenizer, or another model's.
    """
    from emu2_megatron.data.tokenizer import tokenizer_for
    from emu2_megatron.inference import load

    found = load.find(
        options.checkpoint, options.model, options.config, options.tokenizer, options.precision,
        options.tensor_parallel_size, options.pipeline_parallel_size,
    )  # fmt: skip
    if not found.config.data.tokenizer:
        raise ConfigError("--tokenizer: the model comes without one; give the SentencePiece file it was trained with")
    return found, tokenizer_for(found.config)
