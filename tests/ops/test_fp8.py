"""The arithmetic of FP8 against numbers written out by hand, and against formats decoded bit by bit in float64."""

import math

import pytest
import torch
from torch import Tensor

from emu2_megatron.ops.fp8 import (
    E4M3,
    E5M2,
    FP32_LARGEST,
    block,
    cast,
    current,
    e8m0_scale,
    mxfp8,
    power_of_two_scale,
    rounded,
    rounded_in_blocks,
    scale_of,
    updated,
)  # fmt: skip

INF, NAN, TINY = math.inf, math.nan, 2.0**-149
ONE = torch.tensor(1.0)


def values(exponent_bits: int, mantissa_bits: int, codes: int) -> list[float]:
    """The non-negative finite values of a format, by code: subnormals below the first exponent, no hidden bit there."""
    bias = 2 ** (exponent_bits - 1) - 1
    decoded = []
    for code in range(codes):
        exponent, mantissa = code >> mantissa_bits, (code & (2**mantissa_bits - 1)) / 2**mantissa_bits
        decoded.append(2.0 ** (exponent - bias) * (1 + mantissa) if exponent else 2.0 ** (1 - bias) * mantissa)
    return decoded


FORMATS = {
    E4M3: values(4, 3, 0x7F),
    E5M2: values(5, 2, 0x7C),
}  # E4M3 ends at 0x7E (0x7F is nan), E5M2 at 0x7B (0x7C inf)


def nearest(x: Tensor, dtype: torch.dtype) -> Tensor:
    """float64: the representable value nearest to each element, the one with an even code if there are two."""
    table = torch.tensor(FORMATS[dtype], dtype=torch.float64)
    distances = (table - x.double().abs()[..., None]).abs()
    tied = distances == distances.amin(-1, keepdim=True)
    even = tied & (torch.arange(len(table)) % 2 == 0)
    return table[(tied + 1 * even).argmax(-1)].copysign(x.double())


def test_the_tables_are_the_formats() -> None:
    assert FORMATS[E4M3][-1] == 448 and FORMATS[E4M3][1] == 2**-9
    assert FORMATS[E5M2][-1] == 57344 and FORMATS[E5M2][1] == 2**-16


@pytest.mark.parametrize(
    ("dtype", "pairs"),
    [
        (E4M3, [(1.0, 1.0), (1.0625, 1.0), (1.1875, 1.25), (17, 16), (19, 20), (-19, -20),  # ties go to even
                (448, 448), (464, 448), (479, 448), (1e9, 448), (-1e9, -448), (INF, 448), (-INF, -448),  # saturates
                (2**-9, 2**-9), (2**-10, 0.0), (3 * 2**-10, 2**-8), (2**-11, 0.0), (0.0, 0.0)]),  # subnormals
        (E5M2, [(1.0, 1.0), (1.125, 1.0), (1.375, 1.5), (9, 8), (11, 12), (-11, -12),
                (57344, 57344), (60000, 57344), (61440, 57344), (65536, 57344), (-1e9, -57344), (INF, 57344),
                (2**-16, 2**-16), (2**-17, 0.0), (3 * 2**-17, 2**-15), (0.0, 0.0)]),
    ],
)  # fmt: skip
def test_cast(dtype: torch.dtype, pairs: list[tuple[float, float]]) -> None:
    given, wanted = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    got = cast(given, ONE, dtype)
    assert got.dtype == dtype
    assert got.float().tolist() == wanted.tolist()
    assert cast(torch.tensor(NAN), ONE, dtype).isnan()


@pytest.mark.parametrize("dtype", FORMATS)
def test_cast_is_the_nearest_value(dtype: torch.dtype) -> None:
    """Numbers of all sizes, among them every value, every middle of two, and what lies next to a middle."""
    table = torch.tensor(FORMATS[dtype], dtype=torch.float64)
    middles = (table[1:] + table[:-1]) / 2
    random = torch.randn(500, dtype=torch.float64) * torch.exp2(torch.randint(-20, 18, (500,)).double())
    given = torch.cat([table, middles, middles * (1 + 2**-20), middles * (1 - 2**-20), random]).float()
    given = torch.cat([given, -given])
    assert torch.equal(cast(given, ONE, dtype).double(), nearest(given, dtype))


def test_rounding_is_divided_by_the_scale() -> None:
    # 0.7 * 100 = 70, in [64, 128) where E4M3 has steps of 8: 72. 5 * 100 = 500: 448.
    x, scale = torch.tensor([0.7, -5.0]), torch.tensor(100.0)
    assert cast(x, scale, E4M3).float().tolist() == [72, -448]
    torch.testing.assert_close(rounded(x, scale, E4M3), torch.tensor([0.72, -4.48]), rtol=2**-23, atol=0)


@pytest.mark.parametrize(
    ("rule", "dtype", "pairs"),
    [
        (scale_of, E4M3, [(3.5, 128), (7, 64), (448, 1), (1000, 0.448), (0, 1), (INF, 1), (NAN, 1),
                          (TINY, FP32_LARGEST)]),
        (scale_of, E5M2, [(7, 8192), (57344, 1), (0, 1), (1e-4, 573440000), (TINY, FP32_LARGEST)]),
        # 448/3 = 149.3 and 448/3.6 = 124.4, rounded down to powers of two.
        (power_of_two_scale, E4M3, [(3, 128), (3.5, 128), (3.6, 64), (448, 1), (449, 0.5), (0, 1), (TINY, 2.0**127)]),
        # 2^-e with 448 * 2^e the first that is not below amax.
        (e8m0_scale, E4M3, [(3.5, 128), (3.6, 64), (3, 128), (224, 2), (448, 1), (449, 0.5), (900, 0.25),
                            (2e38, 2.0**-119)]),
    ],
)  # fmt: skip
def test_scales(rule, dtype: torch.dtype, pairs: list[tuple[float, float]]) -> None:
    amax, wanted = (torch.tensor(column, dtype=torch.float32) for column in zip(*pairs, strict=True))
    torch.testing.assert_close(rule(amax, dtype), wanted, rtol=2**-23, atol=0)


def test_e8m0_reaches_its_ends() -> None:
    """Exponents are stored with a bias of 127 in eight bits: the scale of nothing is the largest, 2^127."""
    assert e8m0_scale(torch.tensor([0.0, TINY, FP32_LARGEST]), E4M3).tolist() == [2.0**127, 2.0**127, 2.0**-120]


def test_history_and_scale_written_out() -> None:
    """Three tensors over a history of three; the second was not seen in this pass."""
    history = torch.tensor([[4.0, 0.0, 14.0], [7.0, 7.0, 1.0], [2.0, 5.0, 28.0]])
    scale = torch.tensor([1.0, 9.0, 3.0])
    rolled = [[0, 0, 0], [2, 7, 28], [4, 5, 14]]
    for compute, margin, wanted in (
        ("max", 0, [64, 64, 16]),
        ("max", 2, [16, 16, 4]),
        ("most_recent", 0, [112, 9, 32]),
        ("most_recent", 1, [56, 9, 16]),
    ):
        new_history, new_scale = updated(history, scale, 448.0, compute, margin)
        assert (new_history.tolist(), new_scale.tolist()) == (rolled, wanted)


def test_history_of_strange_numbers() -> None:
    """Nothing seen ever, inf, nan, and so little that the scale is not a number of fp32; then one entry of history."""
    history = torch.tensor([[0.0, INF, NAN, TINY], [0.0, 2.0, 2.0, 0.0]])
    new_history, new_scale = updated(history, torch.tensor([1.0, 5.0, 6.0, 7.0]), 57344.0, "max", 0)
    assert new_scale.tolist() == [1.0, 5.0, 6.0, FP32_LARGEST]
    assert new_history[:, [0, 1, 3]].tolist() == [[0, 0, 0], [0, INF, TINY]] and new_history[1, 2].isnan()
    new_history, new_scale = updated(torch.tensor([[14.0]]), ONE[None], 448.0, "max", 0)
    assert (new_history.tolist(), new_scale.tolist()) == ([[0.0]], [32.0])


def test_the_oldest_is_forgotten() -> None:
    """An outlier of 100 decides for as many passes as the history is long, and is then gone."""
    history, scale, scales = torch.zeros(3, 1), torch.ones(1), []
    for seen in (100.0, 1.0, 2.0, 4.0, 1.0):
        history[0] = seen
        history, scale = updated(history, scale, 448.0, "max", 0)
        scales.append(scale.item())
    assert scales == pytest.approx([4.48, 4.48, 4.48, 112, 112], rel=1e-6)


def test_current_scaling_by_hand() -> None:
    """amax 7: E4M3 takes 7 to 448 by 64, E5M2 to 57344 by 8192."""
    x = torch.tensor([[7.0, -0.3, 0.0, 0.01]])
    # 0.3 * 64 = 19.2: 20 (steps of 2 from 16). 0.01 * 64 = 0.64: 0.625 (steps of 1/16 from 1/2).
    assert current(x, "x", 1).tolist() == current(x, "w", 0).tolist() == [[7.0, -0.3125, 0.0, 0.625 / 64]]
    # 0.3 * 8192 = 2457.6: 2560 (steps of 512 from 2048). 0.01 * 8192 = 81.92: 80 (steps of 16 from 64).
    assert current(x, "dy", 1).tolist() == [[7.0, -0.3125, 0.0, 80 / 8192]]
    assert current(torch.zeros(2, 2), "x", 1).tolist() == [[0, 0], [0, 0]]


def blocks_by_loop(x: Tensor, rows: int, columns: int) -> Tensor:
    """Block by block in float64, scaled by the largest power of two that keeps the block within 448."""
    out = torch.zeros_like(x, dtype=torch.float64)
    for top in range(0, x.shape[0], rows):
        for left in range(0, x.shape[1], columns):
            piece = x[top : top + rows, left : left + columns].double()
            scale = 2.0 ** math.floor(math.log2(448 / piece.abs().max().item())) if piece.any() else 1.0
            out[top : top + rows, left : left + columns] = nearest(piece * scale, E4M3) / scale
    return out


@pytest.mark.parametrize(
    ("recipe", "operand", "dim", "rows", "columns"),
    [
        ("block", "x", 1, 1, 128), ("block", "x", 0, 128, 1), ("block", "dy", 1, 1, 128), ("block", "dy", 0, 128, 1),
        ("block", "w", 1, 128, 128), ("block", "w", 0, 128, 128),
        ("mxfp8", "x", 1, 1, 32), ("mxfp8", "x", 0, 32, 1), ("mxfp8", "dy", 1, 1, 32), ("mxfp8", "dy", 0, 32, 1),
        ("mxfp8", "w", 1, 1, 32), ("mxfp8", "w", 0, 32, 1),
    ],
)  # fmt: skip
def test_blocks(recipe: str, operand: str, dim: int, rows: int, columns: int) -> None:
    """Blocks that the matrix does not fill, some of zeros, with elements of very different sizes."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(150, 140, generator=generator) * torch.exp2(
        torch.randint(-12, 12, (150, 140), generator=generator).float()
    )
    x[:40, :40] = 0
    got = {"block": block, "mxfp8": mxfp8}[recipe](x, operand, dim)
    assert torch.equal(got.double(), blocks_by_loop(x, rows, columns))
    assert not torch.equal(got, x)


def test_a_block_does_not_care_for_its_neighbours() -> None:
    x = torch.tensor([[0.001, 0.0013, 300.0, 310.0]])
    together = rounded_in_blocks(x, 1, 4, power_of_two_scale, E4M3)
    apart = rounded_in_blocks(x, 1, 2, power_of_two_scale, E4M3)
    # 0.0013 * 2^18 = 340.8: 352 (steps of 32 from 256); with the scale of 310, which is 1, both are next to 2^-9.
    assert together.tolist() == [[2**-9, 2**-9, 288.0, 320.0]]
    assert apart.tolist() == [[256 / 2**18, 352 / 2**18, 288.0, 320.0]]
