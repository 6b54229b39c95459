"""Where a model for inference comes from: a checkpoint of any layout, or a folder of Hugging Face's form."""

from pathlib import Path

from torch import Tensor

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.sources import Released
from emu2_megatron.convert.stored import check_model, open_checkpoint
from emu2_megatron.model.parameters import Source, stored_parameters


def source_of_checkpoint(folder: Path, model: ModelConfig) -> Source:
    """Released tensors by name, from a checkpoint. Reads only what it is asked for.

    Raises:
        CheckpointError, ConversionError: the folder is not a complete checkpoint, or another model's.
    """
    stored = open_checkpoint(folder)
    check_model(stored, model)
    home = {native: (name, rule, natives)
            for name, (rule, natives) in stored_parameters(model).items() for native in natives}  # fmt: skip
    # q, k and v are asked for one after another, and stored as one tensor.
    latest: dict[str, dict[str, Tensor]] = {}

    def read(native: str) -> Tensor:
        name, rule, natives = home[native]
        if name not in latest:
            latest.clear()
            whole = stored.read(name, Scratch())
            latest[name] = dict(zip(natives, rule.join(model, [whole]), strict=True))
        return latest[name][native]

    return read


def source_of_folder(released: Released) -> Source:
    """Released tensors by name, from a folder."""
    return lambda native: released.read(native, Scratch())
