"""Which decoder layers each part of the pipeline holds.

With PP stages of VPP parts each, data flows through parts 0, 1, ... PP * VPP - 1; part i is on stage i mod PP.
"""

from emu2_megatron.config.schema import Config


def part_layers(config: Config) -> list[int]:
    """Number of decoder layers of every part, in the order data flows. Precondition: the configuration is validated."""
    parallel, layers = config.parallel, config.model.decoder.num_layers
    if parallel.pipeline_layout is not None:
        return list(parallel.pipeline_layout)
    parts = parallel.pipeline_parallel_size * parallel.virtual_pipeline_parallel_size
    return [layers // parts] * parts


def parts_of(config: Config, stage: int) -> list[int]:
    """The parts that a pipeline stage holds."""
    stages = config.parallel.pipeline_parallel_size
    return list(range(stage, stages * config.parallel.virtual_pipeline_parallel_size, stages))


def first_layer(layers: list[int], part: int) -> int:
    """Global index of a part's first layer."""
    return sum(layers[:part])
