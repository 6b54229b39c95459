"""Writes a Hugging Face folder of a checkpoint of any layout: `emu2 convert to-hf` as a program of its own.

    python tools/convert_to_hf.py --checkpoint runs/demo/checkpoints/step_00000040 --output runs/demo/hf --verify

docs/conversion.md says what is read and written.
"""

import sys

from emu2_megatron.convert.command import main

if __name__ == "__main__":
    sys.exit(main("to-hf", __doc__))
