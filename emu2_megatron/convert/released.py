"""Released tensors by name, wherever they lie."""

from pathlib import Path

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.sources import Released
from emu2_megatron.convert.stored import check_model, open_checkpoint, released_tensors
from emu2_megatron.model.parameters import Source


def source_of(path: Path, model: ModelConfig) -> Source:
    """From a checkpoint, or a released or exported folder or file. Reads only what it is asked for.

    Raises:
        CheckpointError, ConversionError: it is none of these, or another model's.
    """
    if (path / ".metadata").is_file():
        return source_of_checkpoint(path, model)
    return source_of_folder(from_hf.whole(path, model))


def source_of_checkpoint(folder: Path, model: ModelConfig) -> Source:
    """Released tensors by name, from a checkpoint. Reads only what it is asked for.

    Raises:
        CheckpointError, ConversionError: the folder is not a complete checkpoint, or another model's.
    """
    stored = open_checkpoint(folder)
    check_model(stored, model)
    return released_tensors(stored, model)


def source_of_folder(released: Released) -> Source:
    """Released tensors by name, from a folder."""
    return lambda native: released.read(native, Scratch())
