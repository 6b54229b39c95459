"""`emu2 plan` as a user runs it."""

import json
import xml.etree.ElementTree as ElementTree

import pytest

from emu2_megatron import cli

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
    assert all(one["parameters"] == one["built_parameters"] and one["difference"] < 0.03 for one in checks)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--gpu", "abacus"], "h100-80g"),
        (["--gpus", "0"], "--gpus"),
        (["--top", "0"], "--top"),
        (["--images-per-sequence", "33"], "0 to 32"),
        (["training.precision=int1"], "bf16"),
        (["--html", "/proc/nowhere/x.html"], "--html"),
        (["parallel.tensor_parallel_size=3"], "tensor_parallel_size=3"),
        (["parallel.data_parallel_size=8", "training.global_batch_size=12"], "with training.global_batch_size=8"),
    ],
)
def test_what_cannot_be_planned_is_one_line_and_exit_code_2(arguments: list[str], said: str, capsys) -> None:
    assert cli.main([*TINY, *arguments]) == 2
    printed = capsys.readouterr()
    assert printed.err.count("\n") == 1 and printed.err.startswith("emu2: ") and said in printed.err
