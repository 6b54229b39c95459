"""Reading a checkpoint into any layout."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata

from emu2_megatron.checkpoint import adam, files, metadata
from emu2_megatron.checkpoint.pieces import Pieces, Reading, first_rows
from emu2_megatron.checkpoint.state import State, random_states, resumed, set_random_states, weights, whole
from emu2_megatron.errors import CheckpointError
from emu2_megatron.model.eva_vit import resize_positions
from emu2_megatron.model.parameters import RULES, VOCABULARY, stored_parameters
from emu2_megatron.parallel import average
from emu2_megatron.parallel.topology import of_all_ranks
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.platform.device import device

_POSITIONS = "visual.pos_embed"
"""The one tensor whose shape depends on the size of pictures."""
_VOCABULARY = [name for name, (rule, _) in RULES.items() if rule is VOCABULARY]
_MASTER = "optimizer.param."
_BESIDES_WORDS = {
    "average": "of the moving average",
    "optimizer": "the optimizer's",
    "fp8": "scales of FP8",
    "rng": "states of random generators",
}
_BESIDES = tuple(f"{kind}." for kind in _BESIDES_WORDS)
"""Beginnings of the names of what is no weight."""
T = TypeVar("T")


def load_weights(path: str | Path, engine: Engine) -> tuple[dict[str, Any], list[str]]:
    """Fill a rank's share of the weights, whatever layout they were saved from; called by all ranks together.

    If they were trained on pictures of another size (model.encoder.image_size), the encoder's position table is resized
    to this run's. If the vocabulary has grown, the rows of new tokens become the mean of the others. The optimizer's
    fp32 masters are refreshed from the weights.

    Returns:
        What its trainer.json says, and what was taken, changed and left, in words.

    Raises:
        CheckpointError: the folder is missing, incomplete or damaged, its tensors are not this model's, or have numbers
            that are not finite.
    """
    path = Path(path)
    with _reading(path) as (trainer, contents):
        shapes, changes = _load_weights(path, engine, contents, grows=True)
    engine.optimizer.reload_model_params()
    if engine.average:
        average.restart(engine)
    taken = sum(not name.startswith(_BESIDES) for name in shapes)
    left = Counter(name.split(".")[0] for name in shapes if name.startswith(_BESIDES))
    return trainer, [
        f"{taken} weights taken from {path}, none is missing",
        *changes,
        *(f"{count} tensors left there: {_BESIDES_WORDS[kind]}" for kind, count in sorted(left.items())),
    ]


def load(path: str | Path, engine: Engine) -> dict[str, Any]:
    """Everything a run needs to go on as if it had not stopped; arguments, result and errors as of `load_weights`.

    A checkpoint without an optimizer's state (a converted one) is refused.
    """
    path = Path(path)
    with _reading(path) as (trainer, contents):
        shapes, _ = _load_weights(path, engine, contents)
        if not any(name.startswith("optimizer.") for name in shapes):
            raise CheckpointError(
                f"{path} has weights alone, no optimizer's state: nothing to resume; start from it with "
                "checkpoint.initialize_from"
            )
        engine.optimizer.reload_model_params()
        adam.make_moments(engine)
        # A master of a run whose weights were fp32 is that weight; so is, the other way round, an fp32 weight a master.
        state = {_stored_as(name, shapes): pieces for name, pieces in resumed(engine).items() if _wanted(name, shapes)}
        state |= {
            _MASTER + name: pieces
            for name, pieces in weights(engine).items()
            if pieces.dtype is torch.float32 and _MASTER + name in shapes
        }
        random = {name: pieces for name, pieces in random_states(engine).items() if name in shapes}
        _read(path, {**state, **random}, contents)
    if engine.average and not any(name.startswith("average.") for name in shapes):
        average.restart(engine)  # of a run that kept none, it begins here
    set_random_states(random)
    adam.restore_scalars(engine, trainer["optimizer"])
    return trainer


def check_files(path: Path, table: dict[str, dict[str, int]]) -> None:
    """Compare all files with what was written; the ranks share the work, and all raise CheckpointError if one finds
    anything wrong."""
    wrong = files.verify(path, table, dist.get_rank(), dist.get_world_size())
    if wrong := [problem for of_rank in of_all_ranks(wrong) for problem in of_rank]:
        raise CheckpointError(_shortened(wrong))


@contextmanager
def _reading(path: Path) -> Iterator[tuple[dict[str, Any], Metadata]]:
    """Hold a checkpoint whose files are as they were written; gives what its trainer.json says, and its table of
    contents. All ranks or none."""
    held = files.reading(path)
    _agreed(held.__enter__)
    try:
        trainer = _agreed(lambda: files.read_trainer(path))
        check_files(path, trainer["files"])
        yield trainer, _agreed(lambda: metadata.table(path, trainer["files"]))
    finally:
        held.__exit__(None, None, None)


def _agreed(action: Callable[[], T]) -> T:
    """What an action gives on this rank; if it raises CheckpointError on any, it does on all: a rank that turned to
    another checkpoint while the others read this one would wait for them, and they for it."""
    result, problem = None, ""
    try:
        result = action()
    except CheckpointError as error:
        problem = str(error)
    if problems := [of_rank for of_rank in of_all_ranks(problem) if of_rank]:
        raise CheckpointError(problem or problems[0])
    return result  # type: ignore[return-value]


def _shortened(problems: Sequence[str]) -> str:
    return "; ".join(problems[:3]) + (f"; and {len(problems) - 3} more" if len(problems) > 3 else "")


def _load_weights(
    path: Path, engine: Engine, contents: Metadata, grows: bool = False
) -> tuple[dict[str, tuple[int, ...]], list[str]]:
    """Returns the shapes of all tensors in the checkpoint, and what was changed, in words."""
    shapes, changes = metadata.shapes(contents), list[str]()
    state = weights(engine)
    table, wanted = shapes.get(_POSITIONS, ()), state[_POSITIONS].shape if _POSITIONS in state else (0, 0, 0)
    resizes = table != wanted and _is_table(table, wanted[2])
    if resizes:
        # In fp32, so that it is rounded once, after it was resized.
        state[_POSITIONS] = whole(torch.empty(table, dtype=torch.float32, device=device()))
        changes.append(f"{_POSITIONS} resized from {table[1] - 1} to {wanted[1] - 1} patches")
    model = engine.step.config.model
    tables = {}
    if grows:
        fewer = [name for name in _VOCABULARY if 0 < shapes.get(name, (0,))[0] < model.decoder.vocab_size]
        tables = {name: shapes[name] for name in fewer}
        changes += [f"{name} grown from {shapes[name][0]} to {model.decoder.vocab_size} rows" for name in fewer]
    grown = {name: state[name] for name in tables if name in state}
    state |= {name: first_rows(pieces, tables[name][0]) for name, pieces in grown.items()}
    known = set(stored_parameters(model)) if engine.stages else set(state)  # of a pipeline, a rank has a part
    surplus = sorted({name for name in shapes if not name.startswith(_BESIDES)} - known)
    missing = sorted(set(state) - set(shapes))
    wrong = sorted(name for name in set(state) & set(shapes) if tuple(state[name].shape) != shapes[name])
    problems = [f"{name} has shape {list(shapes[name])}, the model wants {list(state[name].shape)}" for name in wrong]
    problems += [f"it has no {name}" for name in missing] + [f"the model has no {name}" for name in surplus]
    if problems:
        raise CheckpointError(f"{path} cannot be loaded into this model: {_shortened(problems)}")
    _read(path, state, contents)
    if resizes:
        (stored,) = state[_POSITIONS].boxes.values()
        engine.encoder.pos_embed.data.copy_(resize_positions(stored, wanted[1] - 1))
    for name in sorted(tables):
        _fill_new_rows(path, contents, name, tables[name], grown.get(name))
    return shapes, changes


def _fill_new_rows(path: Path, contents: Metadata, name: str, shape: tuple[int, ...], grown: Pieces | None) -> None:
    """Give the rows beyond a stored table, where this rank has some, the mean of the table."""
    new = [
        box[max(0, shape[0] - row) :]
        for (row, _), box in (grown.boxes.items() if grown else ())
        if row + len(box) > shape[0]
    ]
    everything = torch.empty(shape if new else (0, *shape[1:]), dtype=torch.float32)
    # All ranks read, if only nothing: reading is a collective.
    _read(path, {name: whole(everything)} if new else {}, contents)
    for box in new:
        box.copy_(everything.mean(0))


def _read(path: Path, state: State, contents: Metadata) -> None:
    try:
        state_dict_loader.load(state, storage_reader=metadata.Reader(path, contents), planner=Reading())
    except CheckpointException as error:  # no Exception: what a rank's reading failed by, on all ranks alike
        rank, (first, _) = min(error.failures.items())
        raise CheckpointError(f"{path} cannot be loaded into this model: rank {rank}: {first}") from error
    bad = {name for name, pieces in state.items() if not pieces.finite}
    if bad := set().union(*of_all_ranks(bad)):
        raise CheckpointError(f"{path} has numbers that are not finite: in {_shortened(sorted(bad))}")


def _wanted(name: str, shapes: dict[str, tuple[int, ...]]) -> bool:
    """Scales and random states may be missing: of another recipe, or more ranks."""
    return name.startswith("optimizer.") or name in shapes


def _stored_as(name: str, shapes: dict[str, tuple[int, ...]]) -> str:
    weight = name.removeprefix(_MASTER)
    return weight if name.startswith(_MASTER) and name not in shapes else name


def _is_table(shape: tuple[int, ...], width: int) -> bool:
    """Whether this is a position table of an encoder of this width: CLS and a square of patches."""
    if len(shape) != 3 or shape[0] != 1 or shape[1] < 2 or shape[2] != width:
        return False
    return isqrt(shape[1] - 1) ** 2 == shape[1] - 1
