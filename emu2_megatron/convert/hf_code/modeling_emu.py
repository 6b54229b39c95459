# Copyright the emu2_megatron contributors. SPDX-License-Identifier: Apache-2.0
"""Emu2 (arXiv 2312.13286) for transformers: reads text, pictures and video frames in any order, and continues them with
text (`generate`) or with the visual embeddings of a picture (`generate_image`).

Shapes: B sequences, S positions, D decoder width, I images, P patches and CLS, E encoder width, Q visual embeddings of
an image, V vocabulary.
"""

import inspect
from collections.abc import Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DynamicCache, LlamaForCausalLM, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast

from .configuration_emu import EmuConfig

IMAGE_PLACEHOLDER = "[<IMG_PLH>]"
"""Stands for a picture in a prompt."""
FRAME_PLACEHOLDER = "[<VID_PLH>]"
"""Stands for one frame of a video."""

SYSTEM_MESSAGE = "You are a helpful assistant, dedicated to delivering comprehensive and meticulous responses."
"""Emu2-Chat's, for conversations."""
CONCISE_MESSAGE = "You are a helpful assistant, dedicated to provide concise and efficient answers."
"""Emu2-Chat's, for short answers and for grounding."""

_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class Attention(nn.Module):
    """Full self-attention over patches. The rows of `qkv` are q, k, v; k's part of the bias is zero."""

    def __init__(self, width: int, head_width: int) -> None:
        super().__init__()
        self.heads, self.head_width = width // head_width, head_width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x_IPE: Tensor) -> Tensor:
        images, patches, width = x_IPE.shape
        q, k, v = self.qkv(x_IPE).view(images, patches, 3, self.heads, self.head_width).permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(images, patches, width))
        return out


class Mlp(nn.Module):
    """Linear, exact GELU, linear."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x_IPE: Tensor) -> Tensor:
        out: Tensor = self.fc2(F.gelu(self.fc1(x_IPE)))
        return out


class Block(nn.Module):
    """Attention and MLP, each normalised before it is added."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width, eps = vision["width"], vision["layer_norm_eps"]
        self.attn = Attention(width, vision["head_width"])
        self.norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = Mlp(width, vision["intermediate_size"])
        self.norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x_IPE: Tensor) -> Tensor:
        x_IPE = x_IPE + self.norm1(self.attn(x_IPE))
        out: Tensor = x_IPE + self.norm2(self.mlp(x_IPE))
        return out


class PatchEmbed(nn.Module):
    """A picture to its patches, row by row."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, vision["width"], vision["patch_size"], stride=vision["patch_size"])

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        out: Tensor = self.proj(pixels_I3HW).flatten(2).transpose(1, 2)
        return out


class EvaVisionTransformer(nn.Module):
    """The image tower of EVA-02-CLIP-E-plus, without its last norm and head."""

    def __init__(self, vision: dict[str, Any]) -> None:
        super().__init__()
        width, side = vision["width"], vision["image_size"] // vision["patch_size"]
        self.patch_embed = PatchEmbed(vision)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + side * side, width))
        self.blocks = nn.ModuleList(Block(vision) for _ in range(vision["layers"]))

    def forward(self, pixels_I3HW: Tensor) -> Tensor:
        """[I, P, E], CLS first."""
        x_IPE = self.patch_embed(pixels_I3HW)
        x_IPE = torch.cat([self.cls_token.expand(len(x_IPE), -1, -1), x_IPE], dim=1) + self.pos_embed
        for block in self.blocks:
            x_IPE = block(x_IPE)
        out: Tensor = x_IPE
        return out


class EmuDecoder(nn.Module):
    """Holds the language model under its released name."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.lm = LlamaForCausalLM(config.llama_config())


class EmuModel(nn.Module):
    """Encoder and decoder."""

    def __init__(self, config: EmuConfig) -> None:
        super().__init__()
        self.visual = EvaVisionTransformer(config.vision_config)
        self.decoder = EmuDecoder(config)


class EmuForCausalLM(PreTrainedModel):
    """Emu2 with its two projections: of visual embeddings into the decoder, and of its hidden states back."""

    config_class = EmuConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = False
    _supports_sdpa = True
    _no_split_modules = ["LlamaDecoderLayer", "Block"]
    _keys_to_ignore_on_load_unexpected = [r"rotary_emb\.inv_freq$"]

    def __init__(self, config: EmuConfig) -> None:
        super().__init__(config)
        self.model = EmuModel(config)
        self.project_down = nn.Linear(config.hidden_size, config.d_model, bias=False)
        self.project_up = nn.Linear(config.d_model, config.hidden_size, bias=False)
        self.n_query = config.vision_config["n_query"]
        self.v_query = config.vision_config["v_query"]
        self.post_init()

    # What goes in

    def prepare_image_input(self, images: Sequence[Image.Image]) -> Tensor:
        """Pictures as the encoder wants them: squashed to its size, scaled and normalised, [I, 3, H, W] on the model's
        device."""
        size = self.config.vision_config["image_size"]
        resized = [image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC) for image in images]
        pixels = torch.stack([torch.from_numpy(np.array(image)) for image in resized]).permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(x).view(3, 1, 1) for x in (_MEAN, _STD))
        return ((pixels - mean) / std).to(self.device, self.dtype)

    def format_chat(
        self, turns: Sequence[tuple[str, str | None]], system_msg: str = SYSTEM_MESSAGE, grounding: bool = False
    ) -> str:
        """A conversation as Emu2-Chat was trained on it.

        Args:
            turns: (what the user said, the answer) from the first on; the last answer is None, for the model to give.
            system_msg: stands first; may be empty.
            grounding: ask for boxes in the answer.
        """
        text = system_msg
        for said, answer in turns:
            text += "[USER]:" + _after_colon(said) + "[ASSISTANT]:"
            if answer is not None:
                text += _after_colon(answer) + "</s>"
        return text + ("<grounding>" if grounding else "")

    def build_input_ids(
        self,
        text: Sequence[str],
        tokenizer: Any,
        image: Sequence[Image.Image] | Tensor | None = None,
        video: Sequence[Image.Image] | Tensor | None = None,
        system_msg: str = "",
        to_cuda: bool | None = None,
    ) -> dict[str, Any]:
        """Prompts to what `generate` takes.

        Args:
            text: prompts. `[<IMG_PLH>]` stands for a picture; a video is `[VIDEO]` and `[<VID_PLH>]` for every frame.
                For a chat model each is a question, unless it is a whole conversation of `format_chat`.
            tokenizer: the folder's.
            image, video: pictures and frames in the order of their placeholders, over all prompts; PIL or normalised.
            system_msg: stands before a question to a chat model.
            to_cuda: not used; everything goes to the model's device.
        """
        if self.config.model_version == "chat":
            text = [t if "[ASSISTANT]" in t else self.format_chat([(t, None)], system_msg) for t in text]
        text = [
            t.replace(IMAGE_PLACEHOLDER, f"[IMG]{'<image>' * self.n_query}[/IMG]").replace(
                FRAME_PLACEHOLDER, f"[IMG]{'[gIMG]' * self.v_query}[/IMG]"
            )
            for t in text
        ]
        tokenizer.padding_side = "left"
        tokens = tokenizer(list(text), padding="longest", return_tensors="pt")
        return {
            "input_ids": tokens["input_ids"].to(self.device),
            "attention_mask": tokens["attention_mask"].to(self.device),
            "image": self._pixels(image),
            "video": self._pixels(video),
        }

    def _pixels(self, images: Sequence[Image.Image] | Tensor | None) -> Tensor | None:
        if images is None or len(images) == 0:
            return None
        return images.to(self.device, self.dtype) if isinstance(images, Tensor) else self.prepare_image_input(images)

    def encode_image(self, image: Tensor, n_query: int | None = None) -> Tensor:
        """Normalised pictures [I, 3, H, W] to visual embeddings [I, Q, E]: the patches, averaged over squares."""
        hidden_IPE = self.model.visual(image)[:, 1:]
        images, patches, width = hidden_IPE.shape
        side = isqrt(patches)
        grid = hidden_IPE.transpose(1, 2).reshape(images, width, side, side)
        pooled: Tensor = F.avg_pool2d(grid, side // isqrt(n_query or self.n_query)).flatten(2).transpose(1, 2)
        return pooled.contiguous()

    def embed(self, input_ids: Tensor, image: Tensor | None = None, video: Tensor | None = None) -> Tensor:
        """What the decoder reads, [B, S, D]: embeddings of tokens, at `<image>` and `[gIMG]` of pictures."""
        hidden_BSD: Tensor = self.model.decoder.lm.model.embed_tokens(input_ids).clone()
        for pixels, queries, token in (
            (image, self.n_query, self.config.image_token_id),
            (video, self.v_query, self.config.frame_token_id),
        ):
            at = input_ids == token
            wanted = 0 if pixels is None else len(pixels) * queries
            if int(at.sum()) != wanted:
                raise ValueError(
                    f"{wanted} visual embeddings for {int(at.sum())} places (token {token}) in the prompts"
                )
            if pixels is not None:
                rows = self.project_up(self.encode_image(pixels, queries).flatten(0, 1))
                hidden_BSD[at] = rows.to(hidden_BSD.dtype)
        return hidden_BSD

    # What comes out

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image: Tensor | None = None,
        video: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits of the next token at every position; `project_down` of the last hidden states are the next visual
        embeddings. `kwargs` are those of transformers' LLaMA (`labels`, `output_hidden_states`, ...)."""
        if inputs_embeds is None:
            if input_ids is None:
                raise ValueError("give input_ids or inputs_embeds")
            inputs_embeds = self.embed(input_ids, image, video)
        if attention_mask is not None and "position_ids" not in kwargs:
            kwargs["position_ids"] = _positions(attention_mask)[:, -inputs_embeds.shape[1] :]
        out: CausalLMOutputWithPast = self.model.decoder.lm(
            inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )
        return out

    @torch.no_grad()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        image: Tensor | None = None,
        video: Tensor | None = None,
        num_beams: int = 5,
        max_new_tokens: int = 10,
        min_len: int = 1,
        do_sample: bool = False,
        length_penalty: float = -1.0,
        repetition_penalty: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        """Continue prompts with text: the new tokens, [B, at most max_new_tokens].

        The defaults are the released ones. `kwargs` go to transformers' `generate` (top_p, temperature, ...).
        """
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        if num_beams > 1:
            kwargs["length_penalty"] = length_penalty
        tokens: Tensor = self.model.decoder.lm.generate(
            inputs_embeds=self.embed(input_ids, image, video),
            attention_mask=attention_mask,
            num_beams=num_beams,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_len,
            do_sample=do_sample,
            repetition_penalty=repetition_penalty,
            **{name: value for name, value in kwargs.items() if value is not None},
        )
        return tokens

    @torch.no_grad()
    def generate_image(
        self,
        text: Sequence[str] | None = None,
        tokenizer: Any = None,
        image: Sequence[Image.Image] | Tensor | None = None,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Continue prompts with a picture: its visual embeddings [B, n_query, E], one after another, each of which the
        decoder reads before it regresses the next.

        Args:
            text: prompts with `[<IMG_PLH>]` where pictures are, taken as they are also by a chat model.
            tokenizer: the folder's.
            image: their pictures.
            input_ids, attention_mask: the prompts as tokens, padded on the left, instead of `text`.
        """
        if input_ids is None:
            if text is None or tokenizer is None:
                raise ValueError("give text and tokenizer, or input_ids")
            prompts = [t.replace(IMAGE_PLACEHOLDER, f"[IMG]{'<image>' * self.n_query}[/IMG]") for t in text]
            tokenizer.padding_side = "left"
            tokens = tokenizer(prompts, padding="longest", return_tensors="pt").to(self.device)
            input_ids, attention_mask = tokens["input_ids"], tokens["attention_mask"]
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        begin = torch.full_like(input_ids[:, :1], self.config.image_begin_token_id)
        step_BSD = self.embed(torch.cat([input_ids, begin], dim=1), self._pixels(image))
        mask_BS = F.pad(attention_mask, (0, 1), value=1)

        llama = self.model.decoder.lm.model
        cache = DynamicCache(config=llama.config)
        # transformers 5 has renamed the argument on its way.
        name = "cache" if "cache" in inspect.signature(llama.forward).parameters else "past_key_values"
        regressed: list[Tensor] = []
        while True:
            length = step_BSD.shape[1]
            hidden_BSD = llama(
                inputs_embeds=step_BSD,
                attention_mask=mask_BS,
                position_ids=_positions(mask_BS)[:, -length:],
                use_cache=True,
                **{name: cache},
            ).last_hidden_state
            regressed.append(self.project_down(hidden_BSD[:, -1:]))
            if len(regressed) == self.n_query:
                return torch.cat(regressed, dim=1)
            step_BSD = self.project_up(regressed[-1])
            mask_BS = F.pad(mask_BS, (0, 1), value=1)


def _positions(mask_BS: Tensor) -> Tensor:
    """Positions that do not count padding on the left."""
    return (mask_BS.long().cumsum(dim=1) - 1).clamp(min=0)


def _after_colon(said: str) -> str:
    """Text with a space before it; none before an added token, which text does not touch in training."""
    said = said.strip()
    return said if said.startswith(("[IMG]", "[VIDEO]", "[<", "<grounding>", "<phrase>", "<object>")) else f" {said}"
