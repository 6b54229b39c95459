"""Where log records go: a JSONL file, TensorBoard, and the console. Only rank 0 writes."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from emu2_megatron.config.schema import Config

PHASES = ("load", "exchange", "encode", "decode", "encoder_backward", "update")
"""Phases of a step in the order they happen, as `<phase>_seconds` of a record."""


class Writers:
    """Writes every record everywhere.

    Args:
        config: the run; says where files go and how long the run is.
        done: steps done before; what was logged of later ones, whose weights are lost, is dropped.
    """

    def __init__(self, config: Config, done: int = 0) -> None:
        folder = Path(config.logging.directory)
        folder.mkdir(parents=True, exist_ok=True)
        _keep_until(folder / "log.jsonl", done)
        self.jsonl = (folder / "log.jsonl").open("a", buffering=1)
        self.tensorboard = None
        if config.logging.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self.tensorboard = SummaryWriter(str(folder), purge_step=done + 1 if done else None)
        self.console = Console()
        self.progress = Progress(
            TextColumn("[bold]training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
            console=self.console, disable=not self.console.is_terminal,
        )  # fmt: skip
        self.task = self.progress.add_task("training", total=config.training.steps, completed=done)
        self.records: list[dict[str, Any]] = []
        self.progress.start()

    def say(self, text: str) -> None:
        """Print once, above the progress bar."""
        self.progress.console.print(text, soft_wrap=True, highlight=False, markup=False)

    def advance(self, step: int) -> None:
        """Move the progress bar."""
        self.progress.update(self.task, completed=step)

    def write(self, record: dict[str, Any]) -> None:
        """Log one record, and show it."""
        self.records.append(record)
        self.log(record)
        if self.console.is_terminal:
            # Above the bar; where a terminal is too narrow for one line, the phases go into a second one.
            line = _line(record)
            if self.console.width < len(line):
                line = line.replace(" | ms:", "\n            | ms:")
            self.progress.console.print(line, soft_wrap=True, highlight=False)
        else:
            print(_line(record), flush=True)

    def log(self, values: dict[str, Any]) -> None:
        """Log what is known of `step`, one of the values."""
        self.jsonl.write(json.dumps(values) + "\n")
        if self.tensorboard is not None:
            for name, value in values.items():
                if name != "step" and value is not None:
                    self.tensorboard.add_scalar(_tag(name), value, values["step"])

    def pictures(self, step: int, pictures_NHW3: np.ndarray, name: str) -> None:
        """Log a row of pictures, uint8."""
        if self.tensorboard is not None:
            self.tensorboard.add_images(f"pictures/{name}", pictures_NHW3, step, dataformats="NHWC")

    def close(self) -> None:
        """Flush and close everything."""
        self.progress.stop()
        self.jsonl.close()
        if self.tensorboard is not None:
            self.tensorboard.close()

    def summary(self, rows: dict[str, str]) -> None:
        """Print what the run came to: first and last record side by side, then `rows`."""
        if not self.records:
            self.say("nothing is left to do: all steps were done before")
            return
        first, last = self.records[0], self.records[-1]
        table = Table("", f"step {first['step']}", f"step {last['step']}", title="Summary")
        for label, name in (
            ("text loss", "text_loss"),
            ("image loss", "image_loss"),
            ("  of predicting the mean", "mean_predictor_image_loss"),
            ("gradient norm", "grad_norm"),
            ("tokens/s", "tokens_per_second"),
            ("images/s", "images_per_second"),
            ("TFLOP/s of a rank", "tflops_per_second"),
            ("MFU", "mfu"),
            ("padding, share of tokens", "padding_share"),
            ("balance of the encoder", "encoder_balance"),
            ("samples skipped", "skipped_samples"),
            ("updates skipped, overflows", "skipped_updates"),
            ("  for a problem", "skipped_steps"),
        ):
            if name in first:
                table.add_row(label, _short(first[name]), _short(last[name]))
        for label, name in (
            ("milliseconds a step", "step_seconds"),
            *((f"  {phase.replace('_', ' ')}", f"{phase}_seconds") for phase in PHASES),
        ):
            table.add_row(label, f"{first[name] * 1e3:.1f}", f"{last[name] * 1e3:.1f}")
        self.console.print(table)
        for label, text in rows.items():
            print(f"{label}: {text}", flush=True)


def _keep_until(file: Path, step: int) -> None:
    """Drop the records of later steps from a log, and a last line that a kill cut off."""
    if not file.is_file():
        return
    kept = []
    for line in file.read_text().splitlines(keepends=True):
        try:
            kept += [line] if json.loads(line)["step"] <= step and line.endswith("\n") else []
        except ValueError:
            continue
    temporary = file.with_name(file.name + ".tmp")
    temporary.write_text("".join(kept))
    temporary.replace(file)


def _tag(name: str) -> str:
    """TensorBoard's name of a value, in groups: `loss/text`, `lr/decoder`, `seconds/decode`, `speed/tokens`,
    `batch/padding_share`."""
    if name in ("padding_share", "encoder_balance"):
        return f"batch/{name}"
    for ending, group in (("_seconds", "seconds"), ("_per_second", "speed"), ("_loss", "loss"), ("_psnr", "psnr")):
        if name.endswith(ending):
            return f"{group}/{name.removesuffix(ending)}"
    return f"lr/{name.removeprefix('lr_')}" if name.startswith("lr_") else f"run/{name}"


def _short(value: float | None) -> str:
    return "skipped" if value is None else f"{value:.4g}"


def _line(record: dict[str, Any]) -> str:
    """One line that a person can follow."""
    text, image, mean = (
        "skipped" if record.get(f"{name}_loss") is None else f"{record[f'{name}_loss']:.4f}"
        for name in ("text", "image", "mean_predictor_image")
    )
    reads_text = "text_loss" in record
    losses = f"text {text} | image {image} (mean {mean})" if reads_text else f"denoising {image} (mean {mean})"
    tokens = f"{record['tokens_per_second']:.0f} tokens/s " if reads_text else ""
    phases = " ".join(f"{phase.replace('_', ' ')} {record[f'{phase}_seconds'] * 1e3:.0f}" for phase in PHASES)
    skipped = f" | skipped {record['skipped_samples']}" if record["skipped_samples"] else ""
    scale = f" scale {record['loss_scale']:g}" if record["loss_scale"] != 1 else ""
    # What would be shown as 0% padding and 100% balance is not worth a word.
    padding = f" | padding {record['padding_share']:.0%}" if record["padding_share"] > 0.005 else ""
    balance = f" | encoder balance {record['encoder_balance']:.0%}" if record["encoder_balance"] < 0.995 else ""
    return (
        f"step {record['step']:>6} | {losses} | norm {_short(record['grad_norm'])}{scale} | "
        f"{tokens}{record['images_per_second']:.1f} images/s "
        f"MFU {record['mfu']:.1%}{padding}{balance}{skipped} | ms: {phases}"
    )
