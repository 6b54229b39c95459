# Copyright the emu2_megatron contributors. SPDX-License-Identifier: Apache-2.0
"""The configuration of an Emu2 model (arXiv 2312.13286) for transformers: LLaMA's fields, and `vision_config`."""

from typing import Any

from transformers import LlamaConfig, PretrainedConfig


class EmuConfig(PretrainedConfig):
    """Sizes of the decoder, of the visual encoder (`vision_config`), and token ids.

    `vision_config` has `image_size`, `patch_size`, `layers`, `width`, `head_width`, `intermediate_size`,
    `layer_norm_eps`, and the visual embeddings of a picture (`n_query`) and of a video frame (`v_query`).
    """

    model_type = "emu2"

    def __init__(
        self,
        vocab_size: int = 32272,
        hidden_size: int = 6656,
        intermediate_size: int = 17920,
        num_hidden_layers: int = 60,
        num_attention_heads: int = 52,
        max_position_embeddings: int = 2048,
        initializer_range: float = 0.02,
        rms_norm_eps: float = 1e-6,
        rope_theta: float = 10000.0,
        d_model: int = 1792,
        vision_config: dict[str, Any] | None = None,
        model_version: str = "base",
        pad_token_id: int = 32000,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.hidden_size = hidden_size
        self.intermediate_size = intermediate_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.max_position_embeddings = max_position_embeddings
        self.initializer_range = initializer_range
        self.rms_norm_eps = rms_norm_eps
        self.rope_theta = rope_theta
        self.d_model = d_model
        self.vision_config = vision_config or {
            "image_size": 448, "patch_size": 14, "layers": 64, "width": d_model, "head_width": 112,
            "intermediate_size": 15360, "layer_norm_eps": 1e-6, "n_query": 64, "v_query": 64,
        }  # fmt: skip
        self.model_version = model_version
        kwargs.pop("rope_scaling", None)  # always null; transformers 5 has another name for it
        super().__init__(pad_token_id=pad_token_id, bos_token_id=bos_token_id, eos_token_id=eos_token_id, **kwargs)

    # The added tokens follow the SentencePiece pieces in the released order, [PAD] first.

    @property
    def image_begin_token_id(self) -> int:
        """`[IMG]`."""
        return int(self.pad_token_id) + 1

    @property
    def image_token_id(self) -> int:
        """`<image>`, in whose place a visual embedding of a picture stands."""
        return int(self.pad_token_id) + 3

    @property
    def frame_token_id(self) -> int:
        """`[gIMG]`, the same of a video frame."""
        return int(self.pad_token_id) + 4

    def llama_config(self) -> LlamaConfig:
        """The language model's part."""
        return LlamaConfig(
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            intermediate_size=self.intermediate_size,
            num_hidden_layers=self.num_hidden_layers,
            num_attention_heads=self.num_attention_heads,
            max_position_embeddings=self.max_position_embeddings,
            initializer_range=self.initializer_range,
            rms_norm_eps=self.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": self.rope_theta},
            pad_token_id=self.pad_token_id,
            bos_token_id=self.bos_token_id,
            eos_token_id=self.eos_token_id,
            tie_word_embeddings=False,
        )
