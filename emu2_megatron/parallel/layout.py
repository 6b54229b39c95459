"""Which parts of the pipeline a stage holds, and which layers those are; `config/layout.py` says how many each has."""

from emu2_megatron.config.layout import part_layers
from emu2_megatron.config.schema import Config

__all__ = ["first_layer", "part_layers", "parts_of"]


def parts_of(config: Config, stage: int) -> list[int]:
    """The parts that a pipeline stage holds."""
    stages = config.parallel.pipeline_parallel_size
    return list(range(stage, stages * config.parallel.virtual_pipeline_parallel_size, stages))


def first_layer(layers: list[int], part: int) -> int:
    """Global index of a part's first layer."""
    return sum(layers[:part])
