"""A plan as a table on the terminal and as JSON."""

import dataclasses
import math
from operator import attrgetter
from typing import Any

from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table

from emu2_megatron.config import flops
from emu2_megatron.config.describe import yaml_value
from emu2_megatron.config.schema import Config
from emu2_megatron.model.parameters import released_shapes
from emu2_megatron.parallel import estimate as model
from emu2_megatron.parallel.estimate import Estimate
from emu2_megatron.parallel.estimate_memory import Memory
from emu2_megatron.parallel.plan import SEARCHED, Plan, Request, distinct

CATEGORIES = tuple(field.name for field in dataclasses.fields(Memory))
"""What memory goes to."""


def shown(plan: Plan, top: int) -> list[Estimate]:
    """The layouts a report lists: the best of each tensor, context and pipeline size, at most `top`."""
    return distinct(plan.layouts)[:top]


def facts(plan: Plan) -> dict[str, str]:
    """What was planned for, in words."""
    request, best = plan.request, plan.layouts[0]
    config = request.config
    encoder = best.flops.encoder / best.flops.total
    return {
        "model": f"{config.model.preset}, {whole_parameters(request):,} parameters, encoder "
        f"{'trained' if config.training.train_encoder else 'frozen'}",
        "machine": f"{request.gpus} x {request.gpu}: {request.device.memory / 1e9:.0f} GB, of which "
        f"{request.memory_limit / 1e9:.1f} can be planned with; {best.peak / 1e12:.0f} TFLOP/s "
        f"{config.training.precision}{' without TF32' if config.training.precision == 'fp32' else ''}",
        "batch": f"{config.training.global_batch_size} sequences of {config.data.sequence_length} tokens, "
        f"{request.images:g} pictures each (--images-per-sequence)"
        f"{', as precomputed features' if request.precomputed else ''}",
        "FLOPs of a step": f"{best.flops.total:.3g}: encoder {encoder:.0%}, decoder {1 - encoder:.0%}; model FLOPs, "
        "without recompute, half of causal attention",
        "layouts": f"{len(plan.layouts)} fit, {plan.too_large} do not; shown is the fastest of each TP, CP and PP",
        **({"not modelled": "; ".join(left_out)} if (left_out := not_modelled(config)) else {}),
    }


def not_modelled(config: Config) -> list[str]:
    """What the configuration asks for and the estimate leaves out."""
    left_out = []
    if config.fp8.recipe != "none":
        left_out.append(f"FP8 (fp8.recipe={config.fp8.recipe}): peak, seconds and bytes are bf16's")
    if config.training.encoder_prefetch:
        left_out.append("training.encoder_prefetch: its memory is counted, the time it hides is not taken off")
    return left_out


def assumptions() -> str:
    """On one line."""
    return (
        f"Estimates, not measurements: matrix products at {model.MATMUL_EFFICIENCY:.0%} of the peak, links at "
        f"{model.LINK_EFFICIENCY:.0%}, loading hidden, no stragglers (docs/planning.md)"
    )


def print_table(plan: Plan, top: int) -> None:
    """For people."""
    console = Console()

    def say(label: str, text: str) -> None:
        console.print(f"[bold]{label}[/bold]: {text}", highlight=False, soft_wrap=True)

    for label, text in facts(plan).items():
        say(label, text)
    heads = ("", "layout", "micro", "GB", "bubble", "s/step", "tokens/s", "MFU", "days")
    table = Table(*heads, box=box.SIMPLE_HEAD, padding=(0, 0, 0, 1))
    for column in table.columns:
        column.no_wrap = True
    for column in table.columns[2:]:
        column.justify = "right"
    for i, item in enumerate(shown(plan, top), 1):
        table.add_row(str(i), *_cells(item))
    if isinstance(plan.recipe, Estimate):
        fits = plan.recipe.fullest.total <= plan.request.memory_limit
        table.add_section()
        table.add_row("*", *_cells(plan.recipe))
        table.caption = "* as the configuration has it" + ("" if fits else ": does not fit")
    # Cells are never cut: a terminal that is too narrow breaks the lines.
    wide = Console(width=1000)
    console.width = max(console.width, Measurement.get(wide, wide.options, table).maximum)
    console.print(table)
    if isinstance(plan.recipe, str):
        say("as given", f"cannot run: {plan.recipe}")
    best = plan.layouts[0]
    sent = ", ".join(f"{purpose} {short(b / 1e9)}" for purpose, b in best.exchanged.items() if b)
    say("memory of 1", _memory_line(best))
    say("seconds of 1", ", ".join(f"{phase.replace('_', ' ')} {short(s)}" for phase, s in best.seconds.items()))
    say("GB a rank sends", sent or "none")
    say("to train with 1", overrides(best))
    console.print(assumptions(), style="dim", highlight=False, soft_wrap=True)


def short(value: float) -> str:
    """Three digits, never an exponent: `<0.01`, `0.25`, `12.3`, `4,321`."""
    if 0 < value < 0.01:
        return "<0.01"
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def overrides(item: Estimate) -> str:
    """What to add to `emu2 train` for this layout: all that was searched, so that it counts whatever a recipe has."""
    keys = [*SEARCHED, "parallel.data_parallel_size"]
    if not item.config.training.train_encoder:
        keys = [key for key in keys if "encoder" not in key]
    return " ".join(f"{key}={_value(item, key)}" for key in keys)


def as_json(plan: Plan, top: int) -> dict[str, Any]:
    """For programs. Bytes, seconds, FLOPs; `memory_bytes` is the fullest rank's."""
    request, config = plan.request, plan.request.config
    best = plan.layouts[0]
    return {
        "parameters": whole_parameters(request),
        "model": config.model.preset,
        "train_encoder": config.training.train_encoder,
        "precision": config.training.precision,
        "fp8_recipe": config.fp8.recipe,
        "precomputed_features": request.precomputed,
        "not_modelled": not_modelled(config),
        "gpu": request.gpu,
        "gpus": request.gpus,
        "gpu_memory_bytes": int(request.device.memory),
        "memory_limit_bytes": int(request.memory_limit),
        "peak_flops_per_gpu": best.peak,
        "global_batch_size": config.training.global_batch_size,
        "sequence_length": config.data.sequence_length,
        "images_per_sequence": request.images,
        "steps": config.training.steps,
        "flops": {**dataclasses.asdict(best.flops), "formula": formula(request)},
        "assumptions": {
            "matmul_efficiency": model.MATMUL_EFFICIENCY,
            "link_efficiency": model.LINK_EFFICIENCY,
            "memory_efficiency": model.MEMORY_EFFICIENCY,
            "reserved_bytes": model.RESERVED_BYTES,
        },
        "fitting": len(plan.layouts),
        "too_large": plan.too_large,
        "layouts": [_layout(item) for item in shown(plan, top)],
        "as_given": _layout(plan.recipe) if isinstance(plan.recipe, Estimate) else {"error": plan.recipe},
    }


def formula(request: Request) -> str:
    """The formula of FLOPs for this run."""
    return flops.formula(request.config)


def whole_parameters(request: Request) -> int:
    """Of the model, without padding."""
    return sum(math.prod(shape) for shape in released_shapes(request.config.model).values())


def name_of(item: Estimate) -> str:
    """A layout in a word: `TP4+SP·PP4x5·DP8` is tensor and sequence parallel 4, 4 stages of 5 parts, 8 replicas."""
    parallel = item.config.parallel
    words = [f"TP{parallel.tensor_parallel_size}{'+SP' if parallel.sequence_parallel else ''}"]
    if parallel.context_parallel_size > 1:
        words.append(f"CP{parallel.context_parallel_size}")
    virtual = parallel.virtual_pipeline_parallel_size
    words.append(f"PP{parallel.pipeline_parallel_size}" + (f"x{virtual}" if virtual > 1 else ""))
    words.append(f"DP{item.data_parallel_size}")
    return "·".join(words)


def _cells(item: Estimate) -> list[str]:
    training = item.config.training
    again = f" recompute {training.recompute}" if training.recompute != "none" else ""
    return [
        name_of(item) + again, str(training.micro_batch_size), short(item.fullest.total / 1e9),
        f"{item.bubble:.1%}", short(item.step_seconds), f"{item.tokens_per_second:,.0f}", f"{item.mfu:.1%}",
        short(item.days),
    ]  # fmt: skip


def _memory_line(item: Estimate) -> str:
    parts = [f"{name} {short(getattr(item.fullest, name) / 1e9)}" for name in CATEGORIES]
    return f"{', '.join(parts)}; together {short(item.fullest.total / 1e9)} GB on the fullest rank"


def _value(item: Estimate, key: str) -> str:
    value = item.data_parallel_size if key == "parallel.data_parallel_size" else attrgetter(key)(item.config)
    return yaml_value(value).replace(" ", "")  # a list is one word for the shell


def _layout(item: Estimate) -> dict[str, Any]:
    parallel, training = item.config.parallel, item.config.training
    return {
        "tensor_parallel_size": parallel.tensor_parallel_size,
        "sequence_parallel": parallel.sequence_parallel,
        "context_parallel_size": parallel.context_parallel_size,
        "pipeline_parallel_size": parallel.pipeline_parallel_size,
        "virtual_pipeline_parallel_size": parallel.virtual_pipeline_parallel_size,
        "pipeline_layout": parallel.pipeline_layout,
        "data_parallel_size": item.data_parallel_size,
        "micro_batch_size": training.micro_batch_size,
        "micro_batches": item.micro_batches,
        "recompute": training.recompute,
        "recompute_layers": training.recompute_layers,
        "encoder_micro_batch_size": training.encoder_micro_batch_size,
        "encoder_keep_activations": training.encoder_keep_activations,
        "memory_bytes": item.fullest.total,
        "memory": dataclasses.asdict(item.fullest),
        "memory_by_stage": [{**dataclasses.asdict(stage), "total": stage.total} for stage in item.memory],
        "step_seconds": item.step_seconds,
        "seconds": item.seconds,
        "bubble": item.bubble,
        "exchanged_bytes": item.exchanged,
        "mfu": item.mfu,
        "tflops_per_gpu": item.mfu * item.peak / 1e12,
        "tokens_per_second": item.tokens_per_second,
        "days": item.days,
        "overrides": overrides(item),
    }
