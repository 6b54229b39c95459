"""`emu2 plan --check`: the estimate against what the engine really allocates in a fake world."""

from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from emu2_megatron.parallel import estimate_memory
from emu2_megatron.parallel.estimate import Estimate
from emu2_megatron.parallel.fake_world import built, distinct_ranks
from emu2_megatron.training.plan_report import short

TOLERANCE = 0.03
"""Largest relative difference that counts as agreement."""


@dataclass(frozen=True)
class Check:
    """One rank: what it holds between two steps."""

    rank: int
    stage: int
    estimated: dict[str, int]
    """Parameters, and bytes of weights, gradients and the optimizer's state."""
    built: dict[str, int]
    """The same, counted."""

    @property
    def differences(self) -> dict[str, float]:
        """Relative, of each; none if both are nothing."""
        return {
            name: abs(ours - theirs) / max(theirs, 1)
            for (name, ours), theirs in zip(self.estimated.items(), self.built.values(), strict=True)
        }

    @property
    def difference(self) -> float:
        """The largest."""
        return max(self.differences.values())


def check(item: Estimate) -> list[Check]:
    """Build one of every kind of rank of a layout."""
    checks = []
    stages = item.config.parallel.pipeline_parallel_size
    for rank in distinct_ranks(item.config, item.world_size):
        stage = rank // (item.world_size // stages)  # megatron-core numbers the stages last
        real, memory = built(item.config, item.world_size, rank), item.memory[stage]
        estimated = {
            "parameters": estimate_memory.parameters(item.config, stage),
            "weights": memory.weights,
            "gradients": memory.gradients,
            "optimizer": memory.optimizer,
        }
        counted = (real.parameters, real.weight_bytes, real.gradient_bytes, real.optimizer_bytes)
        checks.append(Check(rank, stage, estimated, dict(zip(estimated, counted, strict=True))))
    return checks


def print_table(checks: list[Check]) -> None:
    """For people: what was built, in billions, and how far the estimate is from each."""
    table = Table("rank", "stage", *checks[0].built, "difference", box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in table.columns:
        column.justify, column.no_wrap = "right", True
    for one in checks:
        cells = [f"{short(one.built[name] / 1e9)} {apart:.2%}" for name, apart in one.differences.items()]
        table.add_row(str(one.rank), str(one.stage), *cells, f"{one.difference:.2%}")
    console = Console()
    console.print("built: billions of parameters, GB; and how far the estimate is from them", highlight=False)
    console.print(table)
    worst = max(one.difference for one in checks)
    console.print(f"{'agrees' if worst <= TOLERANCE else 'DISAGREES'} within {TOLERANCE:.0%}", highlight=False)
