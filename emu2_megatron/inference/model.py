"""The model of one rank for inference: no gradients, no optimizer, any tensor- and pipeline-parallel layout.

All ranks call the same methods together. Hidden states go from stage to stage by send and receive; what the last stage
decides is broadcast to the others. The encoder is on the first stage, whose tensor-parallel ranks all run it.

Shapes: B sequences, S positions, D decoder width, E encoder width, R visual rows, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from torch import Tensor

from emu2_megatron.config import validate
from emu2_megatron.config.schema import Config, Fp8Config
from emu2_megatron.data.decode import normalize
from emu2_megatron.errors import ConfigError
from emu2_megatron.model import parameters
from emu2_megatron.model.decoder import DecoderStage, transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.model.kv_cache import KVCache
from emu2_megatron.ops.interleave import visual_slots
from emu2_megatron.parallel import layout, topology, wrap
from emu2_megatron.parallel.topology import Topology
from emu2_megatron.platform.device import device, to_device
from emu2_megatron.platform.precision import DTYPES


@dataclass(frozen=True)
class Prompt:
    """One prompt as tokens and pictures."""

    tokens: list[int]
    """From `<s>` on."""
    visual: list[bool]
    """Which of them are places of visual embeddings."""
    pictures: list[Tensor]
    """In the order of their places: uint8 [3, H, W], or normalised and of floating point."""
    queries: list[int]
    """Visual embeddings of each."""


def for_inference(config: Config, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1) -> Config:
    """A run's configuration in the layout wanted, without what only training has.

    Raises:
        ConfigError: the model cannot be cut like that.
    """
    parallel = type(config.parallel)(
        tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size
    )
    training = replace(config.training, global_batch_size=1, micro_batch_size=1, recompute="none", recompute_layers=0)
    config = replace(config, parallel=parallel, training=training, fp8=Fp8Config())
    legal = validate.tensor_parallel_sizes(config)
    if tensor_parallel_size not in legal:
        raise ConfigError(
            f"tensor_parallel_size: {tensor_parallel_size}; legal for this model: {', '.join(map(str, legal))}"
        )
    if not 1 <= pipeline_parallel_size <= config.model.decoder.num_layers:
        raise ConfigError(
            f"pipeline_parallel_size: {pipeline_parallel_size}; legal: 1 to {config.model.decoder.num_layers} layers"
        )
    return config


class InferenceModel:
    """Built by all ranks together, after `topology.initialize(config)`."""

    def __init__(self, config: Config, here: Topology, source: parameters.Source) -> None:
        """Fill this rank's share of the model.

        Args:
            config: of `for_inference`.
            here: this rank's place.
            source: where weights come from.
        """
        self.config, self.here = config, here
        layers = layout.part_layers(config)
        self.stage = DecoderStage(transformer_config(config, layers), config.model, layers, here.pp_rank).to(device())
        parameters.fill_decoder(
            self.stage, config.model, source, layout.first_layer(layers, here.pp_rank), here.tp_rank, here.tp_size
        )
        self.stage.requires_grad_(False).eval()
        self.encoder: EvaVisionTransformer | None = None
        if here.first_stage:
            self.encoder = wrap.build_encoder(config, source).requires_grad_(False).eval()

    def begin(self, prompts: Sequence[Prompt], new_tokens: int) -> tuple[KVCache, Tensor]:
        """Read a batch of prompts, padded on the left.

        Args:
            prompts: at least one.
            new_tokens: how many positions will be read after them, at most.

        Returns:
            The cache, and the hidden states [B, D] of the last position, which mean something on the last stage only.
        """
        B, S = len(prompts), max(len(prompt.tokens) for prompt in prompts)
        tokens_BS = torch.zeros(B, S, dtype=torch.long)  # padding may be any token
        real_BS, visual_BS = torch.zeros(2, B, S, dtype=torch.bool)
        for b, prompt in enumerate(prompts):
            start = S - len(prompt.tokens)
            tokens_BS[b, start:] = torch.tensor(prompt.tokens)
            visual_BS[b, start:] = torch.tensor(prompt.visual)
            real_BS[b, start:] = True
        cache = self.stage.cache(to_device(real_BS), S + new_tokens)
        hidden_SBD = None
        if self.encoder is not None:
            b_R, s_R = visual_BS.nonzero(as_tuple=True)
            slots_SB = visual_slots(s_R * B + b_R, S, B)
            rows_RE = self.encode([p for prompt in prompts for p in prompt.pictures],
                                  [q for prompt in prompts for q in prompt.queries])  # fmt: skip
            hidden_SBD = self.stage.embed(to_device(tokens_BS), rows_RE, to_device(slots_SB))
        return cache, self._read(hidden_SBD, (S, B), cache)

    def read_tokens(self, tokens_B: Tensor, cache: KVCache) -> Tensor:
        """One more token of each sequence; result as of `begin`."""
        hidden_SBD = self.stage.embedding(tokens_B[:, None], None) if self.here.first_stage else None
        return self._read(hidden_SBD, (1, len(tokens_B)), cache)

    def read_embeddings(self, rows_BE: Tensor, cache: KVCache) -> Tensor:
        """One more visual embedding of each sequence; result as of `begin`."""
        hidden_SBD = self.stage.project_up(rows_BE)[None] if self.here.first_stage else None
        return self._read(hidden_SBD, (1, len(rows_BE)), cache)

    def logits(self, hidden_BD: Tensor) -> Tensor:
        """fp32 [B, V] of the next token, alike on all ranks of the last stage, who alone may ask."""
        logits_BV: Tensor = self.stage.whole_logits(hidden_BD[None])[0].float()
        return logits_BV

    def regress(self, hidden_BD: Tensor) -> Tensor:
        """The next visual embeddings [B, E], on all ranks."""
        rows_BE = hidden_BD.new_empty(len(hidden_BD), self.config.model.encoder.hidden_size)
        return self.from_last_stage(self.stage.project_down(hidden_BD) if self.here.last_stage else rows_BE)

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """The last stage's tensor, on all stages; the others give one of its shape and dtype, which is overwritten."""
        if self.here.pp_size > 1:
            tensor = tensor.contiguous()
            stages = topology.pipeline()
            dist.broadcast(tensor, stages.last, group=stages.group)
        return tensor

    def encode(self, pictures: Sequence[Tensor], queries: Sequence[int]) -> Tensor:
        """Visual embeddings [R, E] of pictures; on the first stage."""
        assert self.encoder is not None
        dtype = DTYPES[self.config.training.precision]
        chunk = self.config.training.encoder_micro_batch_size
        rows = [torch.empty(0, self.config.model.encoder.hidden_size, dtype=dtype, device=device())]
        for start in range(0, len(pictures), chunk):
            part = slice(start, start + chunk)
            pixels = [to_device(p) if p.is_floating_point() else normalize(to_device(p)[None], dtype)[0]
                      for p in pictures[part]]  # fmt: skip
            rows.append(self.encoder(torch.stack(pixels).to(dtype), queries[part]))
        return torch.cat(rows)

    def _read(self, hidden_SBD: Tensor | None, shape: tuple[int, int], cache: KVCache) -> Tensor:
        S, B = shape
        cache.advance(S)
        stages = topology.pipeline()
        if not self.here.first_stage:
            width, dtype = self.config.model.decoder.hidden_size, DTYPES[self.config.training.precision]
            received = torch.empty(S, B, width, dtype=dtype, device=device())
            dist.recv(received, stages.previous, group=stages.group)
            self.stage.set_input_tensor(received)
        hidden_SBD = self.stage.read(hidden_SBD, cache)
        if not self.here.last_stage:
            dist.send(hidden_SBD.contiguous(), stages.next, group=stages.group)
        return hidden_SBD[-1]


def build(config: Config, source: parameters.Source) -> InferenceModel:
    """Join the process group of the environment, or be a world of one, and build this rank's model there.

    `topology.stop` ends it.
    """
    topology.start()
    return InferenceModel(config, topology.initialize(config), source)
