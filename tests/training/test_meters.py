"""The mean predictor's loss against its definition, MFU against its parts, balance by hand."""

from dataclasses import replace
from typing import Any

import harness
import pytest
import torch

from emu2_megatron.config import flops
from emu2_megatron.config.schema import Fp8Config
from emu2_megatron.parallel import topology
from emu2_megatron.parallel.step import StepOutput
from emu2_megatron.platform import gpus
from emu2_megatron.training.meters import Meter, mean_predictor_loss, peak
from emu2_megatron.training.step import StepReport


def test_mean_predictor_loss() -> None:
    """Far from zero, so that the difference of two large moments has digits to lose."""
    v_RE = torch.randn(500, 7, dtype=torch.float64) * torch.arange(1, 8) + 100
    moments = torch.cat([v_RE.sum(0), v_RE.square().sum(0), torch.tensor([500.0])])
    wanted = (v_RE - v_RE.mean(0)).square().mean()
    assert mean_predictor_loss(moments) == pytest.approx(float(wanted), rel=1e-9)


def test_no_embedding_at_all() -> None:
    assert mean_predictor_loss(torch.zeros(15, dtype=torch.float64)) == 0


@pytest.fixture
def world_of_one():
    topology.start("gloo")
    yield topology.initialize(harness.config())
    topology.stop()


def record_of(*counts: list[int]) -> dict[str, Any]:
    """The record of a step for each of `counts`."""
    config = harness.config()
    meter = Meter(config, 1e9, lambda *counts: flops.step_flops(config, *counts).total)
    moments = torch.zeros(2 * config.model.encoder.hidden_size + 1).double()
    for step in counts:
        output = StepOutput(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(step), moments, {})
        report = StepReport(output, 1.0, 1.0, 1.0, 1.0, loss_scale=1.0, skipped_updates=0)
        meter.add(report)
    return meter.record(len(counts), report, 0)


def test_mfu_counts_the_pictures_that_were_encoded(world_of_one: topology.Topology) -> None:
    """Two steps of 8 sequences, 11 pictures and 40 regressed embeddings; 5 pictures came as features."""
    config = harness.config()
    counts = [100, 40, 11, 8, 6, 0, 6]
    record = record_of(counts, counts)
    seconds = 2 * record["step_seconds"]
    done = flops.step_flops(config, 16, 22, 12, 80).total
    assert record["tflops_per_second"] == pytest.approx(done / seconds / 1e12)
    assert record["mfu"] == pytest.approx(done / seconds / 1e9)


def test_balance_and_padding(world_of_one: topology.Topology) -> None:
    """8 sequences of 24 tokens a step. Four replicas encode 1, 2, 3 and 2 pictures: everybody waits for the third, so
    8 of 12 are used. A step counts by its work, not as one of two."""
    one, other = [9, 4, 8, 8, 8, 48, 1, 2, 3, 2], [9, 4, 40, 8, 40, 0, 10, 10, 10, 10]
    assert record_of(one)["encoder_balance"] == pytest.approx(8 / 12)
    assert record_of(one)["padding_share"] == 0.25
    both = record_of(one, other)
    assert both["encoder_balance"] == pytest.approx(48 / 52) and both["padding_share"] == 0.125
    assert record_of(other)["encoder_balance"] == 1.0
    # Nobody has anything to encode: nobody waits.
    assert record_of([9, 0, 3, 8, 0, 0, 0, 0, 0, 0])["encoder_balance"] == 1.0


def test_the_peak_of_a_cpu_is_measured_and_said_to_be(world_of_one: topology.Topology) -> None:
    before = torch.get_rng_state()
    best, said = peak(harness.config(), "a formula")
    assert torch.equal(torch.get_rng_state(), before), "a resumed run would go on with other random numbers"
    assert 1e8 < best < 1e14  # a slow core to a large server
    assert "measured by a 512 x 512 matrix product" in said and "fp32" in said and "really encoded" in said


def test_fp8_is_a_share_of_bf16s_peak_and_fp32_of_what_is_no_tf32(
    world_of_one: topology.Topology, monkeypatch: pytest.MonkeyPatch
) -> None:
    fp8 = replace(harness.config(precision="bf16"), fp8=Fp8Config(recipe="current"))
    assert "bf16's peak, also for what is multiplied in FP8" in peak(fp8, "a formula")[1]
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    assert gpus.peak_flops("fp32", "cuda") == (67e12, "h100-80g, data sheet without TF32")
    assert gpus.peak_flops("bf16", "cuda") == (989.4e12, "h100-80g, data sheet")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80g"),
        ("NVIDIA H100 PCIe", "h100-pcie-80g"),
        ("NVIDIA H200", "h200-141g"),
        ("NVIDIA A100-SXM4-80GB", "a100-80g"),
        ("NVIDIA A100-SXM4-40GB", "a100-40g"),
        ("NVIDIA B200", "b200-180g"),
        ("NVIDIA L40S", "l40s-48g"),
        ("NVIDIA GeForce RTX 4090", None),
        # Near namesakes with other clocks or memory, and slices.
        ("NVIDIA H100 NVL", None),
        ("NVIDIA H200 NVL", None),
        ("NVIDIA GH200 480GB", None),
        ("NVIDIA GB200", None),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ],
)
def test_gpus_are_known_by_their_drivers_names(device: str, name: str | None) -> None:
    assert gpus.find(device) == name
