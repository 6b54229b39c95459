"""What the precisions of a run are to PyTorch."""

import torch

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
"""training.precision to the dtype of weights and activations."""
