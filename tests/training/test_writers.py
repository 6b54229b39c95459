"""A step whose update was skipped has no gradient norm: every log must say so without a made-up number."""

import json
from dataclasses import replace
from pathlib import Path

import harness
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from emu2_megatron.config.schema import LoggingConfig
from emu2_megatron.training.writers import PHASES, Writers


def test_skipped_update(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    writers = Writers(replace(harness.config(), logging=LoggingConfig(directory=str(tmp_path))))
    for step, norm in ((1, None), (2, 0.5)):
        fields = ("text_loss image_loss mean_predictor_image_loss tokens_per_second images_per_second step_seconds "
                  "skipped_samples skipped_updates mfu tflops_per_second").split()  # fmt: skip
        record = dict.fromkeys([*fields, *(f"{phase}_seconds" for phase in PHASES)], 1)
        writers.write({**record, "step": step, "grad_norm": norm, "loss_scale": 2.0**32 / step})
    writers.close()
    writers.summary({})
    assert [json.loads(line)["grad_norm"] for line in (tmp_path / "log.jsonl").read_text().splitlines()] == [None, 0.5]
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [event.step for event in events.Scalars("run/grad_norm")] == [2]
    assert [event.value for event in events.Scalars("run/loss_scale")] == [2.0**32, 2.0**31]
    printed = capsys.readouterr().out
    assert "norm skipped scale 4.29497e+09 |" in printed and "norm 0.5 scale 2.14748e+09 |" in printed
    assert "gradient norm" in printed and "updates skipped" in printed
