"""One part of the pipeline of Emu2's decoder: LLaMA from megatron-core parts, and projections of visual embeddings.

The first stage embeds tokens and merges `project_up(v)` into them; the last one computes both losses. Positions,
targets and visual embeddings of a micro-batch come in a `MicroBatch`, built by `parallel/three_phase.py`.

Shapes: S sequence, B micro-batch, D decoder width, E encoder width, V vocabulary, R visual rows of the micro-batch,
T regressed rows of it.
"""

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.embeddings.language_model_embedding import LanguageModelEmbedding
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import TransformerBlock
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn
from torch.nn import functional as F

from emu2_megatron.config.schema import Config, Fp8Config, ModelConfig
from emu2_megatron.data.batch import Targets
from emu2_megatron.model import fp8
from emu2_megatron.model.kv_cache import KVCache
from emu2_megatron.model.layer_specs import block_submodules
from emu2_megatron.model.parameters import mark_tensor_parallel
from emu2_megatron.ops.interleave import interleave
from emu2_megatron.ops.regression_loss import regression_loss
from emu2_megatron.platform.device import IS_CUDA
from emu2_megatron.platform.precision import DTYPES


@dataclass
class MicroBatch:
    """What one forward pass of a stage needs to know, on its device."""

    tokens_BS: Tensor
    """int64 [B, S] token ids at the positions this rank holds."""
    targets: Targets
    """Who predicts what."""
    features_RE: Tensor
    """[R, E] visual embeddings in (b, s) order of their tokens; empty on parts between the first and the last."""
    cu_seqlens: Tensor | None = None
    """Which tokens are one sample (`data/batch.cu_seqlens`): attention stays within it. None: within each sequence."""


RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "attention": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    "block": {"recompute_granularity": "full", "recompute_method": "block"},
}
"""training.recompute to megatron-core's settings; block's recompute_num_layers is training.recompute_layers."""


def transformer_config(config: Config, part_layers: list[int]) -> TransformerConfig:
    """megatron-core's view of the decoder.

    Args:
        config: the run's configuration, validated.
        part_layers: decoder layers of every part of the pipeline, in the order data flows.
    """
    decoder, parallel = config.model.decoder, config.parallel
    dtype = DTYPES[config.training.precision]
    recompute = dict(RECOMPUTE[config.training.recompute])
    if recompute.get("recompute_method") == "block":
        recompute["recompute_num_layers"] = config.training.recompute_layers
    stages: list[list[str]] = [["decoder"] * layers for layers in part_layers]
    stages[0].insert(0, "embedding")
    stages[-1].append("loss")
    return TransformerConfig(
        num_layers=decoder.num_layers,
        hidden_size=decoder.hidden_size,
        ffn_hidden_size=decoder.ffn_hidden_size,
        num_attention_heads=decoder.num_attention_heads,
        layernorm_epsilon=decoder.layernorm_epsilon,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        tensor_model_parallel_size=parallel.tensor_parallel_size,
        pipeline_model_parallel_size=parallel.pipeline_parallel_size,
        context_parallel_size=parallel.context_parallel_size,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_model_parallel_layout=stages if len(stages) > 1 else None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        # Losses arrive divided by global counts (three_phase): gradients are plain sums over micro-batches and ranks.
        calculate_per_token_loss=True,
        # model/parameters.py initialises by name, so that every layout starts from the same weights.
        perform_initialization=False,
        use_cpu_initialization=not IS_CUDA,
        # Fusions that need CUDA kernels.
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=IS_CUDA,
        bias_dropout_fusion=IS_CUDA,
        bias_activation_fusion=IS_CUDA,
        use_te_activation_func=not IS_CUDA,  # the layer spec's, Transformer Engine's or not: ours
        apply_rope_fusion=False,
        batch_p2p_comm=IS_CUDA,
        **recompute,
        **fp8.decoder_settings(config),
    )


def padded_vocab_size(model: ModelConfig, tensor_parallel_size: int) -> int:
    """Rows of the embedding and output layer over all tensor-parallel ranks."""
    multiple = model.decoder.make_vocab_size_divisible_by * tensor_parallel_size
    return -(-model.decoder.vocab_size // multiple) * multiple


class DecoderStage(MegatronModule):
    """The layers of one part of the pipeline, with the embedding on the first and the losses on the last."""

    share_embeddings_and_output_weights = False  # read by megatron-core's gradient finalisation

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        part_layers: list[int],
        part: int = 0,
        fp8_config: Fp8Config | None = None,
        attend_across_samples: bool = False,
    ) -> None:
        """Part `part` of the pipeline; see `parallel/layout.py` for parts, virtual ones included.

        With `attend_across_samples` no micro-batch has `cu_seqlens`.
        """
        super().__init__(config=config)
        fp8_config = fp8_config or Fp8Config()
        pre_process, post_process = part == 0, part == len(part_layers) - 1
        # megatron-core's name for the number of a part among those of its rank, if there are several.
        virtual = config.virtual_pipeline_model_parallel_size
        self.vp_stage = part // config.pipeline_model_parallel_size if virtual else None
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process = pre_process, post_process
        self.vocab_size = model.decoder.vocab_size
        width, encoder_width = config.hidden_size, model.encoder.hidden_size
        padded = padded_vocab_size(model, config.tensor_model_parallel_size)
        kwargs = {"bias": False, "dtype": config.params_dtype}
        if pre_process:
            self.embedding = LanguageModelEmbedding(
                config, padded, model.decoder.max_position_embeddings, position_embedding_type="rope"
            )
            self.project_up = nn.Linear(encoder_width, width, **kwargs)
        self.rotary = RotaryEmbedding(
            kv_channels=config.kv_channels,
            rotary_percent=1.0,
            rotary_base=model.decoder.rotary_base,
            use_cpu_initialization=config.use_cpu_initialization,
        )
        self.decoder = TransformerBlock(
            config,
            block_submodules(part_layers[part], fp8_config.emulate, attend_across_samples),
            pre_process=pre_process,
            post_process=post_process,
            vp_stage=self.vp_stage,
        )
        self.delayed_scaling = fp8.emulate_decoder(self.decoder.layers, model.decoder.num_layers, fp8_config)
        if post_process:
            self.output_layer = ColumnParallelLinear(
                width, padded, config=config, init_method=lambda weight: weight, bias=False, gather_output=False
            )
            self.project_down = nn.Linear(width, encoder_width, **kwargs)
        for name, weight in self.named_parameters():
            if name.startswith("project_"):
                # Each rank projects the rows it holds: megatron-core sums marked gradients over tensor-parallel ranks.
                weight.sequence_parallel = config.sequence_parallel
        mark_tensor_parallel(self)

    def set_input_tensor(self, input_tensor: list[Tensor | None] | Tensor | None) -> None:
        """Take the previous stage's output; called by megatron-core's schedules."""
        tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor
        self.decoder.set_input_tensor(tensor)

    def forward(self, batch: MicroBatch) -> Tensor:
        """One micro-batch through this stage.

        Returns:
            [S, B, D] hidden states; on the last stage those after the final norm, which both heads read.
        """
        hidden_SBD = None
        if self.pre_process:
            rows_RE = batch.features_RE[batch.targets.visual_rows_R]
            hidden_SBD = self.embed(batch.tokens_BS, rows_RE, batch.targets.visual_slots_SB)
        length = batch.tokens_BS.shape[1] * self.config.context_parallel_size
        scaling: Any = nullcontext()
        if self.delayed_scaling:
            scaling = self.delayed_scaling.micro_batch(self.decoder.input_tensor if hidden_SBD is None else hidden_SBD)
        with scaling:
            # Positions count through a sequence, whatever samples are in it: rotary embeddings make attention depend on
            # distances alone. cu_seqlens takes the place of a mask: that is what megatron-core hands from layer to
            # layer and, for recomputation, keeps with its micro-batch.
            hidden: Tensor = self.decoder(
                hidden_states=hidden_SBD, attention_mask=batch.cu_seqlens, rotary_pos_emb=self.rotary(length)
            )
        return hidden

    def embed(self, tokens_BS: Tensor, rows_RE: Tensor, slots_SB: Tensor) -> Tensor:
        """What the first stage's layers read, [S, B, D].

        Args:
            tokens_BS: int64 [B, S].
            rows_RE: [R, E] visual embeddings. None is fine, and a product all the same: every parameter takes part in
                every backward pass, if only with zeros.
            slots_SB: int32 [S, B] where they go (`ops/interleave.py`).
        """
        return interleave(self.embedding(tokens_BS, None), self.project_up(rows_RE), slots_SB)

    def cache(self, real_BS: Tensor, room: int) -> KVCache:
        """An empty cache for `read`; arguments as of `KVCache`."""
        return KVCache(real_BS, room, self.rotary(room)[:, 0, 0].to(real_BS.device), self.config.params_dtype)

    def read(self, hidden_SBD: Tensor | None, cache: KVCache) -> Tensor:
        """Inference: the next positions of a batch through this stage, beside what the cache remembers.

        megatron-core's layers, without what training needs around them: for a single position, that would take as long
        as the products.

        Args:
            hidden_SBD: [S, B, D] from `embed`; None on a stage that was given its input by `set_input_tensor`.
            cache: of this stage, made place in (`KVCache.advance`).

        Returns:
            As `forward`.
        """
        hidden = self.decoder.input_tensor if hidden_SBD is None else hidden_SBD
        for layer in self.decoder.layers:
            attention, mlp = layer.self_attention, layer.mlp
            # q, k and v of a head are beside each other (model/parameters.QKV).
            fused = _product(attention.linear_qkv, layer.input_layernorm(hidden))
            q, k, v = fused.unflatten(-1, (-1, 3, self.config.kv_channels)).unbind(3)
            attended = cache.attend(layer.layer_number, q, k, v)
            hidden = hidden + _product(attention.linear_proj, attended)
            normed = layer.pre_mlp_layernorm(hidden)
            if isinstance(mlp.linear_fc1, ColumnParallelLinear):
                gate, up = _product(mlp.linear_fc1, normed).chunk(2, -1)
                hidden = hidden + _product(mlp.linear_fc2, F.silu(gate) * up)
            else:
                hidden = hidden + mlp(normed)[0]
        return hidden if self.decoder.final_layernorm is None else self.decoder.final_layernorm(hidden)

    def logits(self, hidden_SBD: Tensor) -> Tensor:
        """[S, B, V / TP] this rank's part of the vocabulary; padding rows get probability 0."""
        logits_SBV: Tensor = self.output_layer(hidden_SBD)[0]
        rows = logits_SBV.shape[-1]
        real = self.vocab_size - rows * self.output_layer.tp_group.rank()
        if real < rows:
            padding_V = torch.arange(rows, device=logits_SBV.device) >= real
            logits_SBV = logits_SBV.masked_fill(padding_V, float("-inf"))
        return logits_SBV

    def whole_logits(self, hidden_SBD: Tensor) -> Tensor:
        """[S, B, V] of the whole vocabulary, without padding, alike on all tensor-parallel ranks; not for training."""
        logits_SBV = self.logits(hidden_SBD)
        if self.config.tensor_model_parallel_size > 1:
            logits_SBV = tensor_parallel.gather_from_tensor_model_parallel_region(logits_SBV)
        return logits_SBV[..., : self.vocab_size]

    def losses(
        self, hidden_SBD: Tensor, batch: MicroBatch, denominators: Tensor, image_gradient_scale: Tensor
    ) -> Tensor:
        """This micro-batch's part of both losses.

        Of the positions this rank holds: text over its context-parallel share (alike on all tensor-parallel ranks),
        embeddings over the hidden states it has.

        Args:
            hidden_SBD: [S, B, D] what `forward` of the last part returned.
            batch: the micro-batch it was given.
            denominators: fp32 [2] text targets and regressed elements of the global batch, at least 1.
            image_gradient_scale: what the image loss will be multiplied by (`ops/regression_loss.py`), not 0.

        Returns:
            fp32 [2]: cross-entropy summed over text targets, and squared error over regressed embeddings, each over its
            denominator.
        """
        per_token_SB = tensor_parallel.vocab_parallel_cross_entropy(
            self.logits(hidden_SBD).float(), batch.targets.text_labels_SB
        )
        text_sum = (per_token_SB * batch.targets.text_mask_SB).sum()
        predictors_TD = hidden_SBD.flatten(0, 1)[batch.targets.predictor_positions_T]
        image_loss = regression_loss(
            self.project_down(predictors_TD),
            batch.features_RE,
            batch.targets.predicted_rows_T,
            denominators[1],
            image_gradient_scale,
        )
        # An embedding that overflowed may stand where no loss depends on it. It must show all the same.
        image_loss = image_loss + 0 * batch.features_RE.detach().float().sum()
        return torch.stack([text_sum / denominators[0], image_loss])


def _product(layer: Any, x_SBD: Tensor) -> Tensor:
    """Of one of the linear layers, without sequence parallelism: megatron-core's own, or Transformer Engine's."""
    if not isinstance(layer, ColumnParallelLinear | RowParallelLinear):
        return layer(x_SBD)[0]  # type: ignore[no-any-return]
    out = F.linear(x_SBD, layer.weight)
    if isinstance(layer, RowParallelLinear) and layer.config.tensor_model_parallel_size > 1:
        return tensor_parallel.reduce_from_tensor_model_parallel_region(out)  # type: ignore[no-any-return]
    return out
