"""`emu2 plan` as a user runs it."""

import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from html import unescape

import pytest

from emu2_megatron import cli
from emu2_megatron.config.loading import load
from emu2_megatron.config.validate import validate
from emu2_megatron.training.plan_check import Check
from emu2_megatron.training.plan_report import short

TINY = ["plan", "--config", "tiny_interleaved", "--gpus", "8"]
KEYS = {"parameters", "gpus", "gpu", "images_per_sequence", "flops", "assumptions", "layouts", "as_given"}
LAYOUT = {
    "tensor_parallel_size", "context_parallel_size", "pipeline_parallel_size", "virtual_pipeline_parallel_size",
    "data_parallel_size", "micro_batch_size", "recompute", "memory_bytes", "memory", "memory_by_stage",
    "step_seconds", "bubble", "exchanged_bytes", "mfu", "tokens_per_second", "days",
}  # fmt: skip


def test_json_on_standard_output(capsys) -> None:
    """Nothing else is printed, and a value after --json is an override, not a file."""
    assert cli.main([*TINY, "--json", "parallel.tensor_parallel_size=2", "--top", "3"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content.keys() >= KEYS and content["parameters"] == 1_300_104
    assert 0 < len(content["layouts"]) <= 3
    for item in content["layouts"]:
        assert item.keys() >= LAYOUT and item["tensor_parallel_size"] == 2
        assert item["memory_bytes"] == sum(item["memory"].values())
        assert item["memory_bytes"] == max(stage["total"] for stage in item["memory_by_stage"])
        assert 0 < item["mfu"] < 1 and item["step_seconds"] > 0
    assert content["as_given"]["pipeline_parallel_size"] == 2


def test_table_and_files(tmp_path, capsys) -> None:
    html, numbers = tmp_path / "plan.html", tmp_path / "plan.json"
    assert cli.main([*TINY, "--html", str(html), "--json", str(numbers), "--images-per-sequence", "7"]) == 0
    printed = capsys.readouterr().out
    assert "7 pictures each" in printed and "TP2·PP2·DP2" in printed and "MFU" in printed
    assert json.loads(numbers.read_text())["images_per_sequence"] == 7
    page = html.read_text()
    # Nothing is loaded from anywhere: no address, no file, no script.
    for word in ("http", "src=", "href", "url(", "@import", "<script", "<link", "<img"):
        assert word not in page
    assert page.count("<svg") == 4
    # The given layout beside the best ones, in the table and among the bars of memory.
    read = unescape(page)
    assert "<td>*</td><td>TP2·PP2·DP2</td>" in read and ">* TP2·PP2·DP2<" in read and "as the configuration" in read
    # Every chart is well formed. A tiny model's bars are too short to be drawn against 80 GB; the timelines are not.
    for number, chart in enumerate(page.split("<svg")[1:]):
        svg = ElementTree.fromstring("<svg" + chart.split("</svg>")[0] + "</svg>")
        assert len(svg.findall("rect")) > (1 if number >= 2 else -1) and len(svg.findall("text")) > 1
        assert all(float(rect.get("width")) > 0 for rect in svg.iter("rect"))


def test_check_builds_the_ranks(capsys) -> None:
    assert cli.main([*TINY, "--check", "parallel.pipeline_parallel_size=2", "--json"]) == 0
    checks = json.loads(capsys.readouterr().out)["check"]
    assert {one["stage"] for one in checks} == {0, 1}
    # A tiny model's padding is a larger share than a 37B's.
    for one in checks:
        assert one["estimated"]["parameters"] == one["built"]["parameters"] and one["difference"] < 0.03
        assert one["built"].keys() == {"parameters", "weights", "gradients", "optimizer"}


def test_check_compares_each_quantity() -> None:
    """Errors that cancel in the sum, and a small one that the others drown."""
    names = ("parameters", "weights", "gradients", "optimizer")
    built = dict(zip(names, (100, 200, 400, 100), strict=True))
    assert Check(0, 0, built, built).difference == 0
    assert Check(0, 0, built | {"weights": 240, "gradients": 360}, built).difference == pytest.approx(0.2)
    assert Check(0, 0, built | {"optimizer": 110}, built).difference == pytest.approx(0.1)


def test_check_needs_no_transformer_engine_for_fp8(capsys) -> None:
    """And the plan says that it is bf16's."""
    fp8 = ["fp8.recipe=current", "training.precision=bf16", "model.decoder.ffn_hidden_size=352"]
    assert cli.main([*TINY, "--check", *fp8, "--json"]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["check"] and content["fp8_recipe"] == "current"
    assert content["not_modelled"] == ["FP8 (fp8.recipe=current): peak, seconds and bytes are bf16's"]
    assert cli.main([*TINY, *fp8]) == 0
    assert "not modelled: FP8" in capsys.readouterr().out


def test_what_prefetch_hides_is_not_credited_and_that_is_said(capsys) -> None:
    assert cli.main([*TINY, "--json", "training.encoder_prefetch=true"]) == 0
    [said] = json.loads(capsys.readouterr().out)["not_modelled"]
    assert "encoder_prefetch" in said
    assert cli.main([*TINY, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["not_modelled"] == []


def test_precomputed_features_are_not_encoded(capsys) -> None:
    fixed = ["parallel.tensor_parallel_size=2", "training.micro_batch_size=1", "training.recompute=none"]
    contents = []
    for option in ([], ["--precomputed-features"]):
        assert cli.main([*TINY, *option, "--json", *fixed]) == 0
        contents.append(json.loads(capsys.readouterr().out))
    encoded, loaded = contents
    assert encoded["flops"]["encoder"] > 0 and loaded["flops"]["encoder"] == 0
    assert loaded["flops"]["decoder"] == encoded["flops"]["decoder"] and loaded["precomputed_features"]
    assert loaded["layouts"][0]["step_seconds"] < encoded["layouts"][0]["step_seconds"]


def test_a_file_is_checked_like_overrides(tmp_path, capsys) -> None:
    """Nothing in a file is fixed, but what no layout can make legal is named as such."""
    recipe = tmp_path / "wrong.yaml"
    recipe.write_text("optimizer: {warmup_steps: 30, warmup_ratio: null}\ntraining: {steps: 20}\n")
    assert cli.main(["plan", "--config", str(recipe), "--gpus", "64"]) == 2
    assert "optimizer.warmup_steps: 30; legal: 0 to training.steps 20" in capsys.readouterr().err
    # What is searched may be anything: the plan says what to put in its place.
    recipe.write_text("parallel: {tensor_parallel_size: 3}\n")
    assert cli.main(["plan", "--config", str(recipe), "--gpus", "64", "--gpu", "b200-180g"]) == 0
    assert "cannot run: parallel.tensor_parallel_size: 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("recipe", "overrides"),
    [
        ("parallel: {pipeline_parallel_size: 2, pipeline_layout: [1, 3]}\n", []),
        ("training: {recompute: block, recompute_layers: 1}\n", []),
        ("{}\n", ["parallel.pipeline_parallel_size=2", "parallel.virtual_pipeline_parallel_size=1",
                  "parallel.pipeline_layout=[1,3]"]),
        ("{}\n", ["training.recompute=block", "training.recompute_layers=1"]),
    ],
)  # fmt: skip
def test_what_is_printed_trains_that_layout(recipe: str, overrides: list[str], tmp_path, capsys) -> None:
    """Also if the recipe sets what a plan leaves at its default."""
    file = tmp_path / "recipe.yaml"
    model = "model: {preset: emu2_tiny}\ndata: {sequence_length: 128, shards: [any], tokenizer: any}\n"
    file.write_text(model + ("" if recipe == "{}\n" else recipe))
    assert cli.main(["plan", "--config", str(file), "--gpus", "8", "--json", *overrides]) == 0
    [best, *_] = json.loads(capsys.readouterr().out)["layouts"]
    config = load(str(file), [*overrides, *best["overrides"].split()])
    assert validate(config, 8) == best["data_parallel_size"]
    for section, name in (("parallel", "tensor_parallel_size"), ("parallel", "pipeline_layout"),
                          ("training", "recompute"), ("training", "recompute_layers")):  # fmt: skip
        value = getattr(getattr(config, section), name)
        assert best[name] == (list(value) if isinstance(value, tuple) else value)
    assert cli.main(["plan", "--config", str(file), "--gpus", "8", *overrides]) == 0
    assert f"to train with 1: {best['overrides']}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (3e-9, "<0.01"), (0.25, "0.25"), (12.34, "12.3"), (999.6, "1,000"), (123456.0, "123,456")],
)
def test_numbers_have_no_exponent(value: float, text: str) -> None:
    assert short(value) == text


def test_no_cell_is_cut_in_a_narrow_terminal(monkeypatch, capsys) -> None:
    monkeypatch.setenv("COLUMNS", "40")
    fixed = ["parallel.tensor_parallel_size=2", "training.recompute=attention"]
    assert cli.main([*TINY, *fixed, "training.steps=1"]) == 0
    rows = [line for line in capsys.readouterr().out.splitlines() if "TP2" in line]
    for row in rows[:-1]:  # the last is the recipe's own
        assert "recompute attention " in row and row.split()[-1] == "<0.01" and "…" not in row


def test_a_terminal_without_unicode() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "emu2_megatron.cli", *TINY], env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"TP1?PP1?DP8" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "abacus"], "h100-80g"),
        (["--gpus", "0"], "--gpus"),
        (["--top", "0"], "--top"),
        (["--images-per-sequence", "33"], "0 to 32"),
        (["training.precision=int1"], "training.precision: int1; legal: bf16"),
        (["optimizer.warmup_steps=9999", "optimizer.warmup_ratio=null"], "optimizer.warmup_steps: 9999; legal: 0 to"),
        (["training.global_batch_size=0"], "training.global_batch_size: 0; legal: more than 0"),
        (["model.image_queries=0"], "model.image_queries: 0; legal: more than 0"),
        (["training.recompute_layers=2"], "training.recompute_layers: 2; training.recompute is none"),
        (["parallel.pipeline_parallel_size=0"], "parallel.pipeline_parallel_size: 0; legal: more than 0"),
        (["parallel.virtual_pipeline_parallel_size=0"], "is legal with parallel.virtual_pipeline_parallel_size=0"),
        (["--precomputed-features", "training.train_encoder=true"], "--precomputed-features"),
        (["--json", "/proc/nowhere/x.json"], "--json"),
        (["--html", "/proc/nowhere/x.html"], "--html"),
        (["parallel.tensor_parallel_size=3"], "parallel.tensor_parallel_size: 3; must divide"),
        (["parallel.data_parallel_size=8", "training.global_batch_size=12"], "with training.global_batch_size=8"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys) -> None:
    assert cli.main([*TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("emu2: ") and said in printed.err
