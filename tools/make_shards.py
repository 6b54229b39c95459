"""Makes tar shards of folders, JSONL and Parquet files: `emu2 shards` as a program of its own.

    python tools/make_shards.py --input examples/data --output runs/shards

docs/data-format.md says what the input looks like and what becomes of it.
"""

import argparse
import sys

from emu2_megatron.data.make_shards import add_arguments, run
from emu2_megatron.errors import ConfigError, Emu2Error


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    try:
        return run(parser.parse_args(arguments))
    except Emu2Error as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1


if __name__ == "__main__":
    sys.exit(main())
