"""How many decoder layers each part of the pipeline holds, as given or balanced by cost.

With PP stages of VPP parts each, data flows through parts 0, 1, ... PP * VPP - 1; part i is on stage i mod PP.
"""

from emu2_megatron.config.schema import Config


def part_layers(config: Config) -> list[int]:
    """Number of decoder layers of every part, in the order data flows.

    Precondition: no more parts than layers, and a layout that is given adds up.
    """
    parallel, layers = config.parallel, config.model.decoder.num_layers
    if parallel.pipeline_layout is not None:
        return list(parallel.pipeline_layout)
    stages, virtual = parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size
    return balanced(layers, stages, virtual, layer_flops(config), *end_flops(config))


def layer_flops(config: Config) -> int:
    """FLOPs a token of the forward pass of one decoder layer; backward costs twice that everywhere."""
    decoder, S = config.model.decoder, config.data.sequence_length
    D, F = decoder.hidden_size, decoder.ffn_hidden_size
    # q, k, v, o; gate, up, down; and scores and weighted sum over the S / 2 positions a token sees on average.
    return 2 * (4 * D * D + 3 * D * F) + 2 * S * D


def end_flops(config: Config) -> tuple[int, int]:
    """FLOPs a token that the first and the last part have besides their layers.

    The first has project_up (looking tokens up is free), the last project_down and the output layer. Projections count
    as if every token were visual.
    """
    D, E = config.model.decoder.hidden_size, config.model.encoder.hidden_size
    return 2 * E * D, 2 * D * E + 2 * config.model.decoder.vocab_size * D


def balanced(layers: int, stages: int, virtual: int, layer: int, first: int, last: int) -> list[int]:
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
    return counts
