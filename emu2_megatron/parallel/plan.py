"""Which layouts can train a configuration on so many GPUs, best first; and if none can, what would make one.

Searched: tensor-, sequence-, context-, (interleaved) pipeline- and data-parallel sizes, the micro-batch, recompute;
and, if the encoder is trained, its micro-batch and whether its activations are kept. Everything else stays as it is.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from operator import attrgetter
from typing import Any

from emu2_megatron.config.describe import yaml_value
from emu2_megatron.config.schema import Config
from emu2_megatron.config.validate import divisors, tensor_parallel_sizes, validate
from emu2_megatron.errors import ConfigError
from emu2_megatron.parallel.estimate import RESERVED_BYTES, Estimate, estimate
from emu2_megatron.platform.gpus import GPU, GPUS

SEARCHED = (
    "parallel.tensor_parallel_size", "parallel.context_parallel_size", "parallel.pipeline_parallel_size",
    "parallel.virtual_pipeline_parallel_size", "parallel.sequence_parallel", "training.micro_batch_size",
    "training.recompute", "training.encoder_micro_batch_size", "training.encoder_keep_activations",
    "parallel.pipeline_layout", "training.recompute_layers",
)  # fmt: skip
"""Fields that a plan chooses, unless they are fixed. The last two it leaves at null and 0."""
_RECOMPUTE = frozenset({"training.recompute", "training.recompute_layers"})
"""Who fixes one fixes the other."""
LARGEST_WORLD = 4096
"""Where the search for a number of GPUs that would do ends."""


@dataclass(frozen=True)
class Request:
    """What to plan for."""

    config: Config
    gpus: int
    gpu: str
    """Name in `GPUS`."""
    images: float
    """Pictures in a sequence, on average."""
    fixed: frozenset[str] = frozenset()
    """Dotted keys that the plan must leave as the configuration has them."""
    precomputed: bool = False
    """Whether pictures come as features from `emu2 embed`."""

    @property
    def device(self) -> GPU:
        """The GPU."""
        return GPUS[self.gpu]

    @property
    def memory_limit(self) -> float:
        """Bytes of a GPU that a run can have."""
        return self.device.memory - RESERVED_BYTES


@dataclass(frozen=True)
class Plan:
    """The answer."""

    request: Request
    layouts: list[Estimate]
    """Those that fit, fastest first."""
    too_large: int
    """Legal layouts that do not fit."""
    recipe: Estimate | str
    """The configuration's own layout, or why it cannot run on so many GPUs."""


def require_legal_rest(config: Config, fixed: frozenset[str]) -> None:
    """Refuse what no layout can make legal: what is searched is taken as it restricts least.

    Raises:
        ConfigError: the first rule that does not hold.
    """
    sizes = {"parallel.tensor_parallel_size", "parallel.context_parallel_size", "parallel.pipeline_parallel_size"}
    neutral: dict[str, Any] = {
        **dict.fromkeys(sizes - fixed, 1),
        "parallel.virtual_pipeline_parallel_size": 1,
        "parallel.data_parallel_size": None,
        "parallel.pipeline_layout": None,
        "parallel.sequence_parallel": False,
        # The largest of the search: some dimensions must be multiples of something.
        "training.micro_batch_size": math.gcd(config.training.global_batch_size, 8),
    }
    if not fixed & _RECOMPUTE:
        neutral |= {"training.recompute": "none", "training.recompute_layers": 0}
    validate(_set(_without_files(config), neutral), None)


def plan(request: Request) -> Plan:
    """All legal layouts that fit, fastest first; of equally fast ones that which needs least memory.

    Args:
        request: of a configuration that `require_legal_rest` accepts.

    Raises:
        ConfigError: none is legal, or none fits; the message says what would make it possible.
    """
    fixed = request.fixed | (_RECOMPUTE if request.fixed & _RECOMPUTE else frozenset())
    request = replace(request, config=_without_files(request.config), fixed=fixed)
    legal = list(_legal(request))
    if not legal:
        raise ConfigError(_none_legal(request))
    fitting = _fitting(request, legal)
    if not fitting:
        raise ConfigError(_none_fits(request, legal))
    fitting.sort(key=lambda e: (e.step_seconds, e.fullest.total))
    return Plan(request, fitting, len(legal) - len(fitting), _own(request))


def distinct(layouts: Sequence[Estimate]) -> list[Estimate]:
    """The best of every (tensor, context, pipeline) parallel size, in the order given: alternatives worth seeing."""
    best: dict[tuple[int, int, int], Estimate] = {}
    for item in layouts:
        parallel = item.config.parallel
        key = (parallel.tensor_parallel_size, parallel.context_parallel_size, parallel.pipeline_parallel_size)
        best.setdefault(key, item)
    return list(best.values())


def _without_files(config: Config) -> Config:
    """A plan needs no data: names stand in for what validation asks for."""
    data = config.data
    return replace(config, data=replace(data, shards=data.shards or ("any",), tokenizer=data.tokenizer or "any"))


def _fitting(request: Request, layouts: Sequence[Estimate]) -> list[Estimate]:
    return [item for item in layouts if item.fullest.total <= request.memory_limit]


def _own(request: Request) -> Estimate | str:
    config = request.config
    if "parallel.data_parallel_size" not in request.fixed:
        config = _set(config, {"parallel.data_parallel_size": None})
    try:
        return _estimate(request, config)
    except ConfigError as error:
        return str(error)


def _estimate(request: Request, config: Config) -> Estimate:
    replicas = validate(config, request.gpus)
    return estimate(config, request.gpus, replicas, request.device, request.images, request.precomputed)


def _legal(request: Request, lean: bool = False) -> Iterator[Estimate]:
    for config in _candidates(request, lean):
        try:
            replicas = validate(config, request.gpus)
        except ConfigError:
            continue  # one of many candidates that cannot run; nobody asked for this one
        yield _best_encoder(request, config, replicas)


def _best_encoder(request: Request, config: Config, replicas: int) -> Estimate:
    """A trained encoder keeps its activations if there is room, else takes as many pictures at once as fit."""

    def of(keeps: bool, pictures: int) -> Estimate:
        settings = {"training.encoder_keep_activations": keeps, "training.encoder_micro_batch_size": pictures}
        chosen = {key: value for key, value in settings.items() if key not in request.fixed}
        return estimate(
            _set(config, chosen), request.gpus, replicas, request.device, request.images, request.precomputed
        )

    most = config.training.encoder_micro_batch_size
    if not config.training.train_encoder:
        return of(False, most)
    least = of(False, 1)
    if not _fitting(request, [least]):
        return least
    choices = [(True, most), (False, most), *((False, n) for n in (32, 16, 8, 4, 2) if n < most)]
    return next((item for item in (of(*choice) for choice in choices) if _fitting(request, [item])), least)


def _candidates(request: Request, lean: bool) -> Iterator[Config]:
    """Configurations worth validating; of each tensor, context and pipeline size all, or if `lean` that which needs
    least memory. Sizes that cannot divide are left out early, to be quick."""
    config, gpus = request.config, request.gpus
    layers, batch = config.model.decoder.num_layers, config.training.global_batch_size
    data_parallel = config.parallel.data_parallel_size if "parallel.data_parallel_size" in request.fixed else None

    def values(key: str, choices: Sequence[Any]) -> Sequence[Any]:
        return [attrgetter(key)(config)] if key in request.fixed else choices

    sizes = [
        values("parallel.tensor_parallel_size", tensor_parallel_sizes(config)),
        values("parallel.context_parallel_size", divisors(gpus)),
        values("parallel.pipeline_parallel_size", [p for p in divisors(gpus) if p <= layers]),
    ]
    for tensor, context, stages in itertools.product(*sizes):
        replica = tensor * context * stages
        if gpus % replica or batch % (gpus // replica) or (data_parallel or gpus // replica) != gpus // replica:
            continue
        sequences = batch // (gpus // replica)
        # Of each field what needs least memory comes first.
        rest: dict[str, list[Any]] = {
            "parallel.virtual_pipeline_parallel_size": [
                n for n in divisors(layers) if n == 1 or (stages > 1 and layers % (stages * n) == 0)
            ],
            "parallel.sequence_parallel": [True, False] if tensor > 1 else [False],
            "training.micro_batch_size": [n for n in (1, 2, 4, 8) if sequences % n == 0],
            "training.recompute": ["full", "attention", "none"],
        }
        choices = [list(dict.fromkeys(values(key, options)))[: 1 if lean else None] for key, options in rest.items()]
        for combination in itertools.product(*choices):
            yield _set(
                config,
                {
                    "training.recompute_layers": values("training.recompute_layers", [0])[0],
                    "parallel.tensor_parallel_size": tensor,
                    "parallel.context_parallel_size": context,
                    "parallel.pipeline_parallel_size": stages,
                    "parallel.data_parallel_size": data_parallel,
                    "parallel.pipeline_layout": values("parallel.pipeline_layout", [None])[0],
                    **dict(zip(rest, combination, strict=True)),
                },
            )


def _set(config: Config, values: dict[str, Any]) -> Config:
    by_section: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        by_section.setdefault(section, {})[name] = value
    return replace(config, **{s: replace(getattr(config, s), **fields) for s, fields in by_section.items()})


# What would make it possible ------------------------------------------------------------------------------------------


def _none_legal(request: Request) -> str:
    """Name the nearest numbers of GPUs and batches that have a layout; if there are none, the fixed values are to
    blame."""
    batch = request.config.training.global_batch_size
    ideas = []
    if near := list(islice((n for n in _outwards(request.gpus) if _any(replace(request, gpus=n))), 2)):
        ideas.append(f"{' or '.join(map(str, sorted(near)))} GPUs")
    batches = ((n, _set(request.config, {"training.global_batch_size": n})) for n in _outwards(batch))
    if size := next((n for n, config in batches if _any(replace(request, config=config))), None):
        ideas.append(f"training.global_batch_size={size}")
    own = _own(request)
    reason = f" ({own})" if isinstance(own, str) else ""
    if not ideas:
        return f"plan: no layout of any number of GPUs is legal{_fixed(request)}; fix other values{reason}"
    return (
        f"plan: no layout of {request.gpus} GPUs divides a global batch of {batch} sequences{_fixed(request)}; "
        f"possible with {' or with '.join(ideas)}{reason}"
    )


def _none_fits(request: Request, legal: Sequence[Estimate]) -> str:
    """Layouts are legal but need too much memory: name what makes one fit."""
    least = min(legal, key=lambda e: e.fullest.total)
    ideas = []
    if more := next((n for n in _larger(request.gpus) if _fits(replace(request, gpus=n))), None):
        ideas.append(f"{more} {request.gpu}")
    others = [name for name, gpu in GPUS.items() if gpu.memory > request.device.memory]
    for name in sorted(others, key=lambda name: GPUS[name].memory):
        if _fits(replace(request, gpu=name)):
            ideas.append(f"{request.gpus} {name}")
            break
    freed = request.fixed & set(SEARCHED)
    if freed and (free := _fitting(request, list(_legal(replace(request, fixed=request.fixed - freed))))):
        best = min(free, key=lambda e: e.step_seconds)
        changed = [f"{key}={yaml_value(attrgetter(key)(best.config))}" for key in sorted(freed)
                   if attrgetter(key)(best.config) != attrgetter(key)(request.config)]  # fmt: skip
        ideas.append(" ".join(changed))
    if request.config.training.train_encoder:
        frozen = _set(request.config, {"training.train_encoder": False})
        if _fits(replace(request, config=frozen)):
            ideas.append("training.train_encoder=false")
    return (
        f"plan: needs at least {least.fullest.total / 1e9:.1f} GB on the fullest of {request.gpus} GPUs"
        f"{_fixed(request)}, a {request.gpu} has {request.memory_limit / 1e9:.1f} GB to give; "
        f"possible with {' or with '.join(ideas) or 'a smaller model'}"
    )


def _fixed(request: Request) -> str:
    keys = sorted(request.fixed & {*SEARCHED, "parallel.data_parallel_size"})
    return f" with {', '.join(f'{key}={yaml_value(attrgetter(key)(request.config))}' for key in keys)}" if keys else ""


def _any(request: Request) -> bool:
    return next(_legal(request, lean=True), None) is not None


def _fits(request: Request) -> bool:
    return any(_fitting(request, [item]) for item in _legal(request, lean=True))


def _outwards(start: int) -> Iterator[int]:
    """Numbers near `start`, nearest first, up to twice as many."""
    for distance in range(1, start + 1):
        yield from (n for n in (start - distance, start + distance) if n > 0)


def _larger(gpus: int) -> Iterator[int]:
    """Numbers of GPUs above `gpus` that one would rent: whole servers, then doubling."""
    yield from range(gpus // 8 * 8 + 8, min(8 * 16, LARGEST_WORLD) + 1, 8)
    size = 1
    while size <= LARGEST_WORLD:
        if size > max(gpus, 128):
            yield size
        size *= 2
