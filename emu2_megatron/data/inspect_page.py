"""Packed sequences as one HTML file: what the model will see, token by token. Inline CSS, SVG and pictures, nothing
loaded from anywhere, no script."""

import base64
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
import torch
from PIL import Image

from emu2_megatron.config.schema import Config
from emu2_megatron.data.sequence import (
    PADDING,
    START,
    TEXT_TARGET,
    VISUAL,
    VISUAL_TARGET,
    Features,
    PackedSequence,
    Picture,
)
from emu2_megatron.data.tokenizer import Tokenizer

ROLES = {
    "target": ("text target", "predicted through the vocabulary"),
    "context": ("context", "read, not learnt"),
    "regressed": ("regressed", "a picture's embeddings, given and predicted"),
    "visual": ("visual input", "a picture's embeddings, only given"),
    "padding": ("padding", "belongs to no sample"),
}
"""What a token is to the model: its class on the page, its name, what that means."""
THUMBNAIL = 160
"""Largest side of a stored picture, pixels; shown at most at 104."""

_STYLE = """
:root { color-scheme: light dark; --page: #fafaf8; --card: #fff; --ink: #222; --soft: #6b6b68; --line: #e2e2dd;
  --target: #3b6fb6; --context: #8a8a86; --regressed: #a9549a; --visual: #d98a1f; --padding: #dcdcd6;
  --target-back: #d9e6f7; --context-back: #efefeb; --regressed-back: #f3dff0; --visual-back: #fbe8cb; }
@media (prefers-color-scheme: dark) { :root { --page: #17181a; --card: #202225; --ink: #e6e6e3; --soft: #9a9a96;
  --line: #35373b; --target: #6ea3ea; --context: #7d7f83; --regressed: #d07fc2; --visual: #e9a23b; --padding: #3a3c40;
  --target-back: #253c5c; --context-back: #2c2e32; --regressed-back: #4a2a45; --visual-back: #4c3818; } }
* { box-sizing: border-box; }
body { font: 15px/1.5 system-ui, -apple-system, "Segoe UI", "Noto Sans", "Noto Sans CJK SC", sans-serif;
  color: var(--ink); background: var(--page); max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; margin: 0 0 .2rem; } h2 { font-size: 1.15rem; margin: 2.2rem 0 .4rem; }
p.note, .soft { color: var(--soft); font-size: .9rem; margin: .2rem 0 .6rem; }
a { color: var(--target); text-decoration: none; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: right; padding: .35rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; } td.bar { width: 42%; } tfoot td { font-weight: 600; border-bottom: 0; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .15rem 1rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
svg.bar { width: 100%; height: 18px; display: block; border-radius: 4px; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--page); padding: .6rem 0; margin: 1rem 0 .4rem;
  border-bottom: 1px solid var(--line); display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; font-size: .9rem; }
.legend i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin-right: .35rem;
  vertical-align: -1px; }
article { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: .6rem .9rem .8rem;
  margin: .6rem 0; }
article > header { display: flex; justify-content: space-between; gap: 1rem; color: var(--soft); font-size: .85rem;
  margin-bottom: .4rem; } header b { color: var(--ink); overflow-wrap: anywhere; }
.flow { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 2; }
.flow span { padding: .12rem 0; border-radius: 3px; box-shadow: inset -1px 0 var(--card); }
.flow span:hover { outline: 2px solid var(--ink); }
.flow .added { display: inline-block; padding: .2rem .25rem; margin: 0 1px;
  font: 11px/1 ui-monospace, "DejaVu Sans Mono", monospace; }
.flow .target { background-color: var(--target-back); } .flow .context { background-color: var(--context-back); }
.flow .target.added { color: var(--target); } .flow .context.added { color: var(--soft); }
.flow .padding { background-color: var(--padding); color: var(--soft); }
figure { display: inline-block; vertical-align: middle; margin: .25rem .2rem; border-radius: 6px; overflow: hidden;
  line-height: 1.5; font-size: .78rem; text-align: center; white-space: normal; }
figure.regressed { background: var(--regressed-back); border: 2px solid var(--regressed); }
figure.visual { background: var(--visual-back); border: 2px solid var(--visual); }
figure > div { position: relative; width: 104px; height: 104px; }
figure img { width: 100%; height: 100%; display: block; }
figure .features { display: grid; place-content: center; height: 100%; padding: .4rem; background: #8a8a86;
  color: #fff; }
figure svg { position: absolute; inset: 0; width: 100%; height: 100%; }
figure rect { fill: none; stroke: #ffd60a; stroke-width: 2; vector-effect: non-scaling-stroke; }
"""


def page(rows: Sequence[PackedSequence], tokenizer: Tokenizer, config: Config, counts: Mapping[str, Any]) -> str:
    """The whole page.

    Args:
        rows: packed sequences of S tokens, with their pictures; on any device.
        counts: what else is known about the data, as a table; values are numbers, strings or mappings of them.
    """
    tallies = [tally(row) for row in rows]
    length = len(rows[0].tokens_S) if rows else config.data.sequence_length
    title = f"{len(rows)} packed sequences of {length:,} tokens"
    facts = f"{config.model.preset}: {config.model.image_queries} embeddings a picture, {config.model.frame_queries} a "
    sections = "".join(_row(number, row, tallies[number], tokenizer) for number, row in enumerate(rows))
    data = f"<h2>The data</h2>{_definitions(counts)}" if counts else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head><body>
<h1>{escape(title)}</h1>
<p class="note">What the model will see. {escape(facts)}frame, vocabulary of {tokenizer.vocab_size:,}. Point at a token
for its piece and id; boxes on a picture are the sample's location tokens.</p>
{_legend()}
{_table(rows, tallies)}
{data}
{sections}
</body></html>
"""


def tally(row: PackedSequence) -> dict[str, int]:
    """What a row holds, counted."""
    roles_S = row.roles_S
    padding = int(np.count_nonzero(roles_S & PADDING))
    return {
        "samples": len(row.keys),
        "tokens": len(roles_S) - padding,
        "padding": padding,
        "text targets": int(np.count_nonzero(roles_S & TEXT_TARGET)),
        "pictures": len(row.pictures),
        "embeddings": int(np.count_nonzero(roles_S & VISUAL)),
        "regressed": int(np.count_nonzero(roles_S & VISUAL_TARGET)),
    }


def _kind(role: int) -> str:
    if role & PADDING:
        return "padding"
    if role & VISUAL:
        return "regressed" if role & VISUAL_TARGET else "visual"
    return "target" if role & TEXT_TARGET else "context"


def _legend() -> str:
    items = (
        f'<span title="{escape(words)}"><i style="background:var(--{kind})"></i>{escape(name)}</span>'
        for kind, (name, words) in ROLES.items()
    )
    return f'<p class="legend">{"".join(items)}</p>'


def _table(rows: Sequence[PackedSequence], tallies: Sequence[dict[str, int]]) -> str:
    names = list(tally(PackedSequence(np.zeros(0), np.zeros(0, np.uint8))))
    head = "".join(f"<th>{name}</th>" for name in ("row", "", *names))
    lines = "".join(
        f'<tr><td><a href="#row-{number}">{number}</a></td><td class="bar">{_bar(row)}</td>'
        + "".join(f"<td>{count:,}</td>" for count in tallies[number].values())
        + "</tr>"
        for number, row in enumerate(rows)
    )
    total = "".join(f"<td>{sum(item[name] for item in tallies):,}</td>" for name in names)
    return (
        f"<table><thead><tr>{head}</tr></thead><tbody>{lines}</tbody>"
        f"<tfoot><tr><td>all</td><td></td>{total}</tr></tfoot></table>"
    )


def _definitions(counts: Mapping[str, Any]) -> str:
    items = []
    for name, value in counts.items():
        if isinstance(value, Mapping):
            shown = _definitions(value) if value else "none"
        else:
            shown = f"{value:,}" if isinstance(value, int) else escape(str(value))
        items.append(f"<dt>{escape(str(name))}</dt><dd>{shown}</dd>")
    return f"<dl>{''.join(items)}</dl>"


def _bar(row: PackedSequence) -> str:
    """The row from its first token to its last, in the colours of the roles; a gap before every sample."""
    kinds = [_kind(int(role)) for role in row.roles_S]
    shapes, begin = [], 0
    for i in range(1, len(kinds) + 1):
        if i == len(kinds) or kinds[i] != kinds[begin]:
            name = f"{ROLES[kinds[begin]][0]}: {i - begin:,}"
            shapes.append(f'<rect x="{begin}" width="{i - begin}" height="18" fill="var(--{kinds[begin]})">'
                          f"<title>{escape(name)}</title></rect>")  # fmt: skip
            begin = i
    for start in np.flatnonzero(row.roles_S & START)[1:]:
        shapes.append(f'<line x1="{start}" x2="{start}" y2="18" stroke="var(--page)" stroke-width="3" '
                      'vector-effect="non-scaling-stroke"/>')  # fmt: skip
    return f'<svg class="bar" viewBox="0 0 {len(kinds)} 18" preserveAspectRatio="none">{"".join(shapes)}</svg>'


def _row(number: int, row: PackedSequence, counted: Mapping[str, int], tokenizer: Tokenizer) -> str:
    roles_S = row.roles_S
    first_padding = len(roles_S) - counted["padding"]
    starts = [int(i) for i in np.flatnonzero(roles_S & START) if i < first_padding] or [0]
    pictures = iter(zip(row.pictures, row.queries, strict=True))
    samples = []
    for i, (start, stop) in enumerate(zip(starts, [*starts[1:], first_padding], strict=True)):
        key = row.keys[i] if i < len(row.keys) else ""
        flow = _flow(row, start, stop, tokenizer, pictures)
        samples.append(f"<article><header><b>{escape(key)}</b>{stop - start:,} tokens</header>"
                       f'<div class="flow" dir="auto">{flow}</div></article>')  # fmt: skip
    if counted["padding"]:
        pad = f"{tokenizer.piece(int(row.tokens_S[-1]))} × {counted['padding']:,}"
        samples.append(f'<p class="flow"><span class="added padding">{escape(pad)}</span></p>')
    words = ", ".join(f"{count:,} {name}" for name, count in counted.items())
    return (
        f'<section id="row-{number}"><h2>Row {number}</h2><p class="note">{escape(words)}</p>{_bar(row)}'
        f"{''.join(samples)}</section>"
    )


def _flow(
    row: PackedSequence, start: int, stop: int, tokenizer: Tokenizer, pictures: Iterator[tuple[Picture, int]]
) -> str:
    """One sample in reading order: pieces of text, names of added tokens, and pictures where their embeddings stand."""
    pieces = [tokenizer.piece(int(token)) for token in row.tokens_S[start:stop]]
    kinds = [_kind(int(role)) for role in row.roles_S[start:stop]]
    added = {tokenizer.bos, tokenizer.eos, *tokenizer.ids.values()}
    boxes = _boxes(pieces)
    parts, i = [], 0
    while i < len(pieces):
        if kinds[i] in ("visual", "regressed"):
            picture, count = next(pictures)
            parts.append(_figure(picture, count, kinds[i], boxes))
        else:
            count = _together(pieces, kinds, i)
            ids = [int(token) for token in row.tokens_S[start + i : start + i + count]]
            parts.append(_token("".join(pieces[i : i + count]), ids, kinds[i], ids[0] in added))
        i += count
    return "".join(parts)


def _together(pieces: Sequence[str], kinds: Sequence[str], i: int) -> int:
    """How many tokens from i on are the bytes of one character; 1 for any other token."""
    if not _BYTES.fullmatch(pieces[i]):
        return 1
    lead = int(pieces[i][3:5], 16)
    length = 4 if lead >= 0xF0 else 3 if lead >= 0xE0 else 2 if lead >= 0xC0 else 1
    count = 1
    while count < length and i + count < len(pieces) and kinds[i + count] == kinds[i]:
        if not _BYTES.fullmatch(pieces[i + count]) or int(pieces[i + count][3:5], 16) & 0xC0 != 0x80:
            break
        count += 1
    return count


_BYTES = re.compile(r"(<0x[0-9A-F]{2}>)+")
_LOCATION = re.compile(r"<patch_index_0(\d{3})>")


def _token(piece: str, ids: Sequence[int], kind: str, added: bool) -> str:
    """A piece of text as text, an added token by its name (a location by the paper's)."""
    hint = f"{piece} · {' '.join(map(str, ids))} · {ROLES[kind][0]}"
    if added:
        shown = _LOCATION.sub(r"loc\1", piece)
    elif _BYTES.fullmatch(piece):
        text = bytes(int(digits, 16) for digits in re.findall("0x(..)", piece)).decode("utf-8", errors="replace")
        shown = text.replace("\n", "↵\n")
    else:
        shown = piece.replace("▁", " ")
    return f'<span class="{kind}{" added" if added else ""}" title="{escape(hint)}">{escape(shown)}</span>'


def _boxes(pieces: Sequence[str]) -> list[list[int]]:
    """Corners x0 y0 x1 y1 in bins, of every four location tokens of a sample."""
    bins = [int(found[1]) for found in map(_LOCATION.fullmatch, pieces) if found]
    return [bins[i : i + 4] for i in range(0, len(bins) - 3, 4)]


def _figure(picture: Picture, count: int, kind: str, boxes: Sequence[Sequence[int]]) -> str:
    if isinstance(picture, Features):
        shape = " × ".join(str(size) for size in picture.rows_QE.shape)
        inner = f'<div class="features">features {shape}, computed beforehand</div>'
    else:
        inner = f'<img alt="" src="{_thumbnail(picture)}">'
        rects = "".join(f'<rect x="{x0}" y="{y0}" width="{x1 - x0}" height="{y1 - y0}"/>' for x0, y0, x1, y1 in boxes)
        inner += f'<svg viewBox="0 0 224 224">{rects}</svg>' if rects else ""
    return f'<figure class="{kind}"><div>{inner}</div>{count:,} {escape(ROLES[kind][0])}</figure>'


def _thumbnail(pixels_3HW: torch.Tensor) -> str:
    image = Image.fromarray(pixels_3HW.permute(1, 2, 0).contiguous().cpu().numpy())
    image.thumbnail((THUMBNAIL, THUMBNAIL))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
