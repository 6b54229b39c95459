"""Text, visual embeddings and boxes from a trained model: docs/inference.md."""

import emu2_megatron.platform.device  # noqa: F401  (before megatron-core: see its docstring)
