"""What the redirection promises, and that it stays out of the way of everything else."""

import pytest
import torch

from emu2_megatron.errors import ConfigError
from emu2_megatron.platform import cuda_on_cpu, device

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without CUDA")
CPU = torch.device("cpu")


def test_refuses_beside_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(ConfigError, match="nothing was redirected"):
        cuda_on_cpu.apply()


def test_cuda_by_name_is_the_cpu() -> None:
    assert device.device() == CPU and torch.cuda.current_device() == CPU
    assert torch.zeros(2, device="cuda").device == CPU
    assert torch.empty(2, device=torch.device("cuda", 1), pin_memory=True).device == CPU
    tensor = torch.ones(2)
    assert tensor.to("cuda").device == CPU and tensor.to(device="cuda:1", dtype=torch.float64).dtype == torch.float64
    assert tensor.cuda() is tensor
    # The optimizers of megatron-core compare with these strings.
    assert tensor.type() == "torch.cuda.FloatTensor" and tensor.bfloat16().type() == "torch.cuda.BFloat16Tensor"
    assert tensor.type(torch.int32).dtype == torch.int32


def test_random_state_round_trip() -> None:
    torch.cuda.manual_seed(3)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(4), first)


def test_other_devices_are_left_alone() -> None:
    assert torch.zeros(2, device="meta").is_meta
    with torch.device("meta"):
        assert torch.empty(3).is_meta and torch.nn.Linear(2, 2).weight.is_meta
    assert torch.zeros(2).to("meta").is_meta


def test_applying_twice_changes_nothing() -> None:
    before = torch.zeros
    cuda_on_cpu.apply()
    assert torch.zeros is before
