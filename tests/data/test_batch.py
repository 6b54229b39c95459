"""Index tensors of a micro-batch, worked out by hand."""

import torch

from emu2_megatron.data.batch import targets
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET

T, V, R = TEXT_TARGET, VISUAL, VISUAL | VISUAL_TARGET


def test_targets() -> None:
    """Row 0: `<s> a [IMG] v v [/IMG]`, both regressed. Row 1: `<s> [IMG] v b c d`, a picture that is only looked at."""
    tokens_BS = torch.tensor([[1, 10, 50, 51, 51, 52], [1, 50, 51, 11, 12, 13]])
    roles_BS = torch.tensor([[0, T, 0, R, R, 0], [0, 0, V, T, T, T]], dtype=torch.uint8)
    got = targets(tokens_BS, roles_BS)
    assert got.text_labels_SB.T.tolist() == [[10, 0, 0, 0, 0, 0], [0, 0, 11, 12, 13, 0]]
    assert got.text_mask_SB.T.tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert got.visual_positions_R.tolist() == [3 * 2 + 0, 4 * 2 + 0, 2 * 2 + 1]
    # [IMG] at 2 predicts the first embedding, the first embedding at 3 the second.
    assert got.predictor_positions_T.tolist() == [2 * 2 + 0, 3 * 2 + 0]
    assert got.predicted_rows_T.tolist() == [0, 1]


def test_nothing_to_learn() -> None:
    got = targets(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.uint8))
    assert not got.text_mask_SB.any()
    assert len(got.visual_positions_R) == len(got.predictor_positions_T) == len(got.predicted_rows_T) == 0
