"""A plan as one HTML file: inline SVG and CSS, nothing loaded from anywhere."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

from emu2_megatron.parallel import schedule
from emu2_megatron.parallel.estimate import Estimate
from emu2_megatron.parallel.estimate_memory import Memory
from emu2_megatron.parallel.plan import Plan
from emu2_megatron.training.plan_report import CATEGORIES, assumptions, facts, formula, name_of, overrides, shown

COLOURS = {
    "weights": "#3b6fb6", "gradients": "#5fa8d3", "optimizer": "#9cc5a1", "activations": "#e9a23b",
    "features": "#b565a7", "encode": "#b565a7", "forward": "#3b6fb6", "backward": "#2f8f6b",
    "encoder_backward": "#8a4680", "gradient sums": "#e9a23b", "update": "#c8553d", "bubble": "#e4e4e0",
}  # fmt: skip
WIDTH, LABEL, ROW, BAR = 1080, 250, 30, 20
"""Pixels: a chart, its row labels, a row, the bar in it."""

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; color: #222; background: #fafaf8;
  max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.note { color: #666; margin: .2rem 0 .6rem; font-size: .9rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; } dt { color: #666; } dd { margin: 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid #e4e4e0; white-space: nowrap; }
th { color: #666; font-weight: 600; } th:nth-child(2), td:nth-child(2) { text-align: left; }
tbody tr:first-child { background: #eef4ea; font-weight: 600; }
svg { width: 100%; height: auto; display: block; background: #fff; border: 1px solid #e4e4e0; border-radius: 6px; }
svg text { font: 12px system-ui, -apple-system, "Segoe UI", sans-serif; fill: #333; }
svg text.soft { fill: #777; font-size: 11px; } svg text.in { fill: #fff; font-size: 10px; text-anchor: middle; }
code { background: #f0f0ec; padding: .1rem .3rem; border-radius: 3px; font-size: .85rem; overflow-wrap: anywhere; }
.legend span { display: inline-block; margin-right: 1.1rem; font-size: .9rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: -1px; }
"""


def page(plan: Plan, top: int) -> str:
    """The whole page."""
    layouts, request = shown(plan, top), plan.request
    best = layouts[0]
    marked = {str(i): layout for i, layout in enumerate(layouts, 1)}
    given = ""
    if isinstance(plan.recipe, Estimate):
        marked["*"] = plan.recipe
        given = "* as the configuration has it. "
    title = f"{request.config.model.preset} on {request.gpus} {request.gpu}"
    described = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts(plan).items())
    limit, whole = request.memory_limit, request.device.memory
    stages = [(f"stage {i}", memory) for i, memory in enumerate(best.memory)]
    drawn = _drawn(best)
    note = "" if drawn == best.micro_batches else f", drawn with {drawn} of its {best.micro_batches} micro-batches"
    parts = best.config.parallel.virtual_pipeline_parallel_size
    shades = " Darker to lighter: first to last part of a stage." if parts > 1 else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}: plan</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="note">{escape(assumptions())}</p>
<dl>{described}</dl>
<h2>Layouts, fastest first</h2>
{_table(marked)}
<p class="note">{given}To train with the first: <code>{escape(overrides(best))}</code></p>
<h2>Memory of the fullest rank</h2>
{_legend(CATEGORIES)}
{_memory([(f"{mark} {name_of(item)}", item.fullest) for mark, item in marked.items()], limit, whole)}
<h2>Memory of the first layout, stage by stage</h2>
{_memory(stages, limit, whole)}
<h2>One step of the first layout</h2>
<p class="note">{escape(name_of(best))}; {best.step_seconds:.3g} s.</p>
{_legend(("encode", "forward", "bubble", "encoder_backward", "gradient sums", "update"), {"forward": "decode"})}
{_step(best)}
<h2>Its pipeline schedule</h2>
<p class="note">Phase 2, to scale{note}. Numbers are micro-batches.{shades}</p>
{_legend(("forward", "backward", "bubble"))}
{_schedule(best, drawn)}
<h2>What counts as FLOPs</h2>
<p class="note">{escape(formula(request))}</p>
</body></html>
"""


def _table(layouts: Mapping[str, Estimate]) -> str:
    heads = (
        "",
        "layout",
        "micro-batch",
        "recompute",
        "GB/GPU",
        "bubble",
        "s/step",
        "tokens/s",
        "MFU",
        "days",
        "GB sent",
    )
    rows = []
    for mark, item in layouts.items():
        cells = (
            mark, name_of(item), str(item.config.training.micro_batch_size), item.config.training.recompute,
            f"{item.fullest.total / 1e9:.3g}", f"{item.bubble:.1%}", f"{item.step_seconds:.3g}",
            f"{item.tokens_per_second:,.0f}", f"{item.mfu:.1%}", f"{item.days:.3g}",
            f"{sum(item.exchanged.values()) / 1e9:.3g}",
        )  # fmt: skip
        rows.append("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def _legend(names: Iterable[str], words: dict[str, str] | None = None) -> str:
    items = "".join(
        f'<span><i style="background:{COLOURS[name]}"></i>{escape((words or {}).get(name, name).replace("_", " "))}'
        "</span>"
        for name in names
    )
    return f'<p class="legend">{items}</p>'


def _memory(rows: Sequence[tuple[str, Memory]], limit: float, whole: float) -> str:
    """Stacked bars against the GPU's memory and what of it can be planned with."""
    most = max(whole, *(memory.total for _, memory in rows)) * 1.02
    scale = (WIDTH - LABEL - 110) / most
    shapes = []
    for i, (label, memory) in enumerate(rows):
        y, x = 26 + i * ROW, float(LABEL)
        shapes.append(_text(LABEL - 10, y + 15, label, "end"))
        for category in CATEGORIES:
            bytes_ = getattr(memory, category)
            hint = f"{category} {bytes_ / 1e9:.1f} GB"
            shapes.append(_rect(x, y, bytes_ * scale, BAR, COLOURS[category], hint))
            x += bytes_ * scale
        shapes.append(_text(WIDTH - 12, y + 15, f"{memory.total / 1e9:.3g} GB", "end"))
    height = 40 + len(rows) * ROW
    for bytes_, dash, anchor, words in ((limit, "5 4", "end", "planned with at most"), (whole, "", "start", "GPU")):
        x = LABEL + bytes_ * scale
        shapes.append(f'<line x1="{x:.1f}" x2="{x:.1f}" y1="20" y2="{height - 12}" stroke="#c8553d" stroke-width="1.5"'
                      f' stroke-dasharray="{dash}"/>')  # fmt: skip
        gap = -4 if anchor == "end" else 4
        shapes.append(_text(x + gap, 14, f"{words} {bytes_ / 1e9:.1f} GB", anchor, "soft"))
    return _svg(height, shapes)


def _step(item: Estimate) -> str:
    """The three phases and the update on every stage, to scale. Phase 2 with its waiting at both ends."""
    seconds, stages = item.seconds, item.config.parallel.pipeline_parallel_size
    scale = (WIDTH - LABEL - 30) / item.step_seconds
    waits = _waits(item)
    shapes = []
    for stage in range(stages):
        y = 12 + stage * ROW
        shapes.append(_text(LABEL - 10, y + 15, f"stage {stage}", "end"))
        before, after = waits[stage]
        working = max(seconds["decode"] - before - after, 0.0)
        pieces = (
            ("encode", seconds["encode"], "encode"), ("bubble", before, "waits"), ("forward", working, "decode"),
            ("bubble", after, "waits"), ("encoder_backward", seconds["encoder_backward"], "encoder backward"),
            ("gradient sums", seconds["gradients"], "gradient sums"), ("update", seconds["update"], "update"),
        )  # fmt: skip
        x = float(LABEL)
        for colour, length, words in pieces:
            shapes.append(_rect(x, y, length * scale, BAR, COLOURS[colour], f"{words} {length:.3g} s"))
            x += length * scale
    y = 12 + stages * ROW
    shapes += _axis(y, item.step_seconds, scale)
    return _svg(y + 30, shapes)


def _waits(item: Estimate) -> list[tuple[float, float]]:
    """Seconds that each stage waits before its first and after its last piece of work in phase 2."""
    stages = item.config.parallel.pipeline_parallel_size
    blocks = _timeline(item, _drawn(item))
    end = max(stage[-1].end for stage in blocks)
    # Before the first and after the last piece of work: that does not depend on how many micro-batches there are.
    return [(blocks[s][0].start, end - blocks[s][-1].end) for s in range(stages)]


def _timeline(item: Estimate, micro_batches: int) -> list[list[schedule.Block]]:
    parallel = item.config.parallel
    forward, backward = zip(*item.part_seconds, strict=True)
    return schedule.timeline(
        parallel.pipeline_parallel_size, parallel.virtual_pipeline_parallel_size, micro_batches, forward, backward
    )


def _drawn(item: Estimate) -> int:
    """Micro-batches that fit in a picture: whole groups of the interleaved schedule."""
    stages = item.config.parallel.pipeline_parallel_size
    groups = max(2, 12 // (stages * item.config.parallel.virtual_pipeline_parallel_size))
    return min(item.micro_batches, groups * stages if stages > 1 else 6)


def _schedule(item: Estimate, micro_batches: int) -> str:
    blocks = _timeline(item, micro_batches)
    chunks = item.config.parallel.virtual_pipeline_parallel_size
    end = max(stage[-1].end for stage in blocks)
    scale = (WIDTH - LABEL - 30) / end
    shapes = []
    for stage, row in enumerate(blocks):
        y = 12 + stage * ROW
        shapes.append(_text(LABEL - 10, y + 15, f"stage {stage}", "end"))
        shapes.append(_rect(LABEL, y, end * scale, BAR, COLOURS["bubble"], ""))
        for operation, start, stop in row:
            kind = "forward" if operation.forward else "backward"
            opacity = 1 - 0.55 * operation.chunk / max(chunks - 1, 1)
            hint = f"{kind} of micro-batch {operation.micro_batch}, part {operation.chunk}"
            x, width = LABEL + start * scale, (stop - start) * scale
            shapes.append(_rect(x, y, max(width - 0.7, 0.5), BAR, COLOURS[kind], hint, opacity, backing=True))
            if width > 13:
                shapes.append(f'<text class="in" x="{x + width / 2:.1f}" y="{y + 14}">{operation.micro_batch}</text>')
    y = 12 + len(blocks) * ROW
    shapes += _axis(y, end, scale)
    return _svg(y + 30, shapes)


def _axis(y: float, seconds: float, scale: float) -> list[str]:
    """Five marks of time below a chart."""
    digits = 3 if seconds < 1 else 2 if seconds < 10 else 1
    marks = [seconds * i / 5 for i in range(6)]
    return [_text(LABEL + mark * scale, y + 14, f"{mark:.{digits}f} s", "middle", "soft") for mark in marks]


def _rect(
    x: float, y: float, width: float, height: float, colour: str, hint: str, opacity: float = 1, backing: bool = False
) -> str:
    if width < 0.05:  # nobody could see it
        return ""
    shape = f'x="{x:.2f}" y="{y:.1f}" width="{width:.2f}" height="{height}"'
    # A lighter shade is the colour over white, not over what lies behind.
    white = f'<rect {shape} fill="#fff"/>' if backing and opacity < 1 else ""
    title = f"<title>{escape(hint)}</title>" if hint else ""
    return f'{white}<rect {shape} fill="{colour}" fill-opacity="{opacity:.2f}">{title}</rect>'


def _text(x: float, y: float, text: str, anchor: str = "start", kind: str = "") -> str:
    style = f' class="{kind}"' if kind else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{style}>{escape(text)}</text>'


def _svg(height: float, shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(shapes)}</svg>'
