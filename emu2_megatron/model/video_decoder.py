"""The video decoder: Stable Diffusion 2.1's UNet made 3D (Emu2, arXiv 2312.13286).

The paper puts a 1D convolution over time after each 2D convolution and extends spatial attention to spatio-temporal
attention. Its weights were never published; how the new parts begin is Make-A-Video's rule (arXiv 2209.14792): at the
start the network is the 2D one, frame by frame.

diffusers' `UNet2DConditionModel` runs as it is on frames folded into the batch. `inflate` hangs a child named
`temporal` on each of its 2D convolutions and self-attentions, and a forward hook sends their output through it. So the
2D weights keep their names, and the new ones are those with `.temporal.` in theirs.

**Both kinds of child add to what they are given, and what they add is zero at first.** For the convolution that is a
Conv1d whose kernel is the identity plus the stored one, which starts at zero. Stored so, the identity is exact in
every precision (a GPU's TF32 would round what it multiplies by a stored 1), and weight decay pulls towards the 2D
network rather than away from it.

**Spatio-temporal attention is factorised**: a frame's tokens attend to each other as they did, then each position
attends to itself in all frames. A token so reads all T·P tokens of the clip in two steps, of P and T keys. Attention
over all T·P at once could not equal the 2D network at the start unless a bias of minus infinity masked the other
frames' keys, and that has no gradient. It could be a second branch whose output starts at zero, and would cost T times
the spatial attention: at 768 pixels and T = 8 (counted) 2.3 times the FLOPs of the whole 2D network, against 5 % for
attention over time and 15 % for the convolutions.

Shapes: B clips, T frames of a clip, F = B·T frames in one row, clip by clip, C channels, H height (head width, in
attention), W width, P = H·W positions, N heads, Q embeddings of a frame, E encoder width.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from emu2_megatron.config.schema import Config, VideoDecoderConfig
from emu2_megatron.errors import ConfigError, ConversionError
from emu2_megatron.model.visual_decoder import check_pictures, downsampling

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

_MOST_SEQUENCES = 2**15
"""Attention kernels put sequences on a dimension of CUDA's grid that ends at 65535 (pytorch issue 142228)."""


@dataclass
class Frames:
    """How many frames make a clip in the current forward pass; one object, which all temporal modules share."""

    count: int = 1


class TemporalConv(nn.Conv1d):
    """`x + conv1d(x)` over time at every position, zeros beyond a clip's ends. The kernel starts at zero."""

    def __init__(self, channels: int, kernel_size: int, frames: Frames) -> None:
        super().__init__(channels, channels, kernel_size, padding=kernel_size // 2)
        self.frames = frames
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x_FCHW: Tensor) -> Tensor:
        x_BCTP = x_FCHW.unflatten(0, (-1, self.frames.count)).transpose(1, 2).flatten(3)
        # A Conv1d of every position is a Conv2d one position wide, whose operands need no second copy.
        y_BCTP = F.conv2d(x_BCTP, self.weight[..., None], self.bias, padding=(self.kernel_size[0] // 2, 0))
        return x_FCHW + y_BCTP.transpose(1, 2).reshape(x_FCHW.shape)


class TemporalAttention(nn.Module):
    """`x + to_out(attention(norm(x)))` over the T frames at every position. `to_out` starts at zero.

    Sinusoids of the frame's number are added behind the norm, so that attention can tell before from after, for any T.
    """

    def __init__(self, channels: int, heads: int, frames: Frames) -> None:
        super().__init__()
        self.heads = heads
        self.frames = frames
        self.norm = nn.LayerNorm(channels)
        self.to_q = nn.Linear(channels, channels, bias=False)
        self.to_k = nn.Linear(channels, channels, bias=False)
        self.to_v = nn.Linear(channels, channels, bias=False)
        self.to_out = nn.Linear(channels, channels)
        nn.init.zeros_(self.to_out.weight)
        nn.init.zeros_(self.to_out.bias)

    def forward(self, x_FPC: Tensor) -> Tensor:
        x_BTPC = x_FPC.unflatten(0, (-1, self.frames.count))
        B, T, P, C = x_BTPC.shape
        y_BTPC = self.norm(x_BTPC) + _sinusoids(T, C, x_FPC.device).to(x_FPC.dtype)[:, None]
        # Every position of every clip is a sequence of its own.
        q, k, v = (
            to(y_BTPC).view(B, T, P, self.heads, -1).permute(0, 2, 3, 1, 4).flatten(0, 1).split(_MOST_SEQUENCES)
            for to in (self.to_q, self.to_k, self.to_v)
        )
        attended = torch.cat([F.scaled_dot_product_attention(*part) for part in zip(q, k, v, strict=True)])
        attended_BTPC = attended.view(B, P, self.heads, T, -1).permute(0, 3, 1, 2, 4).reshape(B, T, P, C)
        out_FPC: Tensor = x_FPC + self.to_out(attended_BTPC).flatten(0, 1)
        return out_FPC


def _sinusoids(frames: int, channels: int, device: torch.device) -> Tensor:
    """fp32 [T, C]: sines, then cosines, of wavelengths from 2 pi to 20000 pi frames (arXiv 1706.03762)."""
    half = channels // 2
    rates = 10000.0 ** (-torch.arange(half, device=device) / half)
    angles = torch.arange(frames, device=device)[:, None] * rates
    return torch.cat([angles.sin(), angles.cos()], dim=1)


class VideoDecoder(nn.Module):
    """An inflated UNet (`inflate`) that reads and gives back clips."""

    def __init__(self, unet: "UNet2DConditionModel", frames: Frames) -> None:
        super().__init__()
        self.unet = unet
        self.frames = frames

    def forward(self, latents_BTCHW: Tensor, timesteps_B: Tensor, embeddings_BTQE: Tensor) -> Tensor:
        """What the UNet predicts of each frame (noise or v), [B, T, C, H, W], in the dtype of the weights.

        Args:
            latents_BTCHW: noisy latents, any T from 1, in the dtype of the weights.
            timesteps_B: from 0 to the schedule's length: all frames of a clip are equally noisy.
            embeddings_BTQE: visual embeddings of each frame, as the encoder or the language model gives them.

        Raises:
            ValueError: the shapes do not go together.
        """
        B, T = latents_BTCHW.shape[:2]
        width = self.unet.config.cross_attention_dim
        if embeddings_BTQE.shape[:2] != (B, T) or embeddings_BTQE.shape[3:] != (width,) or timesteps_B.shape != (B,):
            raise ValueError(
                f"latents of {B} clips of {T} frames go with {B} timesteps and embeddings [{B}, {T}, Q, {width}], "
                f"got {list(timesteps_B.shape)} and {list(embeddings_BTQE.shape)}"
            )
        self.frames.count = T
        predicted_FCHW: Tensor = self.unet(
            latents_BTCHW.flatten(0, 1), timesteps_B.repeat_interleave(T), embeddings_BTQE.flatten(0, 1)
        ).sample
        return predicted_FCHW.view(latents_BTCHW.shape)

    def enable_gradient_checkpointing(self) -> None:
        """Keep only the inputs of residual blocks and transformers for backward, and compute the rest again."""
        self.unet.enable_gradient_checkpointing(self._checkpoint)

    def _checkpoint(self, run: Callable[..., Any], *args: Any) -> Any:
        frames = self.frames.count

        def again(*args: Any) -> Any:
            self.frames.count = frames  # a forward pass in between may have had clips of another length
            return run(*args)

        return checkpoint(again, *args, use_reentrant=False)


def inflate(unet: "UNet2DConditionModel", temporal_kernel_size: int = 3) -> VideoDecoder:
    """Makes a 2D UNet a video decoder that equals it frame by frame. The UNet becomes part of it, and is changed.

    A `TemporalConv` follows each Conv2d, a `TemporalAttention` each self-attention (`attn1`), with as many channels and
    heads, on the device and in the dtype of the UNet.
    """
    frames = Frames()
    for name, module in list(unet.named_modules()):
        temporal: nn.Module
        if isinstance(module, nn.Conv2d):
            temporal = TemporalConv(module.out_channels, temporal_kernel_size, frames)
        elif name.endswith(".attn1"):
            temporal = TemporalAttention(module.query_dim, module.heads, frames)
        else:
            continue
        like = next(module.parameters())
        module.add_module("temporal", temporal.to(device=like.device, dtype=like.dtype))
        module.register_forward_hook(_through_temporal)
    return VideoDecoder(unet, frames)


def _through_temporal(module: nn.Module, args: Any, output: Tensor) -> Tensor:
    out: Tensor = module.get_submodule("temporal")(output)
    return out


def build(config: VideoDecoderConfig, width: int, seed: int = 0) -> VideoDecoder:
    """A video decoder with fresh weights, in fp32 on the CPU, or under `torch.device("meta")`.

    Args:
        config: the sizes.
        width: E, of the embeddings it reads.
        seed: of the weights.

    Raises:
        ConfigError: sizes that do not go together.
    """
    _validate(config)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        return inflate(build_2d(config, width), config.temporal_kernel_size)


def build_2d(config: VideoDecoderConfig, width: int) -> "UNet2DConditionModel":
    """The 2D UNet that `build` makes 3D."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(**unet_config(config, width))


def _validate(config: VideoDecoderConfig) -> None:
    if len(config.unet_channels) < 2 or len(config.unet_attention_heads) != len(config.unet_channels):
        raise ConfigError(
            f"video_decoder.unet_attention_heads: {len(config.unet_attention_heads)} levels, but unet_channels has "
            f"{len(config.unet_channels)}; both name the same levels, at least two"
        )
    for channels, heads in zip(config.unet_channels, config.unet_attention_heads, strict=True):
        if channels % heads or channels % config.norm_num_groups or channels % 2:
            raise ConfigError(
                f"video_decoder.unet_channels: {channels} must be even, and divisible by the level's {heads} attention "
                f"heads and by norm_num_groups {config.norm_num_groups}"
            )
    if config.temporal_kernel_size % 2 == 0:
        raise ConfigError(f"video_decoder.temporal_kernel_size: {config.temporal_kernel_size} is not odd")
    check_pictures(config)


def unet_config(config: VideoDecoderConfig, width: int) -> dict[str, Any]:
    """Stable Diffusion 2.1's unet/config.json, but for the width of cross-attention."""
    levels = len(config.unet_channels)
    return {
        "in_channels": config.latent_channels,
        "out_channels": config.latent_channels,
        "down_block_types": ("CrossAttnDownBlock2D",) * (levels - 1) + ("DownBlock2D",),
        "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * (levels - 1),
        "block_out_channels": config.unet_channels,
        "layers_per_block": config.unet_layers_per_block,
        "norm_num_groups": config.norm_num_groups,
        "attention_head_dim": config.unet_attention_heads,  # diffusers means their number
        "cross_attention_dim": width,
        "use_linear_projection": True,
    }


def forward_flops(config: Config) -> int:
    """FLOPs of the UNet for one clip, counted as `visual_decoder.forward_flops` does."""
    decoder, width = config.video_decoder, config.model.encoder.hidden_size
    size = decoder.image_size // downsampling(decoder)
    with torch.device("meta"), torch.no_grad():
        network = build(decoder, width)
        noisy_BTCHW = torch.empty(1, decoder.frames, decoder.latent_channels, size, size)
        embeddings_BTQE = torch.empty(1, decoder.frames, config.model.frame_queries, width)
        with FlopCounterMode(display=False) as counted:
            network(noisy_BTCHW, torch.empty(1), embeddings_BTQE)
    return int(counted.get_total_flops())


@dataclass(frozen=True)
class Origins:
    """Where each tensor of a decoder came from, by its name in the UNet; every name is in one of the three."""

    taken: tuple[str, ...]
    """From the 2D checkpoint, to the bit (a wider dtype keeps the values)."""
    reinitialised: tuple[str, ...]
    """Cross-attention's keys and values: theirs read another width than E."""
    new: tuple[str, ...]
    """Temporal: the 2D network has none."""


def from_2d(
    config: VideoDecoderConfig, width: int, weights: Mapping[str, Tensor], seed: int = 0
) -> tuple[VideoDecoder, Origins]:
    """A video decoder that begins from the weights of a 2D UNet, and what came from where.

    Args:
        config: the sizes.
        width: E, of the embeddings it reads.
        weights: the UNet's state dict in diffusers' names (`unet/diffusion_pytorch_model.safetensors`).
        seed: of what is new or of another shape.

    Raises:
        ConfigError: sizes in config that do not go together.
        ConversionError: a tensor is missing, surplus or of another shape, and is not a key or value of cross-attention
            that reads another width.
    """
    decoder = build(config, width, seed)
    return decoder, load_2d(decoder, weights)


def load_2d(decoder: VideoDecoder, weights: Mapping[str, Tensor]) -> Origins:
    """Fill a decoder with the weights of a 2D UNet; what is new or of another width stays as it is. As `from_2d`."""
    ours = decoder.unet.state_dict()
    new = tuple(name for name in ours if ".temporal." in name)
    wanted = [name for name in ours if ".temporal." not in name]
    _refuse("lacks", [name for name in wanted if name not in weights])
    _refuse("has what the decoder does not:", [name for name in weights if name not in wanted])
    differ = [name for name in wanted if weights[name].shape != ours[name].shape]
    reads_embeddings = [name for name in differ if name.endswith((".attn2.to_k.weight", ".attn2.to_v.weight"))]
    other_width = [name for name in reads_embeddings if weights[name].shape[:-1] == ours[name].shape[:-1]]
    _refuse(
        "does not fit:",
        [f"{n} {list(weights[n].shape)}, not {list(ours[n].shape)}" for n in differ if n not in other_width],
    )
    taken = tuple(name for name in wanted if name not in differ)
    decoder.unet.load_state_dict({name: weights[name] for name in taken}, strict=False)
    return Origins(taken, tuple(other_width), new)


def _refuse(problem: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        raise ConversionError(f"2D UNet {problem} {', '.join(names[:5])}{more}; compare its config with the decoder's")
