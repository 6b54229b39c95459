"""Keys and values of what a batch has read so far, so that a new token costs one position and not all of them.

`DecoderStage.read` hands it the queries, keys and values of each layer as they leave the projection. Prompts of
different lengths are padded on the left: padding is never attended to and is not counted in positions.

Shapes: S new positions, B sequences, N heads of this tensor-parallel rank, H head width, L positions there is room for.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


class KVCache:
    """Of the layers of one pipeline stage, for one batch."""

    def __init__(self, real_BS: Tensor, room: int, frequencies_LH: Tensor, dtype: torch.dtype) -> None:
        """Empty.

        Args:
            real_BS: bool [B, S], which positions of the prompts are not padding, on the device.
            room: L, of which the prompts are the first S.
            frequencies_LH: fp32 [L, H] angles of the rotary embedding.
            dtype: of keys and values.
        """
        B, S = real_BS.shape
        self.room, self.length = room, 0
        self.prompt_length = S
        # The sign of the rotation's second half is in the sine.
        sine_LH = frequencies_LH.sin()
        sine_LH[:, : sine_LH.shape[1] // 2].neg_()
        self._cosine_LH, self._sine_LH = frequencies_LH.cos().to(dtype), sine_LH.to(dtype)
        self._padding_B = S - real_BS.sum(1)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._hidden_B11L: Tensor | None = None
        if not bool(real_BS.all()):
            hidden_BL = F.pad(~real_BS, (0, room - S))
            self._hidden_B11L = torch.zeros_like(hidden_BL, dtype=dtype).masked_fill_(hidden_BL, -torch.inf)
            self._hidden_B11L = self._hidden_B11L[:, None, None]

    def advance(self, positions: int) -> None:
        """Make place for the next S positions; before every forward pass."""
        start, self.length = self.length, self.length + positions
        assert self.length <= self.room
        numbers_SB = torch.arange(start, self.length, device=self._padding_B.device)[:, None]
        if self._hidden_B11L is None:
            # One row for all sequences.
            self._rotation = tuple(table[start : self.length, None, None] for table in self._tables)
        else:
            numbers_SB = (numbers_SB - self._padding_B).clamp(min=0)
            self._rotation = tuple(table[numbers_SB][:, :, None] for table in self._tables)
        self._causal = positions > 1 and self._hidden_B11L is None and start == 0
        self._mask = None if self._causal else self._visible(start)

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Keep a layer's keys and values of the positions made place for, and attend to all that are kept.

        Args:
            layer: its number, any that no other layer of the stage has.
            query, key, value: [S, B, N, H], not rotated.

        Returns:
            [S, B, N * H].
        """
        S, B, N, H = query.shape
        if layer not in self._layers:
            self._layers[layer] = key.new_empty(B, N, self.room, H), key.new_empty(B, N, self.room, H)
        keys_BNLH, values_BNLH = (kept[:, :, : self.length] for kept in self._layers[layer])
        keys_BNLH[:, :, -S:] = self._rotated(key).permute(1, 2, 0, 3)
        values_BNLH[:, :, -S:] = value.permute(1, 2, 0, 3)
        out_BNSH = F.scaled_dot_product_attention(
            self._rotated(query).permute(1, 2, 0, 3), keys_BNLH, values_BNLH,
            attn_mask=self._mask, is_causal=self._causal,
        )  # fmt: skip
        return out_BNSH.permute(2, 0, 1, 3).reshape(S, B, N * H)

    def repeat(self, times: int) -> None:
        """Every sequence `times` times, one after the other: the beams of a prompt begin alike."""
        self._layers = {
            layer: (key.repeat_interleave(times, 0), value.repeat_interleave(times, 0))
            for layer, (key, value) in self._layers.items()
        }
        self._padding_B = self._padding_B.repeat_interleave(times)
        if self._hidden_B11L is not None:
            self._hidden_B11L = self._hidden_B11L.repeat_interleave(times, 0)

    def reorder(self, parents_B: Tensor) -> None:
        """Sequence b goes on from what sequence `parents_B[b]` (int64, on the device) has read; both have the same
        prompt, which therefore stays where it is."""
        written = slice(self.prompt_length, self.length)
        for kept in (tensor for pair in self._layers.values() for tensor in pair):
            kept[:, :, written] = kept[:, :, written].index_select(0, parents_B)

    @property
    def _tables(self) -> tuple[Tensor, Tensor]:
        return self._cosine_LH, self._sine_LH

    def _rotated(self, x_SBNH: Tensor) -> Tensor:
        cosine, sine = self._rotation
        first, second = x_SBNH.chunk(2, -1)
        return x_SBNH * cosine + torch.cat((second, first), -1) * sine

    def _visible(self, start: int) -> Tensor | None:
        """What is added to scores: [B, 1, S or 1, length], or None if all is visible."""
        if self.length - start == 1:
            return None if self._hidden_B11L is None else self._hidden_B11L[..., : self.length]
        numbers = torch.arange(self.length, device=self._padding_B.device)
        later = numbers > numbers[start:, None]
        mask = torch.zeros_like(later, dtype=self._cosine_LH.dtype).masked_fill_(later, -torch.inf)
        if self._hidden_B11L is not None:
            mask = mask + self._hidden_B11L[..., : self.length]
            # Padding sees itself: a softmax over nothing is not a number.
            mask.masked_fill_(numbers == numbers[start:, None], 0.0)
        return mask
