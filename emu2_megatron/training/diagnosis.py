"""Whose fault a step was that could not be applied, and a copy of its batch to look at.

Every rank notes what is wrong with what it has itself (`note`); all notes together say where it began (`explain`). What
is not finite spreads: from weights or embeddings to losses, from losses to gradients, and from a stage's gradients to
those of the stages before it. So the first of these that is found is blamed.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, from_numpy, nn

from emu2_megatron.checkpoint.state import key_of, whole_parameters
from emu2_megatron.config.schema import TrainingConfig
from emu2_megatron.data.sequence import Features
from emu2_megatron.parallel import topology
from emu2_megatron.parallel.step import Batch
from emu2_megatron.parallel.wrap import Engine
from emu2_megatron.training.step import StepReport

_MOST = 5
"""Names in a message; report.json has them all."""


@dataclass
class Row:
    """A sequence that a rank loaded."""

    sequence: int
    """Its number among its replica's."""
    micro_batch: int
    slot: int
    """Its number in the global batch."""
    keys: list[str]
    shards: list[str]


@dataclass
class Note:
    """What a rank found in what it has itself."""

    rank: int
    replica: int
    stage: int
    peers: list[int]
    """Who its parts of the decoder are data-parallel with; the encoder is with all."""
    weights: list[str] = field(default_factory=list)
    """Parameters that are not finite."""
    embedding_rows: list[int] = field(default_factory=list)
    """Numbers, within the replica, of the sequences that show an embedding which this rank made and is not finite."""
    losses: list[list[float]] = field(default_factory=list)
    """`StepOutput.losses_M2`."""
    gradients: list[str] = field(default_factory=list)
    """Parameters whose gradient is not finite in parts that nobody else's were added to."""
    summed_gradients: list[str] = field(default_factory=list)
    """The same of parts that are sums over data-parallel ranks."""
    rows: list[Row] = field(default_factory=list)


@dataclass
class Cause:
    """Where it began."""

    text: str
    """In words."""
    ranks: list[int]
    rows: list[Row]
    """The sequences concerned; all of a replica if it cannot be said more exactly."""


def note(engine: Engine, training: TrainingConfig, batch: Batch, report: StepReport) -> Note:
    """This rank's findings about the latest step, whose gradients are still there."""
    here = engine.here
    found = Note(here.rank, here.dp_rank, here.pp_rank, dist.get_process_group_ranks(_decoder_group(engine)))
    for name, parameter in _named(engine):
        if not bool(parameter.isfinite().all()):
            found.weights.append(name)
    found.gradients, found.summed_gradients = _bad_gradients(engine)
    found.losses = report.output.losses_M2.tolist()
    found.embedding_rows = batch.bad_sequences(report.output.finite_R, here.replica_rank)
    for i, (row, slot) in enumerate(zip(batch.own, here.slots(training.global_batch_size), strict=True)):
        sequence = i * here.replica_size + here.replica_rank
        found.rows.append(Row(sequence, sequence // training.micro_batch_size, slot, row.keys, row.shards))
    return found


def gathered(mine: Note) -> list[Note]:
    """The notes of all ranks, on all ranks; called by all together."""
    notes = topology.of_all_ranks(mine)
    return list(notes)


def explain(notes: list[Note], finite: bool) -> Cause:
    """Where it began.

    Args:
        notes: of all ranks, by rank.
        finite: the losses and gradients are numbers, and the problem is their size.
    """
    rows = {(n.replica, row.sequence): row for n in notes for row in n.rows}
    of_replica = {n.replica: [row for key, row in sorted(rows.items()) if key[0] == n.replica] for n in notes}
    if finite:
        worst = max(notes, key=lambda n: max((sum(losses) for losses in n.losses), default=float("-inf")))
        sums = [sum(losses) for losses in worst.losses]
        micro_batch = sums.index(max(sums))
        chosen = [row for row in of_replica[worst.replica] if row.micro_batch == micro_batch]
        return _cause(f"most of it is from micro-batch {micro_batch} of rank {worst.rank}", [worst], chosen)
    if guilty := [n for n in notes if n.weights]:
        return _cause(f"not finite: weights {_some(guilty[0].weights)} of rank {_ranks(guilty)}", guilty, [])
    if guilty := [n for n in notes if n.embedding_rows]:
        chosen = [rows[n.replica, sequence] for n in guilty for sequence in n.embedding_rows]
        return _cause(f"not finite: embeddings that rank {_ranks(guilty)} made", guilty, chosen)
    if guilty := [n for n in notes if any(not _finite(sum(losses)) for losses in n.losses)]:
        micro_batches = {
            (n.replica, m) for n in guilty for m, losses in enumerate(n.losses) if not _finite(sum(losses))
        }
        chosen = [row for key, row in sorted(rows.items()) if (key[0], row.micro_batch) in micro_batches]
        first = _some([str(m) for _, m in sorted(micro_batches)])
        return _cause(f"not finite: the loss of micro-batch {first} of rank {_ranks(guilty)}", guilty, chosen)
    guilty = [n for n in notes if n.gradients or _its_own(n, notes)]
    # Through a replica's stages gradients flow from the last to the first.
    last = {n.replica: n.stage for n in sorted(guilty, key=lambda n: n.stage)}
    guilty = [n for n in guilty if n.stage == last[n.replica]]
    names = sorted({name for n in guilty for name in n.gradients or n.summed_gradients})
    chosen = [row for replica in sorted(last) for row in of_replica[replica]]
    if not guilty:
        return Cause("no rank found anything that is not finite: the machine may have erred", [], chosen)
    return _cause(f"not finite: gradients of {_some(names)} of rank {_ranks(guilty)}", guilty, chosen)


def dump(folder: Path, engine: Engine, batch: Batch, notes: list[Note], cause: Cause, problem: str) -> str:
    """Write this rank's share of the batch, and on rank 0 what was found. Returns what went wrong with that.

    `rank_00003.safetensors` has, of every sequence that rank 3 loaded, `slot_00007.tokens_S`, `.roles_S` and
    `.picture_0` (or `.features_0`) and so on; report.json says which samples they are of.
    """
    tensors: dict[str, Tensor] = {}
    for row, sequence in zip(notes[engine.here.rank].rows, batch.own, strict=True):
        slot = f"slot_{row.slot:05d}"
        tensors[f"{slot}.tokens_S"] = from_numpy(sequence.tokens_S)
        tensors[f"{slot}.roles_S"] = from_numpy(sequence.roles_S)
        for i, picture in enumerate(sequence.pictures):
            kind, tensor = ("features", picture.rows_QE) if isinstance(picture, Features) else ("picture", picture)
            tensors[f"{slot}.{kind}_{i}"] = tensor
        tensors |= {f"{slot}.crop_{i}": crop.painted_T3HW for i, crop in enumerate(sequence.crops)}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        copies = {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}
        save_file(copies, folder / f"rank_{engine.here.rank:05d}.safetensors")
        if engine.here.rank == 0:
            report = {"problem": problem, "cause": asdict(cause), "ranks": [asdict(n) for n in notes]}
            (folder / "report.json").write_text(json.dumps(_as_json(report), indent=1))
    except OSError as error:
        return str(error)
    return ""


def _decoder_group(engine: Engine) -> dist.ProcessGroup:
    group: dist.ProcessGroup = engine.wrapped[0].bucket_groups[0].intra_distributed_optimizer_instance_group
    return group


def _named(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    """All parameters of this rank by their names in a checkpoint."""
    for stage, first_layer in zip(engine.stages, engine.first_layers, strict=True):
        yield from ((key_of(name, first_layer), parameter) for name, parameter in stage.named_parameters())
    yield from whole_parameters(engine)


def _bad_gradients(engine: Engine) -> tuple[list[str], list[str]]:
    """`Note.gradients` and `Note.summed_gradients`.

    Of each bucket of gradients a rank gets the sum of one part, in place; in the others its own gradients remain.
    """
    names = {parameter: name for name, parameter in _named(engine)}
    alone: list[str] = []
    summed: list[str] = []
    for group in (group for part in engine.wrapped for group in part.bucket_groups):
        size, rank = (
            group.intra_distributed_optimizer_instance_size,
            group.intra_distributed_optimizer_instance_rank,
        )
        for bucket in group.buckets:
            length = bucket.grad_data.numel() // size
            for parameter in bucket.params_list:
                flat = parameter.main_grad.view(-1)
                before = flat.storage_offset() - bucket.grad_data.storage_offset()
                start, stop = (min(max(0, edge - before), len(flat)) for edge in (rank * length, (rank + 1) * length))
                own = bool(flat[start:stop].isfinite().all())
                others = bool(flat[:start].isfinite().all()) and bool(flat[stop:].isfinite().all())
                if not others or (not own and size == 1):
                    alone.append(names[parameter])
                if not own:
                    summed.append(names[parameter])
    return alone, summed


def _its_own(n: Note, notes: list[Note]) -> bool:
    """Whether some sum of a rank is bad and no other rank's share in it is known to be: then its own was."""
    return any(
        not any(name in other.gradients for other in notes if name.startswith("visual.") or other.rank in n.peers)
        for name in n.summed_gradients
    )


def _cause(text: str, guilty: list[Note], rows: list[Row]) -> Cause:
    keys = [key for row in rows for key in row.keys]
    shards = sorted({Path(shard).name for row in rows for shard in row.shards})
    if rows:
        text += f"; samples {_some(keys)}" if keys else f"; slots {_some([str(row.slot) for row in rows])}"
        text += f" of {_some(shards)}" if shards else ""
    return Cause(text, [n.rank for n in guilty], rows)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - _MOST} more" if len(names) > _MOST else ""
    return ", ".join(names[:_MOST]) + more


def _ranks(notes: list[Note]) -> str:
    return _some([str(n.rank) for n in notes])


def _finite(number: float) -> bool:
    return abs(number) < float("inf")


def _as_json(value: Any) -> Any:
    """JSON has no word for what is not finite."""
    if isinstance(value, dict):
        return {name: _as_json(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_as_json(item) for item in value]
    return str(value) if isinstance(value, float) and not _finite(value) else value
