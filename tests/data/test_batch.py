"""Index tensors of a micro-batch, worked out by hand."""

import torch

from emu2_megatron.data.batch import cu_seqlens, share, targets
from emu2_megatron.data.sequence import PADDING, START, TEXT_TARGET, VISUAL, VISUAL_TARGET

T, V, R = TEXT_TARGET, VISUAL, VISUAL | VISUAL_TARGET


def test_targets() -> None:
    """Row 0: `<s> a [IMG] v v [/IMG]`, both regressed. Row 1: `<s> [IMG] v b c d`, a picture that is only looked at."""
    tokens_BS = torch.tensor([[1, 10, 50, 51, 51, 52], [1, 50, 51, 11, 12, 13]])
    roles_BS = torch.tensor([[0, T, 0, R, R, 0], [0, 0, V, T, T, T]], dtype=torch.uint8)
    got = targets(tokens_BS, roles_BS)
    assert got.text_labels_SB.T.tolist() == [[10, 0, 0, 0, 0, 0], [0, 0, 11, 12, 13, 0]]
    assert got.text_mask_SB.T.tolist() == [[1, 0, 0, 0, 0, 0], [0, 0, 1, 1, 1, 0]]
    assert got.visual_slots_SB.T.tolist() == [[-1, -1, -1, 0, 1, -1], [-1, -1, 2, -1, -1, -1]]
    assert got.visual_rows_R.tolist() == [0, 1, 2]
    # [IMG] at 2 predicts the first embedding, the first embedding at 3 the second.
    assert got.predictor_positions_T.tolist() == [2 * 2 + 0, 3 * 2 + 0]
    assert got.predicted_rows_T.tolist() == [0, 1]


def test_nothing_to_learn() -> None:
    got = targets(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.uint8))
    assert not got.text_mask_SB.any()
    assert (got.visual_slots_SB == -1).all()
    assert len(got.visual_rows_R) == len(got.predictor_positions_T) == len(got.predicted_rows_T) == 0
    assert got.visual_slots_SB.dtype == got.predicted_rows_T.dtype == torch.int32


def test_cu_seqlens() -> None:
    """Samples of 2 and 4 tokens; a whole sequence without any mark; 1, 2 and 1 tokens and 2 of padding."""
    P = PADDING
    roles_BS = torch.zeros(3, 6, dtype=torch.uint8)
    roles_BS[0] = torch.tensor([START, T, START, V, R, T])
    roles_BS[2] = torch.tensor([START, START, T, START | V, START | P, P])
    got = cu_seqlens(roles_BS)
    assert got is not None and got.dtype == torch.int32
    assert got.tolist() == [0, 2, 6, 12, 13, 15, 16, 18]
    assert roles_BS[1, 0] == 0, "the roles are not ours to change"
    assert cu_seqlens(roles_BS[1:2]) is None
    roles_BS[1, 0] = START
    assert cu_seqlens(roles_BS[1:2]) is None
    roles_BS[1, 5] = START
    assert torch.equal(cu_seqlens(roles_BS[1:2]), torch.tensor([0, 5, 6]))


def test_shares() -> None:
    """Eight positions over two ranks: the outer and the inner quarters, each split again by sequence parallelism."""
    assert share(8).tokens.tolist() == share(8).hidden.tolist() == list(range(8))
    outer, inner = share(8, 0, 2), share(8, 1, 2)
    assert outer.tokens.tolist() == [0, 1, 6, 7] and inner.tokens.tolist() == [2, 3, 4, 5]
    second = share(8, 0, 2, 1, 2)
    assert second.tokens.tolist() == [0, 1, 6, 7] and second.hidden.tolist() == [6, 7]


def test_targets_of_a_share() -> None:
    """`<s> a [IMG] v v [/IMG] b c`: of the outer quarters, positions 0 1 6 7, with hidden states of 0 1 or of 6 7."""
    tokens_BS = torch.tensor([[1, 10, 50, 51, 51, 52, 11, 12]])
    roles_BS = torch.tensor([[0, T, 0, R, R, 0, T, T]], dtype=torch.uint8)
    outer = targets(tokens_BS, roles_BS, share(8, 0, 2))
    assert outer.text_labels_SB.flatten().tolist() == [10, 0, 12, 0]
    assert outer.text_mask_SB.flatten().tolist() == [1, 0, 1, 0]
    assert outer.visual_slots_SB.flatten().tolist() == [-1] * 4
    assert len(outer.visual_rows_R) == len(outer.predictor_positions_T) == 0
    # Positions 2 3 4 5: both embeddings are at local 1 and 2; [IMG] at local 0 and the first embedding predict them.
    inner = targets(tokens_BS, roles_BS, share(8, 1, 2))
    assert inner.text_labels_SB.flatten().tolist() == [0, 0, 0, 11]
    assert inner.visual_slots_SB.flatten().tolist() == [-1, 0, 1, -1] and inner.visual_rows_R.tolist() == [0, 1]
    assert inner.predictor_positions_T.tolist() == [0, 1] and inner.predicted_rows_T.tolist() == [0, 1]
    # Split by sequence: 2 3 | 4 5. The second rank holds the second embedding, and predicts nothing visual.
    first, second = (targets(tokens_BS, roles_BS, share(8, 1, 2, rank, 2)) for rank in range(2))
    assert first.text_labels_SB.equal(inner.text_labels_SB)  # labels are not split by sequence parallelism
    assert first.visual_slots_SB.flatten().tolist() == [-1, 0] and first.visual_rows_R.tolist() == [0]
    assert second.visual_slots_SB.flatten().tolist() == [0, -1] and second.visual_rows_R.tolist() == [1]
    assert first.predictor_positions_T.tolist() == [0, 1] and second.predictor_positions_T.tolist() == []
