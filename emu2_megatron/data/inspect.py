"""`emu2 data inspect`: the first packed sequences of a run, as a page."""

from dataclasses import replace
from pathlib import Path

from emu2_megatron.config.schema import Config
from emu2_megatron.data.inspect_page import page
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.tokenizer import tokenizer_for
from emu2_megatron.errors import ConfigError


def inspect(config: Config, rows: int, output: Path) -> str:
    """Write a page with the first `rows` sequences of the first global batches.

    Returns:
        What to warn of, empty if nothing.

    Raises:
        ConfigError: fewer than one row is asked for, or the tokenizer does not fit.
        DataError: the shards cannot be read, or nothing in them can be used.
    """
    if rows < 1:
        raise ConfigError(f"--rows: {rows}; legal: 1 or more")
    tokenizer = tokenizer_for(config)
    slots = min(rows, config.training.global_batch_size)
    # Looking at data that is mostly bad must be possible.
    lenient = replace(config, data=replace(config.data, max_bad_share=1.0))
    with Loader(lenient, tokenizer, range(slots)) as loader:
        shown = next(loader)
        while len(shown) < rows:
            shown += next(loader)
        total, bad = sum(len(source) for source in loader.sources), loader.bad
        used, skipped = sum(len(row.keys) for row in shown), loader.skipped.total()
        counts = {
            "samples in the shards": total,
            "of those looked at, cannot be used": bad,
            "rows of a step": config.training.global_batch_size,
            **{f"times skipped: {reason}": count for reason, count in loader.skipped.items()},
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(shown[:rows], tokenizer, config, counts), encoding="utf-8")
    if skipped <= config.data.max_bad_share * (used + skipped):
        return ""
    reasons = ", ".join(f"{reason} {count}" for reason, count in loader.skipped.most_common())
    return (
        f"{bad} of the {total} samples cannot be used; {skipped} of {used + skipped} reads met one ({reasons}). "
        f"Training would end: data.max_bad_share is {config.data.max_bad_share:g}"
    )
