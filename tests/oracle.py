"""Emu2 as plain functions over a dict of tensors: the specification in code, which the tests trust.

Nothing here comes from the package under test, so that both cannot share a mistake. It is written for reading, in
plain differentiable PyTorch, without dropout, and computes in whatever dtype it is given (float64 for references).

References:
    Emu2: "Generative Multimodal Models are In-Context Learners", arXiv 2312.13286
    the visual encoder, EVA-02-CLIP-E/14-plus: "EVA-CLIP", arXiv 2303.15389
    the decoder: "LLaMA", arXiv 2302.13971, with rotary embeddings in the rotate-half form of its Hugging Face port
    the optimizer: "Decoupled Weight Decay Regularization", arXiv 1711.05101

``weights`` maps the native released names (``visual.*``, ``decoder.lm.*``, ``project_up.weight``,
``project_down.weight``) to tensors. The number of layers, and every width, is read off them.

A suffix names the axes of a tensor:
    I images      H W pixel rows, columns      P encoder tokens (CLS, then patches)      E encoder width
    Q visual embeddings an image               R visual embeddings in a batch, B and S flattened in that order
    B sequences   S positions                  D decoder width                           V vocabulary
    A heads       K width of a head            T the positions attended to (P or S)      F hidden width of an MLP
"""

import math
from dataclasses import dataclass

import torch

# What one position of a sequence is: bits, which may be set together.
VISUAL = 1  # its input row is project_up(a visual embedding), not the embedding of its token
TEXT_TARGET = 2  # its token is predicted by the position before it
VISUAL_TARGET = 4  # its visual embedding is predicted by the position before it
START = 32  # a sample begins here, and no sample sees another of its sequence; a sequence without is one sample


@dataclass(frozen=True)
class Sizes:
    """What the shapes of the weights do not say. The defaults are those of the released model."""

    encoder_heads: int = 16
    decoder_heads: int = 52
    patch_size: int = 14
    encoder_eps: float = 1e-6
    decoder_eps: float = 1e-6
    rope_theta: float = 10000.0


def encode(weights, sizes, pixels_I3HW):
    """The visual encoder (EVA-CLIP's image tower): normalised pixels [I, 3, H, W] -> [I, P, E], P = 1 + patches.

    The first of the P tokens is CLS, then the patches row by row. There is no norm after the last block: the released
    encoder returns the raw residual stream.
    """
    patches_IP = _patches(pixels_I3HW, sizes.patch_size)
    kernel = weights["visual.patch_embed.proj.weight"].flatten(1)  # [E, 3 * patch * patch]
    patches_IPE = patches_IP @ kernel.T + weights["visual.patch_embed.proj.bias"]

    cls_IPE = weights["visual.cls_token"].expand(patches_IPE.shape[0], -1, -1)
    pos_embed = weights["visual.pos_embed"]
    hidden_IPE = torch.cat([cls_IPE, patches_IPE], dim=1)
    if pos_embed.shape != (1, *hidden_IPE.shape[1:]):
        raise ValueError(f"pos_embed has shape {tuple(pos_embed.shape)}, the images need {tuple(hidden_IPE.shape[1:])}")
    hidden_IPE = hidden_IPE + pos_embed

    for i in range(_count_layers(weights, "visual.blocks.")):
        block = _under(weights, f"visual.blocks.{i}.")
        # Post-norm inside the branch: the norm acts on what a branch adds, not on what it reads.
        hidden_IPE = hidden_IPE + _layer_norm(_encoder_attention(block, sizes, hidden_IPE), block, "norm1", sizes)
        hidden_IPE = hidden_IPE + _layer_norm(_encoder_mlp(block, hidden_IPE), block, "norm2", sizes)
    return hidden_IPE


def pool(hidden_IPE, queries):
    """Encoder output [I, P, E] -> visual embeddings [I, Q, E], row by row, Q = queries.

    CLS is dropped and the square grid of patches is averaged over square windows that do not overlap (Emu2's
    encode_image). Nothing is normalised afterwards.
    """
    images, tokens, width = hidden_IPE.shape
    grid, side = math.isqrt(tokens - 1), math.isqrt(queries)
    if grid * grid != tokens - 1 or side * side != queries or side == 0 or grid % side != 0:
        raise ValueError(f"{tokens - 1} patches cannot be pooled into {queries} squares")
    window = grid // side
    windows = hidden_IPE[:, 1:].reshape(images, side, window, side, window, width)
    return windows.mean(dim=(2, 4)).reshape(images, queries, width)


def decode(weights, sizes, tokens_BS, visual_mask_BS, features_RE, starts_BS=None):
    """The decoder (LLaMA): tokens [B, S] -> (hidden [B, S, D] after the final norm, logits [B, S, V]).

    Where the boolean mask [B, S] is set, the embedding of the token is replaced by a row of project_up(features),
    features [R, E], R = number of set positions, in row-major (b, s) order. Attention is causal for visual rows too,
    and positions are 0..S-1 in every sequence. Where the boolean starts [B, S] are set, a sample begins: what follows
    sees nothing before it. None are none: each sequence is one sample.
    """
    mask_BS = visual_mask_BS.bool()
    if features_RE.shape[0] != int(mask_BS.sum()):
        raise ValueError(f"{features_RE.shape[0]} features for {int(mask_BS.sum())} visual positions")
    hidden_BSD = weights["decoder.lm.model.embed_tokens.weight"][tokens_BS]
    # Indexing by a boolean mask visits the set positions in row-major order.
    hidden_BSD = hidden_BSD.index_put((mask_BS,), features_RE @ weights["project_up.weight"].T)
    if starts_BS is None:
        starts_BS = torch.zeros_like(mask_BS)
    sample_BS = starts_BS.cumsum(dim=1)
    same_B1SS = (sample_BS[:, :, None] == sample_BS[:, None, :])[:, None]

    for i in range(_count_layers(weights, "decoder.lm.model.layers.")):
        layer = _under(weights, f"decoder.lm.model.layers.{i}.")
        normed_BSD = _rms_norm(hidden_BSD, layer["input_layernorm.weight"], sizes.decoder_eps)
        hidden_BSD = hidden_BSD + _decoder_attention(layer, sizes, normed_BSD, same_B1SS)
        normed_BSD = _rms_norm(hidden_BSD, layer["post_attention_layernorm.weight"], sizes.decoder_eps)
        hidden_BSD = hidden_BSD + _decoder_mlp(layer, normed_BSD)

    hidden_BSD = _rms_norm(hidden_BSD, weights["decoder.lm.model.norm.weight"], sizes.decoder_eps)
    return hidden_BSD, hidden_BSD @ weights["decoder.lm.lm_head.weight"].T


def losses(weights, sizes, tokens_BS, roles_BS, features_RE, text_count=None, visual_count=None):
    """The two training losses of tokens [B, S] with roles [B, S] (bit flags) and features [R, E] at the VISUAL rows.

    text: mean over all TEXT_TARGET positions of the cross-entropy of their token.
    image: mean over all (VISUAL_TARGET positions, E) of (project_down(hidden) - feature)^2, the target detached: the
    encoder learns from what the decoder reads, not by making its output easy to predict.

    Both are predicted by the position before the target, so the hidden state of [IMG] predicts the first embedding of
    an image (that is how Emu2 generates one). The hidden state is the one after the final norm.

    Returned: ``text`` and ``image``; the sums over this batch, ``text_sum`` and ``square_sum``; and the numbers of
    target positions in this batch, ``text_count`` and ``visual_count`` (positions, not positions * E). The arguments
    of these names replace this batch's counts in the two means, and only there; with the counts of a larger batch, the
    losses of its parts add up to its loss. A count of zero gives a loss of zero.
    """
    visual_BS = (roles_BS & VISUAL) != 0
    text_target_BS = (roles_BS & TEXT_TARGET) != 0
    visual_target_BS = (roles_BS & VISUAL_TARGET) != 0
    starts_BS = (roles_BS & START) != 0
    targets_BS = text_target_BS | visual_target_BS
    if bool(targets_BS[:, 0].any()) or bool(targets_BS[starts_BS].any()):
        raise ValueError("the first position of a sequence or sample cannot be a target: nothing precedes it")
    if bool((visual_target_BS & ~visual_BS).any()):
        raise ValueError("a visual target must be a visual row: its target is the feature it takes")

    hidden_BSD, logits_BSV = decode(weights, sizes, tokens_BS, visual_BS, features_RE, starts_BS)

    predictors_BS = text_target_BS.roll(-1, dims=1)  # column 0 is never set, so nothing wraps around
    logits_NV = logits_BSV[predictors_BS]
    targets_N = tokens_BS[text_target_BS]
    chosen_N = logits_NV.gather(1, targets_N[:, None]).squeeze(1)
    text_sum = (logits_NV.logsumexp(dim=1) - chosen_N).sum()

    predictors_BS = visual_target_BS.roll(-1, dims=1)
    predicted_NE = hidden_BSD[predictors_BS] @ weights["project_down.weight"].T
    targets_NE = features_RE[visual_target_BS[visual_BS]].detach()
    square_sum = (predicted_NE - targets_NE).square().sum()

    own_text_count, own_visual_count = int(text_target_BS.sum()), int(visual_target_BS.sum())
    text_count = own_text_count if text_count is None else text_count
    visual_count = own_visual_count if visual_count is None else visual_count
    return {
        "text": _divide(text_sum, text_count),
        "image": _divide(square_sum, visual_count * features_RE.shape[1]),
        "text_sum": text_sum,
        "square_sum": square_sum,
        "text_count": own_text_count,
        "visual_count": own_visual_count,
    }


@torch.no_grad()
def adamw_step(params, grads, state, step, lr, betas, eps, weight_decay, clip):
    """One step of AdamW on dicts of tensors by name, ``params`` and ``state`` in place. Returns the gradient norm.

    params, grads: tensors of equal shape; a parameter whose gradient is absent or None stays as it is.
    state: the two moments by name; start with {}.       step: number of this step, from 1.
    lr: learning rate by name.                           betas, eps: of Adam (torch.optim.AdamW's formula).
    weight_decay: decoupled, and only on tensors of more than one dimension, hence on no bias and no norm.
    clip: largest global norm; None or 0 does not clip. Megatron's rule: all gradients times clip / (norm + 1e-6) where
    that is below 1. The norm returned is that before clipping. ``grads`` are not changed.
    """
    grads = {name: grads[name].to(params[name].dtype) for name in params if grads.get(name) is not None}
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    coefficient = min(1.0, clip / (norm + 1e-6)) if clip is not None and clip > 0 else 1.0

    beta1, beta2 = betas
    for name, grad in grads.items():
        param, grad = params[name], grad * coefficient
        if name not in state:
            state[name] = {"mean": torch.zeros_like(param), "square": torch.zeros_like(param)}
        mean, square = state[name]["mean"], state[name]["square"]
        mean.copy_(beta1 * mean + (1 - beta1) * grad)
        square.copy_(beta2 * square + (1 - beta2) * grad.square())
        # Both moments start at zero, which biases the early ones towards it.
        unbiased_mean = mean / (1 - beta1**step)
        unbiased_square = square / (1 - beta2**step)
        decay = weight_decay if param.dim() > 1 else 0.0
        param.copy_(param * (1 - lr[name] * decay) - lr[name] * unbiased_mean / (unbiased_square.sqrt() + eps))
    return norm


# ----------------------------------------------------------------------------------------------------------------------
# The visual encoder


def _patches(pixels_I3HW, patch):
    """[I, 3, H, W] -> [I, patches, 3 * patch * patch]: patches row by row, each flattened as (channel, row, column).

    The convolution of EVA-CLIP has stride = kernel, so it is one matrix product over these.
    """
    images, channels, height, width = pixels_I3HW.shape
    if height % patch or width % patch:
        raise ValueError(f"an image of {height} x {width} is not made of whole patches of {patch}")
    tiles = pixels_I3HW.reshape(images, channels, height // patch, patch, width // patch, patch)
    return tiles.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2)


def _encoder_attention(block, sizes, hidden_IPE):
    """Bidirectional attention [I, P, E] -> [I, P, E]. The rows of qkv.weight are q, then k, then v; k has no bias."""
    q, k, v = (hidden_IPE @ block["attn.qkv.weight"].T).chunk(3, dim=-1)
    q = q + block["attn.q_bias"]
    v = v + block["attn.v_bias"]
    heads = sizes.encoder_heads
    mixed_IAPK = _attention(_split(q, heads), _split(k, heads), _split(v, heads), mask_TT=None)
    return _join(mixed_IAPK) @ block["attn.proj.weight"].T + block["attn.proj.bias"]


def _encoder_mlp(block, hidden_IPE):
    """fc2(GELU(fc1(x))), [I, P, E] -> [I, P, E], with the exact GELU, x * Phi(x), and not its tanh approximation."""
    hidden_IPF = hidden_IPE @ block["mlp.fc1.weight"].T + block["mlp.fc1.bias"]
    hidden_IPF = hidden_IPF * 0.5 * (1 + torch.erf(hidden_IPF / math.sqrt(2)))
    return hidden_IPF @ block["mlp.fc2.weight"].T + block["mlp.fc2.bias"]


def _layer_norm(hidden_IPE, block, name, sizes):
    """LayerNorm over the last axis, with the biased variance."""
    centred = hidden_IPE - hidden_IPE.mean(dim=-1, keepdim=True)
    variance = centred.square().mean(dim=-1, keepdim=True)
    return centred / (variance + sizes.encoder_eps).sqrt() * block[f"{name}.weight"] + block[f"{name}.bias"]


# ----------------------------------------------------------------------------------------------------------------------
# The decoder


def _decoder_attention(layer, sizes, hidden_BSD, same_B1SS):
    """Causal attention within samples, with rotary embeddings, [B, S, D] -> [B, S, D], without biases."""
    q, k, v = (
        _split(hidden_BSD @ layer[f"self_attn.{name}_proj.weight"].T, sizes.decoder_heads) for name in ("q", "k", "v")
    )
    positions = hidden_BSD.shape[1]
    causal_SS = torch.ones(positions, positions, dtype=torch.bool, device=hidden_BSD.device).tril()
    mixed_BASK = _attention(
        _rotate(q, sizes.rope_theta), _rotate(k, sizes.rope_theta), v, mask_TT=causal_SS & same_B1SS
    )
    return _join(mixed_BASK) @ layer["self_attn.o_proj.weight"].T


def _decoder_mlp(layer, hidden_BSD):
    """SwiGLU, [B, S, D] -> [B, S, D]: down(silu(gate(x)) * up(x))."""
    gate_BSF = hidden_BSD @ layer["mlp.gate_proj.weight"].T
    up_BSF = hidden_BSD @ layer["mlp.up_proj.weight"].T
    return (gate_BSF * torch.sigmoid(gate_BSF) * up_BSF) @ layer["mlp.down_proj.weight"].T


def _rms_norm(hidden_BSD, weight_D, eps):
    """Divided by the root of the mean square over the last axis, times a weight."""
    return hidden_BSD / (hidden_BSD.square().mean(dim=-1, keepdim=True) + eps).sqrt() * weight_D


def _rotate(x_BASK, theta):
    """Rotary position embedding of [B, A, S, K], in its dtype, positions 0..S-1.

    Component j of the first half of a head and component j of the second are turned together, by the angle
    position * theta^(-2j/K): the rotate-half form, where neighbouring components are not a pair.
    """
    positions, width = x_BASK.shape[-2:]
    pair = torch.arange(width // 2, dtype=x_BASK.dtype, device=x_BASK.device)
    position = torch.arange(positions, dtype=x_BASK.dtype, device=x_BASK.device)
    angle = position[:, None] * theta ** (-2 * pair / width)
    first, second = x_BASK.chunk(2, dim=-1)
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()],
        dim=-1,
    )


# ----------------------------------------------------------------------------------------------------------------------
# Shared


def _attention(q, k, v, mask_TT):
    """softmax(q k^T / sqrt(K)) v, each [.., A, T, K] -> [.., A, T, K]; mask [.., T, T] is true where a row may look."""
    scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
    if mask_TT is not None:
        scores = scores.masked_fill(~mask_TT, float("-inf"))
    return scores.softmax(dim=-1) @ v


def _split(x, heads):
    """[.., T, A * K] -> [.., A, T, K]."""
    return x.unflatten(-1, (heads, -1)).transpose(-2, -3)


def _join(x):
    """[.., A, T, K] -> [.., T, A * K]."""
    return x.transpose(-2, -3).flatten(-2)


def _count_layers(weights, prefix):
    """The number of layers whose tensors are named prefix + number + ..."""
    return len({name[len(prefix) :].split(".")[0] for name in weights if name.startswith(prefix)})


def _under(weights, prefix):
    """The weights whose names start with prefix, under the rest of their names."""
    return {name[len(prefix) :]: tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _divide(total, count):
    """total / count, and zero for a count of zero, still attached to the graph so that backward() works."""
    return total / count if count else total * 0.0
