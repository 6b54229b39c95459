"""What a checkpoint holds: the name of every tensor, and which part of it a rank has, stores and loads.

    decoder.layers.17.mlp.linear_fc1.weight       a weight, in the precision of the run; `visual.…` those of the encoder
    unet.down_blocks.1.…, vae.encoder.…           instead of these: a weight of the visual decoder
    optimizer.param.decoder.layers.17.…           its fp32 master (none where the weight is fp32 itself)
    optimizer.exp_avg.…, optimizer.exp_avg_sq.…   Adam's moments
    average.unet.…                                the moving average of the visual decoder's weights, if it is kept
    fp8.decoder.layers.17.forward.scale           of emulated delayed scaling; also `backward`, also `history`
    rng.rank_00003.cpu                            states of the random generators of each rank

Shapes are those of the whole tensor, whatever the layout: layers have their number in the whole decoder,
tensor-parallel parts their place, and the vocabulary no padding. Each rank stores what its optimizer owns, a run of
elements of each parameter, weights included: so all ranks write about as much, none writes what another one does, and
nothing is gathered.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from emu2_megatron.checkpoint.pieces import Pieces, Region, Shape, add
from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.model.parameters import GATED_MLP, QKV, REPLICATED, ROW, STORED_NAMES, VOCABULARY, Rule, rule_of
from emu2_megatron.parallel.wrap import Engine, Owned
from emu2_megatron.platform.device import IS_CUDA

State = dict[str, Pieces]


def _replicated(model: ModelConfig, shape: Shape, rank: int, tp: int) -> tuple[Shape, list[Region]]:
    return shape, [Region(0, shape[0], (0,) * len(shape))]


def _columns(model: ModelConfig, shape: Shape, rank: int, tp: int) -> tuple[Shape, list[Region]]:
    rows, columns = shape
    return (rows, columns * tp), [Region(0, rows, (0, columns * rank))]


def _rows(model: ModelConfig, shape: Shape, rank: int, tp: int) -> tuple[Shape, list[Region]]:
    rows, columns = shape
    return (rows * tp, columns), [Region(0, rows, (rows * rank, 0))]


def _real_rows(model: ModelConfig, shape: Shape, rank: int, tp: int) -> tuple[Shape, list[Region]]:
    rows, columns = shape
    vocabulary = model.decoder.vocab_size
    real = min(max(0, vocabulary - rows * rank), rows)
    return (vocabulary, columns), [Region(0, real, (rows * rank, 0))]


def _two_halves(model: ModelConfig, shape: Shape, rank: int, tp: int) -> tuple[Shape, list[Region]]:
    half, columns = shape[0] // 2, shape[1]
    gate, up = Region(0, half, (half * rank, 0)), Region(half, half, (half * (tp + rank), 0))
    return (2 * half * tp, columns), [gate, up]


_PLACES: dict[Rule, Callable[[ModelConfig, Shape, int, int], tuple[Shape, list[Region]]]] = {
    REPLICATED: _replicated,
    ROW: _columns,
    QKV: _rows,
    VOCABULARY: _real_rows,
    GATED_MLP: _two_halves,
}
"""How a parameter is cut over tensor-parallel ranks, to: (model, this rank's shape, tp rank, tp) to the shape of the
whole and where this rank's rows stand in it."""


@dataclass(frozen=True)
class _Entry:
    """A parameter that this rank has."""

    key: str
    """Its name in a checkpoint."""
    parameter: nn.Parameter
    shape: Shape
    """Of the whole."""
    regions: list[Region]
    holder: int
    """This rank's number among those that have the same part of it."""
    holders: int
    """How many they are; 0 for a tensor-parallel rank that stores nothing of it, as the first one has the same."""
    number: int
    """Of the parameter, the same for all holders."""

    def pieces(self, flat: Tensor, start: int = 0) -> Pieces:
        """A run of elements of it, or of something that has one for each of its elements; views of `flat`."""
        pieces = Pieces(self.shape, flat.dtype)
        add(pieces, tuple(self.parameter.shape), self.regions, start, flat)
        return pieces


def weights(engine: Engine) -> State:
    """All weights of this rank, to be loaded into."""
    return {entry.key: entry.pieces(_flat(entry.parameter)) for entry in _entries(engine)}


def stored(engine: Engine) -> State:
    """Everything this rank stores, as views of the memory it is in.

    Preconditions: the weights are settled (`Engine.settle`), the optimizer has moments (`adam.make_moments`).
    """
    owned = engine.owned()
    state: State = {}
    for entry in _entries(engine):
        flat = _flat(entry.parameter)
        if entry.parameter in owned and entry.holders:
            own = owned[entry.parameter]
            state[entry.key] = entry.pieces(flat[own.start : own.stop], own.start)
            tensors = _of_optimizer(entry.parameter, own, engine)
            state |= {f"{name}.{entry.key}": entry.pieces(t, own.start) for name, t in tensors.items()}
        elif not entry.parameter.requires_grad and entry.number % max(1, entry.holders) == entry.holder:
            state[entry.key] = entry.pieces(flat)  # nobody owns what is not trained: whole tensors are dealt out
    return {
        key: pieces for key, pieces in {**state, **_scales(engine), **random_states(engine)}.items() if pieces.boxes
    }


def resumed(engine: Engine) -> State:
    """What a run goes on with besides its weights, to be loaded into: masters and moments that this rank owns, scales.
    Precondition: the optimizer has moments."""
    owned = engine.owned()
    state = {
        f"{name}.{entry.key}": entry.pieces(tensor, owned[entry.parameter].start)
        for entry in _entries(engine)
        if entry.parameter in owned
        for name, tensor in _of_optimizer(entry.parameter, owned[entry.parameter], engine).items()
    }
    return {**state, **_scales(engine)}


def random_states(engine: Engine) -> State:
    """Copies of the states of this rank's random generators."""
    states = {"cpu": torch.get_rng_state()}
    if IS_CUDA:
        states["cuda"] = torch.cuda.get_rng_state()
    return {f"rng.rank_{engine.here.rank:05d}.{name}": whole(state) for name, state in states.items()}


def set_random_states(state: State) -> None:
    """The other way, from what was loaded."""
    for name, pieces in state.items():
        (value,) = pieces.boxes.values()
        (torch.cuda.set_rng_state if name.endswith("cuda") else torch.set_rng_state)(value)


def whole(tensor: Tensor) -> Pieces:
    """A tensor that this rank has the whole of."""
    return Pieces(tuple(tensor.shape), tensor.dtype, {(0,) * tensor.dim(): tensor})


def _entries(engine: Engine) -> Iterator[_Entry]:
    """Every parameter of this rank."""
    here, model = engine.here, engine.step.config.model
    replica, replicas = here.dp_rank * here.cp_size + here.cp_rank, here.dp_size * here.cp_size
    for stage, first_layer in zip(engine.stages, engine.first_layers, strict=True):
        for number, (name, parameter) in enumerate(stage.named_parameters()):
            rule, _ = rule_of(name, first_layer)
            shape, regions = _PLACES[rule](model, tuple(parameter.shape), here.tp_rank, here.tp_size)
            stores = rule.dim is not None or here.tp_rank == 0
            yield _Entry(key_of(name, first_layer), parameter, shape, regions, replica, replicas * stores, number)
    for number, (name, parameter) in enumerate(whole_parameters(engine)):
        shape, regions = _replicated(model, tuple(parameter.shape), 0, 1)
        yield _Entry(name, parameter, shape, regions, here.rank, here.world_size, number)


def whole_parameters(engine: Engine) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that every rank has all of, by their names in a checkpoint."""
    for prefix, module in engine.whole.items():
        yield from ((f"{prefix}.{name}", parameter) for name, parameter in module.named_parameters())


def key_of(name: str, first_layer: int) -> str:
    """The name in a checkpoint of a decoder stage's parameter, whose layers count from `first_layer`."""
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        return name
    return f"decoder.layers.{int(match[1]) + first_layer}.{STORED_NAMES.get(match[2], match[2])}"


def _of_optimizer(parameter: nn.Parameter, owned: Owned, engine: Engine) -> dict[str, Tensor]:
    """What is kept of a parameter besides itself, by how its names begin."""
    found = {f"optimizer.{name}": tensor for name, tensor in owned.moments.items()}
    if parameter.dtype is not torch.float32:
        found["optimizer.param"] = owned.master
    if parameter in engine.average:
        found["average"] = engine.average[parameter]
    return found


def _scales(engine: Engine) -> State:
    """Scales of delayed scaling, alike on all ranks that have the layer."""
    return {
        f"fp8.decoder.layers.{layer}.{name}": whole(tensor)
        for stage in engine.stages
        if stage.delayed_scaling
        for layer, name, tensor in stage.delayed_scaling.by_layer()
    }


def _flat(parameter: nn.Parameter) -> Tensor:
    return parameter.data.view(-1)
