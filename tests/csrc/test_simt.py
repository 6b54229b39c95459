"""The emulator itself: what it computes, and that it sees what it is there to see."""

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from emulation import SIMT, Emulated, compile_sources, link, run_program

SEEDS = (0, 1, 2, 3)


@pytest.fixture(scope="session")
def example(
    objects: Callable[[str], dict[str, Path]], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str, int], subprocess.CompletedProcess[str]]:
    """Runs an example of simt_examples.cu: (variant, name, seed)."""
    programs: dict[str, Path] = {}

    def run(variant: str, name: str, seed: int) -> subprocess.CompletedProcess[str]:
        if variant not in programs:
            folder = tmp_path_factory.mktemp("examples")
            parts = compile_sources([SIMT.parent / "simt_examples.cu"], folder, variant)
            parts += [path for source, path in objects(variant).items() if (SIMT / source).exists()]
            programs[variant] = link(parts, folder / "examples", variant, library=False)
        return run_program([programs[variant], name, str(seed)])

    return run


def shuffles() -> list[float]:
    out: list[float] = []
    for thread in range(40):
        warp, lane, last = thread // 32 * 32, thread % 32, 31 if thread < 32 else 7
        part = lane // 8 * 8
        out += [warp + 3, warp + lane // 4 * 4 + 1]
        out += [thread - 2 if lane - 2 >= part else thread, thread + 1 if lane + 1 < part + 8 else thread]
        out += [thread ^ 1, float(torch.tensor(sum(2**k for k in range(last + 1) if (warp + k) % 3 == 0)).float())]
    return out


OUTPUTS = {
    "shuffles": shuffles(),
    "reverse": [*range(11, -1, -1)] * 2,
    "unwritten": [1.0] + [float("nan")] * 7,
    "ordered_neighbours": [thread ^ 1 for thread in range(32)],
    "sum": [150.0],
    "early_exit": [1.0, 0.0] * 20,
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", OUTPUTS)
def test_output(example: Callable[..., subprocess.CompletedProcess[str]], name: str, seed: int) -> None:
    done = example("plain", name, seed)
    assert done.returncode == 0, done.stdout
    wanted = torch.tensor([float(value) for value in OUTPUTS[name]])
    found = torch.tensor([float(value) for value in done.stdout.split()])
    torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


REPORTS = {
    "two_barriers": "divergence: threads meet in different barriers",
    "one_waits": "divergence: nobody can go on",
    "outside_mask": "shuffle: reads a lane outside the mask",
    "too_large": "configuration",
}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", REPORTS)
def test_report(example: Callable[..., subprocess.CompletedProcess[str]], name: str, seed: int) -> None:
    done = example("plain", name, seed)
    assert done.returncode == 1 and done.stdout.startswith(REPORTS[name])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "name", "report"),
    [
        ("address", "beyond_dynamic", "ERROR: AddressSanitizer"),
        ("address", "reverse", ""),
        ("thread", "shuffled_neighbours", "ThreadSanitizer: data race"),
        ("thread", "plain_sum", "ThreadSanitizer: data race"),
        ("thread", "ordered_neighbours", ""),
        ("thread", "reverse", ""),
        ("thread", "sum", ""),
    ],
)
def test_sanitizer(
    example: Callable[..., subprocess.CompletedProcess[str]], variant: str, name: str, report: str
) -> None:
    done = example(variant, name, 2)
    assert report in done.stderr and (done.returncode == 0) == (not report), done.stderr


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_are_those_of_torch(emulated: Emulated, dtype: torch.dtype) -> None:
    """All 16-bit values to fp32, and fp32 values around every one of them back. Pooling one patch is a conversion."""
    emulated.configure(2, 0)
    narrow = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    wide = converted(emulated, narrow, torch.float32)
    torch.testing.assert_close(wide, narrow.float(), rtol=0, atol=0, equal_nan=True)
    following = torch.cat([wide.view(torch.int32)[1:], wide.view(torch.int32)[:1]]).view(torch.float32)
    middle = (wide.double() + following.double()).mul(0.5).float()  # a tie
    for value in (middle, middle.nextafter(wide), middle.nextafter(following)):
        torch.testing.assert_close(converted(emulated, value, dtype), value.to(dtype), rtol=0, atol=0, equal_nan=True)


def converted(kernels: Emulated, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    hidden = values.repeat(2).view(1, 2, -1)  # CLS and a patch
    return kernels.pool(hidden, 1, dtype).view(-1)
