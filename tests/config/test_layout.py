"""The balanced layout against every other one there is."""

from collections.abc import Iterator
from dataclasses import replace
from itertools import combinations

import harness
import pytest

from emu2_megatron.config.layout import balanced, end_flops, layer_flops, part_layers
from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, DataConfig, ParallelConfig


def compositions(layers: int, parts: int) -> Iterator[tuple[int, ...]]:
    """All ways of cutting a row of layers into parts of one or more."""
    for cuts in combinations(range(1, layers), parts - 1):
        yield tuple(b - a for a, b in zip((0, *cuts), (*cuts, layers), strict=True))


def slowest(counts: tuple[int, ...], stages: int, layer: int, first: int, last: int) -> tuple[int, int]:
    """Cost of the slowest stage, and of the largest part."""
    costs = [n * layer for n in counts]
    costs[0] += first
    costs[-1] += last
    return max(sum(costs[s::stages]) for s in range(stages)), max(costs)


@pytest.mark.parametrize(("stages", "virtual"), [(1, 1), (2, 1), (3, 1), (4, 1), (2, 2), (3, 2), (2, 3)])
def test_no_layout_is_better(stages: int, virtual: int) -> None:
    """No slower stage than the best of all layouts, and among those with such a stage no larger part."""
    for layers in range(stages * virtual, 13):
        for first, last in [(0, 0), (0, 4), (1, 5), (2, 14), (0, 20), (0, 35), (3, 50), (10, 10), (0, 30)]:
            counts = tuple(balanced(layers, stages, virtual, 10, first, last))
            assert sum(counts) == layers and min(counts) >= 1
            others = compositions(layers, stages * virtual)
            best = min(slowest(other, stages, 10, first, last) for other in others)
            assert slowest(counts, stages, 10, first, last) == best, f"{layers} layers, {first}, {last}: {counts}"


def test_ties_go_to_later_stages() -> None:
    """Earlier stages hold more micro-batches' activations."""
    assert balanced(7, 4, 1, 10, 0, 0) == [1, 2, 2, 2]
    assert balanced(7, 2, 2, 10, 0, 0) == [1, 2, 2, 2]


def layers_of(preset: str, stages: int, virtual: int = 1) -> list[int]:
    parallel = ParallelConfig(pipeline_parallel_size=stages, virtual_pipeline_parallel_size=virtual)
    return part_layers(Config(model=PRESETS[preset], parallel=parallel))


def test_emu2() -> None:
    """At 37B the output layer costs 0.4 layers: an even split stays, otherwise the last stage is a short one."""
    for stages in (2, 3, 4, 5, 6, 10, 12, 15, 20, 30, 60):
        assert layers_of("emu2_37b", stages) == [60 // stages] * stages
    assert layers_of("emu2_37b", 4, 5) == [3] * 20
    assert layers_of("emu2_37b", 8) == [7, 7, 7, 8, 8, 8, 8, 7]


def test_costs() -> None:
    """By hand, for D 4, F 6, V 10, E 3 and S 8: 4 x 16 + 3 x 24 weights, each two FLOPs, and 2 x 8 x 4 of attention."""
    tiny = PRESETS["emu2_tiny"]
    model = replace(tiny, encoder=replace(tiny.encoder, hidden_size=3),
                    decoder=replace(tiny.decoder, hidden_size=4, ffn_hidden_size=6, vocab_size=10))  # fmt: skip
    config = Config(model=model, data=DataConfig(sequence_length=8))
    assert layer_flops(config) == 272 + 64
    assert end_flops(config) == (24, 24 + 80)


def test_the_oracles_layouts_are_uneven() -> None:
    """Those that `test_layout_invariance` calls balanced: layers that neither stages nor parts divide evenly."""
    assert part_layers(harness.config(pp=3)) == [1, 2, 1]
    assert part_layers(harness.config(pp=2, vpp=2, layers=6)) == [1, 2, 2, 1]
