"""Writes a checkpoint of released weights, or of LLaMA and EVA-CLIP: `emu2 convert from-hf` as a program of its own.

    python tools/convert_from_hf.py --input /models/Emu2 --output checkpoints/emu2 --verify

docs/conversion.md says what is read and written.
"""

import sys

from emu2_megatron.convert.command import main

if __name__ == "__main__":
    sys.exit(main("from-hf", __doc__))
