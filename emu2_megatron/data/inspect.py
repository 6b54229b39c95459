"""`emu2 data inspect`: the first packed sequences of a run, as a page."""

from dataclasses import replace
from pathlib import Path

from emu2_megatron.config.schema import Config
from emu2_megatron.data.inspect_page import page
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.tokenizer import tokenizer_for
from emu2_megatron.errors import ConfigError


def inspect(config: Config, rows: int, output: Path) -> None:
    """Write a page with the first `rows` sequences of the first global batches.

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
        counts = {
            "samples in the shards": sum(len(source) for source in loader.sources),
            "rows of a step": config.training.global_batch_size,
            **{f"skipped: {reason}": count for reason, count in loader.skipped.items()},
        }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page(shown[:rows], tokenizer, config, counts), encoding="utf-8")
