"""What the logs say for people: no made-up number for a skipped update, balance where it is worth a word."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import harness
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emu2_megatron.config.schema import LoggingConfig
from emu2_megatron.training.writers import PHASES, Writers

FIELDS = ("text_loss image_loss mean_predictor_image_loss tokens_per_second images_per_second step_seconds "
          "skipped_samples skipped_updates skipped_steps mfu tflops_per_second padding_share "
          "encoder_balance").split()  # fmt: skip


def written(folder: Path, *records: dict[str, Any]) -> None:
    """Write records everywhere, with 1 for what they leave out, and the summary."""
    writers = Writers(replace(harness.config(), logging=LoggingConfig(directory=str(folder))))
    rest = dict.fromkeys([*FIELDS, *(f"{phase}_seconds" for phase in PHASES), "grad_norm", "loss_scale"], 1)
    for step, record in enumerate(records, start=1):
        writers.write({**rest, "step": step, **record})
    writers.close()
    writers.summary({})


def test_skipped_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, {"grad_norm": None, "loss_scale": 2.0**32}, {"grad_norm": 0.5, "loss_scale": 2.0**31})
    assert [json.loads(line)["grad_norm"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [None, 0.5]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("run/grad_norm")] == [2]
    assert [event.value for event in events.Scalars("run/loss_scale")] == [2.0**32, 2.0**31]
    printed = capsys.readouterr().out
    assert "norm skipped scale 4.29497e+09 |" in printed and "norm 0.5 scale 2.14748e+09 |" in printed
    assert "gradient norm" in printed and "updates skipped" in printed


def test_records_without_a_good_step(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No loss is made up for them; a run in which nothing was left to do has no summary."""
    none = {"text_loss": None, "image_loss": None, "mean_predictor_image_loss": None, "grad_norm": None}
    written(tmp_path, none, {})
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("loss/text")] == [2]
    printed = capsys.readouterr().out
    assert "text skipped | image skipped (mean skipped) | norm skipped" in printed and "text loss" in printed
    written(tmp_path / "nothing")
    assert "Summary" not in capsys.readouterr().out


def test_balance_is_told_when_it_is_not_perfect(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shares = [{"padding_share": 0.034, "encoder_balance": 0.871}, {"padding_share": 0.004, "encoder_balance": 0.996}]
    written(tmp_path, *shares)
    one, other = (line for line in capsys.readouterr().out.splitlines() if line.startswith("step "))
    assert " | padding 3% | encoder balance 87% | " in one
    assert "padding" not in other and "balance" not in other
    events = EventAccumulator(str(tmp_path)).Reload()
    for name in ("padding_share", "encoder_balance"):
        assert [e.value for e in events.Scalars(f"batch/{name}")] == pytest.approx([share[name] for share in shares])


def test_the_summary_has_balance_and_padding(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    written(tmp_path, {"padding_share": 0.034, "encoder_balance": 0.871}, {"padding_share": 0, "encoder_balance": 1.0})
    lines = capsys.readouterr().out.splitlines()
    for label, numbers in (("padding, share of tokens", ["0.034", "0"]), ("balance of the encoder", ["0.871", "1"])):
        [row] = [line for line in lines if label in line]
        assert [cell.strip() for cell in row.split("│")[2:4]] == numbers
