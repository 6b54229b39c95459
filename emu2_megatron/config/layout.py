"""How many decoder layers each part of the pipeline holds, as given or balanced by cost.

With PP stages of VPP parts each, data flows through parts 0, 1, ... PP * VPP - 1; part i is on stage i mod PP.
"""

from functools import lru_cache

from emu2_megatron.config import flops
from emu2_megatron.config.schema import Config


def part_layers(config: Config) -> list[int]:
    """Number of decoder layers of every part, in the order data flows.

    Precondition: no more parts than layers, and a layout that is given adds up.
    """
    parallel, layers = config.parallel, config.model.decoder.num_layers
    if parallel.pipeline_layout is not None:
        return list(parallel.pipeline_layout)
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    length = config.data.sequence_length
    # As if every token were visual; looking up the others is free. All of it costs twice as much backward.
    projection = length * flops.projection_forward(config.model)
    vocabulary = length * flops.vocabulary_forward(config.model)
    layer = flops.layer_forward(config.model, length)
    return list(balanced(layers, stages, virtual, layer, projection, projection + vocabulary))


@lru_cache  # a plan asks for the same few thousands of times
def balanced(layers: int, stages: int, virtual: int, layer: int, first: int, last: int) -> tuple[int, ...]:
    """Share out layers so that the slowest stage, which sets the pace of a pipeline, is as fast as can be.

    Every part gets one layer. Each further one goes to the stage with the least cost so far, and there to the part with
    the least; of equals to the later one, because earlier stages hold more activations.

    No layout has a faster slowest stage. Say stage A is it, with cost M, and had c before its last layer, the least of
    all then. A layout below M gives A fewer layers, so some other stage j more than here, which costs it at least what
    it had then, c or more, and a layer on top: M or more. The same holds for the parts of a stage.

    Args:
        layers: decoder layers, at least `stages * virtual`.
        stages: pipeline stages.
        virtual: parts of each.
        layer: cost of a layer.
        first, last: what the first and the last part cost besides.

    Returns:
        Layers of each part, in the order data flows.
    """
    parts = stages * virtual
    counts, costs = [1] * parts, [layer] * parts
    costs[0] += first
    costs[-1] += last
    for _ in range(layers - parts):
        stage = min(range(stages), key=lambda s: (sum(costs[s::stages]), -s))
        part = min(range(stage, parts, stages), key=lambda p: (costs[p], -p))
        counts[part] += 1
        costs[part] += layer
    return tuple(counts)
