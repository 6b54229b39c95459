"""Which decoder layers each pipeline stage holds."""

from emu2_megatron.config.schema import Config


def stage_layers(config: Config) -> list[int]:
    """Number of decoder layers of every stage, first to last. Precondition: the configuration is validated."""
    parallel, layers = config.parallel, config.model.decoder.num_layers
    if parallel.pipeline_layout is not None:
        return list(parallel.pipeline_layout)
    return [layers // parallel.pipeline_parallel_size] * parallel.pipeline_parallel_size


def first_layer(stages: list[int], stage: int) -> int:
    """Global index of a stage's first layer."""
    return sum(stages[:stage])
