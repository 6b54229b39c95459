"""`emu2 plan --check`: the estimate against what the engine really allocates in a fake world."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from emu2_megatron.parallel import estimate_memory
from emu2_megatron.parallel.estimate import Estimate
from emu2_megatron.parallel.fake_world import built, distinct_ranks

TOLERANCE = 0.03
"""Largest relative difference that counts as agreement."""


@dataclass(frozen=True)
class Check:
    """One rank: what it holds between two steps, estimated and built."""

    rank: int
    stage: int
    parameters: int
    built_parameters: int
    bytes_: int
    """Weights, gradients and optimizer state."""
    built_bytes: int

    @property
    def difference(self) -> float:
        """Relative, the larger of both."""
        return max(
            abs(self.parameters / self.built_parameters - 1),
            abs(self.bytes_ / self.built_bytes - 1),
        )


def check(item: Estimate) -> list[Check]:
    """Build one of every kind of rank of a layout."""
    checks = []
    stages = item.config.parallel.pipeline_parallel_size
    for rank in distinct_ranks(item.config, item.world_size):
        stage = rank // (item.world_size // stages)  # megatron-core numbers the stages last
        real, memory = built(item.config, item.world_size, rank), item.memory[stage]
        checks.append(
            Check(
                rank,
                stage,
                estimate_memory.parameters(item.config, stage),
                real.parameters,
                memory.weights + memory.gradients + memory.optimizer,
                real.weight_bytes + real.gradient_bytes + real.optimizer_bytes,
            )
        )
    return checks


def print_table(checks: list[Check]) -> None:
    """For people."""
    table = Table("rank", "stage", "parameters", "built", "GB", "built", "difference", box=box.SIMPLE_HEAD)
    for column in table.columns:
        column.justify = "right"
    for one in checks:
        table.add_row(
            str(one.rank), str(one.stage), f"{one.parameters:,}", f"{one.built_parameters:,}",
            f"{one.bytes_ / 1e9:.3f}", f"{one.built_bytes / 1e9:.3f}", f"{one.difference:.3%}",
        )  # fmt: skip
    console = Console()
    console.print(table)
    worst = max(one.difference for one in checks)
    console.print(f"{'agrees' if worst <= TOLERANCE else 'DISAGREES'} within {TOLERANCE:.0%}", highlight=False)
