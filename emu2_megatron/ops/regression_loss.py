"""The regression loss of visual embeddings (spec: mean squared error in the encoder's own space, Emu2 §2.3)."""

from torch import Tensor


def squared_error_sum(predicted_RE: Tensor, target_RE: Tensor) -> Tensor:
    """Sum of squared differences, accumulated in fp32.

    Args:
        predicted_RE: [R, E] outputs of `project_down`.
        target_RE: [R, E] visual embeddings; no gradient flows into them.

    Returns:
        fp32 scalar; 0 (with a zero gradient) when R is 0.
    """
    return (predicted_RE.float() - target_RE.detach().float()).square().sum()
