"""What `emu2 train` says about the layout before it starts."""

import harness
import pytest

from emu2_megatron.config.schema import Config
from emu2_megatron.training import launch, loop


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (harness.config(pp=2), ""),
        (harness.config(pp=3), "decoder layers of each stage: 1, 2, 1\n"),
        (harness.config(pp=2, vpp=2, layers=6), "decoder layers of each stage: 1 + 2, 2 + 1\n"),
    ],
)
@pytest.mark.parametrize("rank", ["0", "1"])
def test_uneven_layouts_are_printed_by_rank_0(
    config: Config, said: str, rank: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setattr(loop, "run", lambda _: None)
    launch._run(config)
    assert capsys.readouterr().out == (said if rank == "0" else "")
