"""`emu2 plan`: from arguments to a table, JSON and a page."""

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from emu2_megatron.config import loading, validate
from emu2_megatron.errors import ConfigError
from emu2_megatron.parallel import plan
from emu2_megatron.parallel.estimate_memory import default_images
from emu2_megatron.platform.gpus import GPUS
from emu2_megatron.training import plan_check, plan_html, plan_report


def run(
    name_or_file: str,
    overrides: Sequence[str],
    gpus: int,
    gpu: str,
    images: float | None,
    top: int = 10,
    json_file: str | None = None,
    html_file: str | None = None,
    check: bool = False,
    precomputed: bool = False,
) -> int:
    """Plan and report. Returns the exit code.

    Args:
        name_or_file, overrides: the configuration; what overrides set is not searched.
        gpus, gpu: the machine.
        images: pictures of a sequence on average; None fills half of the tokens with them.
        top: layouts to report.
        json_file, html_file: where to write; `-` is standard output, which then gets nothing else.
        check: build the first layout's distinct ranks in a fake world and compare; 1 is returned if they differ.
        precomputed: pictures come as features.

    Raises:
        ConfigError: wrong arguments, or no layout is possible.
    """
    config = loading.load(name_or_file, overrides)
    validate.require_language(config, "emu2 plan")
    for option, value in (("--gpus", gpus), ("--top", top)):
        if value < 1:
            raise ConfigError(f"{option}: {value}; legal: 1 or more")
    if gpu not in GPUS:
        raise ConfigError(f"--gpu: {gpu}; legal: {', '.join(GPUS)}")
    fixed = frozenset(text.partition("=")[0] for text in overrides)
    plan.require_legal_rest(config, fixed)
    if precomputed and config.training.train_encoder:
        raise ConfigError("--precomputed-features: training.train_encoder is true; legal with a frozen encoder")
    for option, file in (("--json", json_file), ("--html", html_file)):
        _require_writable(file, option)
    images = default_images(config) if images is None else images
    most = config.data.sequence_length / config.model.image_queries
    if not 0 <= images <= most:
        raise ConfigError(f"--images-per-sequence: {images:g}; legal: 0 to {most:g}, which fill a sequence")
    answer = plan.plan(plan.Request(config, gpus, gpu, images, fixed, precomputed))
    checks = plan_check.check(answer.layouts[0]) if check else []
    if json_file is not None:
        content = plan_report.as_json(answer, top)
        if check:
            content["check"] = [dataclasses.asdict(one) | {"difference": one.difference} for one in checks]
        _write(json_file, json.dumps(content, indent=2) + "\n", "--json")
    if html_file is not None:
        # As characters that every terminal and file can hold.
        _write(html_file, plan_html.page(answer, top).encode("ascii", "xmlcharrefreplace").decode(), "--html")
    if "-" not in (json_file, html_file):
        plan_report.print_table(answer, top)
        if check:
            plan_check.print_table(checks)
    return int(any(one.difference > plan_check.TOLERANCE for one in checks))


def _require_writable(file: str | None, option: str) -> None:
    """Before the search, which takes a while."""
    if file is None or file == "-":
        return
    path = Path(file)
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ConfigError(f"{option}: {file} cannot be written; give a file in a folder that exists and is yours")


def _write(file: str, text: str, option: str) -> None:
    if file == "-":
        sys.stdout.write(text)
        return
    try:
        Path(file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{option}: {file} cannot be written: {error.strerror}") from error
