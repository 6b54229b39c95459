"""Seeded bugs: each must be reported by the tool that is named for it, so that silence of the tools means something.

A mutation is a piece of a kernel's text and what takes its place. The tools:

    numbers    the checks of kernel_cases.py, one schedule
    bits       outputs that depend on the schedule or the number of blocks
    emulator   a kernel that the emulator stops: threads that miss each other, wrong masks
    address, undefined, thread    the sanitizers of these names
"""

import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from emulation import (
    FAR,
    KERNELS,
    REPOSITORY,
    Emulated,
    Stopped,
    compile_sources,
    driver_cases,
    link,
    run_driver,
)
from kernel_cases import Rows, all_checks, check_loss_scale, equal_to_the_bit, matrix, scalar


class Mutation(NamedTuple):
    tool: str
    file: str
    old: str
    new: str


LOSS, ROW, POOL = "regression_loss.cu", "interleave.cu", "pool.cu"
MUTATIONS = {
    "no barrier before the sums of the warps are read": Mutation(
        "thread", LOSS, "  __syncthreads();\n  x = threadIdx.x < kWarps", "  x = threadIdx.x < kWarps"
    ),
    "all lanes write their warp's sum": Mutation("thread", LOSS, "if (threadIdx.x % kWarp == 0) sums[", "sums["),
    "a block counts as done before all its warps have written": Mutation(
        "thread", LOSS, "  __syncthreads();  // this block has written\n", ""
    ),
    "no fence before the block counts as done": Mutation(
        "thread", LOSS, "    __threadfence();\n    last = ", "    last = "
    ),
    "no fence behind the count": Mutation("thread", LOSS, "back to 0\n    __threadfence();\n", "back to 0\n"),
    "no barrier before the verdict on the last block is read": Mutation(
        "thread", LOSS, "  __syncthreads();\n  return last;", "  return last;"
    ),
    "the last block is taken for the last but one": Mutation(
        "numbers", LOSS, "== gridDim.x - 1;  // the last", "== gridDim.x - 2;  // the last"
    ),
    "the counter is not reset": Mutation(
        "numbers", LOSS, "atomicInc(counter, gridDim.x - 1)", "atomicInc(counter, gridDim.x)"
    ),
    "the final sum starts where the last block's number says": Mutation(
        "bits",
        LOSS,
        "for (int row = threadIdx.x; row < rows;",
        "for (int row = (threadIdx.x + blockIdx.x) % kThreads; row < rows;",
    ),
    "half a warp in the mask of a shuffle": Mutation("emulator", LOSS, "0xffffffffu", "0x0000ffffu"),
    "lanes leave before a shuffle that names them": Mutation(
        "emulator",
        LOSS,
        "  x = threadIdx.x < kWarps ? sums[threadIdx.x] : 0.0f;",
        "  if (threadIdx.x >= kWarps) return 0.0f;\n  x = sums[threadIdx.x];",
    ),
    "a barrier that only one warp reaches": Mutation(
        "emulator",
        LOSS,
        "  __syncthreads();  // this block",
        "  if (threadIdx.x < kWarp) __syncthreads();  // this block",
    ),
    "the shuffles begin at half the distance": Mutation(
        "numbers", LOSS, "int distance = kWarp / 2;", "int distance = kWarp / 4;"
    ),
    "shared memory for one warp too few": Mutation("undefined", LOSS, "float sums[kWarps];", "float sums[kWarps - 1];"),
    "no zeros where nothing is predicted": Mutation("numbers", LOSS, "      zero_row<V>(row_gradient, width);\n", ""),
    "rows without a target are read": Mutation("address", LOSS, "if (source >= 0) {", "if (source >= EMU2_NOTHING) {"),
    "sums are kept in the dtype": Mutation(
        "numbers", LOSS, "sum += error * error;", "sum = to_float(from_float<T>(sum + error * error));"
    ),
    "the loss scale comes in behind the rounding": Mutation(
        "numbers",
        LOSS,
        "from_float<T>(factor * error);",
        "from_float<T>(to_float(from_float<T>(factor / 65536.0f * error)) * 65536.0f);",
    ),
    "a slot just behind the targets is let through": Mutation(
        "numbers", LOSS, "if (source >= target_rows) __trap();", "if (source > target_rows) __trap();"
    ),
    "vectors wherever the width allows": Mutation(
        "undefined",
        LOSS,
        "aligned(16, width * int64_t(sizeof(T)), predicted, target, gradient)",
        "aligned(16, width * int64_t(sizeof(T)))",
    ),
    "the tail is one element too long": Mutation("address", LOSS, "+ first; i < elements;", "+ first; i <= elements;"),
    "the tail is forgotten": Mutation("numbers", LOSS, "+ first; i < elements;", "+ first; i < 0;"),
    "the offset of a target has 32 bits": Mutation(
        "undefined", LOSS, "target + int64_t(source) * width", "target + source * width"
    ),
    "one chunk too many is loaded": Mutation(
        "address", ROW, "if (from != nullptr && i < chunks)", "if (from != nullptr && i <= chunks)"
    ),
    "the offset of a visual row has 32 bits": Mutation(
        "undefined", ROW, "from = visual + int64_t(source) * chunks", "from = visual + source * chunks"
    ),
    "the text's gradient stays where a visual row stands": Mutation(
        "numbers", ROW, "source == EMU2_TEXT ? from : nullptr", "from"
    ),
    "windows begin in the wrong row of patches": Mutation(
        "numbers", POOL, "place / across * window * side", "place / across * side"
    ),
    "CLS is not left out": Mutation("numbers", POOL, "(1 + side * side) + 1 + corner)", "(1 + side * side) + corner)"),
    "CLS gets a gradient": Mutation("numbers", POOL, "patch < 0 ? nullptr : gradient", "gradient"),
    "only one of two pointers is looked at": Mutation(
        "undefined", POOL, "aligned(V * sizeof(Out), width * int64_t(sizeof(Out)), out)", "true"
    ),
}

VARIANT = {"numbers": "plain", "bits": "plain", "emulator": "plain", "undefined": "address"}  # others: their own name
CHECKS = {LOSS: ("regression_loss", "rescale"), ROW: ("interleave",), POOL: ("pool",)}
CASES = {LOSS: ("rows", "rescale"), ROW: ("rows",), POOL: ("windows",)}  # of the driver


def mutated(text: str, mutation: Mutation) -> str:
    assert text.count(mutation.old) == 1, f"{mutation.file} has this {text.count(mutation.old)} times: {mutation.old}"
    return text.replace(mutation.old, mutation.new)


@pytest.fixture(scope="session")
def builds(objects: Callable[[str], dict[str, Path]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A library for each mutation, or a program where its tool is a sanitizer. Only the mutated file is compiled."""
    root = tmp_path_factory.mktemp("mutations")
    unmodified = {variant: objects(variant) for variant in ("plain", "address", "thread")}

    def build(number: int, mutation: Mutation) -> Path:
        folder = root / str(number)
        shutil.copytree(KERNELS, folder)
        source = folder / mutation.file
        source.write_text(mutated(source.read_text(), mutation))
        variant = VARIANT.get(mutation.tool, mutation.tool)
        (fresh,) = compile_sources([source], folder, variant)
        parts = unmodified[variant] | {mutation.file: fresh}
        return link(list(parts.values()), folder / "build", variant, library=variant == "plain")

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(MUTATIONS, pool.map(build, range(len(MUTATIONS)), MUTATIONS.values()), strict=True))


def first_report(library: Path, file: str) -> str:
    """numbers, bits or emulator: what is found first, looking in this order at each check; empty if nothing is."""
    kernels = Emulated(library)
    checks = {name: check for name, check in all_checks().items() if name.startswith(CHECKS[file])}
    try:
        for check in checks.values():
            check(kernels)
        if file == LOSS:
            check_loss_scale(kernels)
            slot = torch.full((1,), 2, dtype=torch.int32)
            two, one = matrix(Rows(2, 0, 8), 0, (2, 8), torch.float32, "cpu"), scalar(1, "cpu")
            with pytest.raises(Stopped, match="trap"):
                kernels.regression_loss(two[:1], two, slot, one, one, True)
        for check in checks.values():
            outputs = []
            for multiprocessors, seed in ((2, 0), (3, 1)):
                kernels.configure(multiprocessors, seed)
                outputs.append(check(kernels))
            if not all(map(equal_to_the_bit, *outputs)):
                return "bits"
    except (AssertionError, pytest.fail.Exception):
        return "numbers"
    except Stopped:
        return "emulator"
    return ""


def sanitizer_report(driver: Path, file: str) -> str:
    done = run_driver(driver, [*driver_cases(*CASES[file]), *([] if file == POOL else [FAR])], 2, 3)
    for pattern, tool in (
        ("ERROR: AddressSanitizer", "address"),
        ("runtime error: ", "undefined"),
        ("WARNING: ThreadSanitizer: data race", "thread"),
    ):
        if pattern in done.stderr:
            return tool
    return "" if done.returncode == 0 else f"exit {done.returncode}: {done.stdout}{done.stderr}"


@pytest.mark.parametrize("mutation", MUTATIONS.values(), ids=MUTATIONS.keys())
def test_mutation_applies(mutation: Mutation) -> None:
    assert mutated((KERNELS / mutation.file).read_text(), mutation)


def test_documentation_has_them_all() -> None:
    """docs/csrc.md has the table: name and tool of each."""
    page = (REPOSITORY / "docs" / "csrc.md").read_text()
    for name, mutation in MUTATIONS.items():
        assert f"| {name} | `{mutation.file}` | {mutation.tool} |\n" in page


@pytest.mark.slow
@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_caught(name: str, builds: dict[str, Path]) -> None:
    mutation = MUTATIONS[name]
    report = first_report if VARIANT.get(mutation.tool) == "plain" else sanitizer_report
    assert report(builds[name], mutation.file) == mutation.tool
