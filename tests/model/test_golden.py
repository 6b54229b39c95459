"""The model equals the authors' own inference code (tests/golden): encoder, fusion, logits, regressed embeddings."""

import pytest
import torch
import vectors
from torch import Tensor

from emu2_megatron.config.schema import Config, TrainingConfig
from emu2_megatron.data.batch import targets
from emu2_megatron.data.sequence import VISUAL
from emu2_megatron.model import parameters
from emu2_megatron.model.decoder import DecoderStage, MicroBatch, transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.ops.pool import pool
from emu2_megatron.parallel.topology import Topology

# fp32 against fp32 in another order of operations: 1e-7 a rounding, through a few hundred accumulated terms.
TOLERANCE = 1e-5


class Golden:
    """One file of vectors, and the engine's model filled with its weights."""

    def __init__(self, name: str) -> None:
        self.meta, self.tensors = vectors.read(name)
        self.model, source = vectors.model(self.meta), vectors.weights(self.tensors)
        config = Config(model=self.model, training=TrainingConfig(precision="fp32"))
        layers = self.model.decoder.num_layers
        self.encoder = EvaVisionTransformer(self.model.encoder)
        parameters.fill_encoder(self.encoder, self.model, source.__getitem__)
        self.stage = DecoderStage(transformer_config(config, [layers]), self.model, [layers])
        parameters.fill_decoder(self.stage, self.model, source.__getitem__, 0, 0, 1)

    def __getitem__(self, key: str) -> Tensor:
        return self.tensors[key]


@pytest.fixture(params=["base", "chat"])
def golden(request: pytest.FixtureRequest, world_of_one: Topology) -> Golden:
    return Golden(request.param)


def close(got: Tensor, wanted: Tensor) -> None:
    assert got.shape == wanted.shape
    assert (got - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@torch.no_grad()
def test_encoder(golden: Golden) -> None:
    close(golden.encoder.hidden(golden["in.pixels"]), golden["out.encoder_hidden"])
    images, frames = golden.model.image_queries, golden.model.frame_queries
    close(pool(golden.encoder.hidden(golden["in.pixels"]), images), golden["out.features"])
    # Pictures and frames in one call, each with its own number of embeddings.
    rows = golden.encoder(torch.cat([golden["in.frames"], golden["in.pixels"]]), [frames] * 2 + [images] * 3)
    close(rows[: 2 * frames], golden["out.frame_features"].flatten(0, 1))
    close(rows[2 * frames :], golden["out.features"].flatten(0, 1))


@torch.no_grad()
@pytest.mark.parametrize("sequence", [0, 1, 2])
def test_decoder(golden: Golden, sequence: int) -> None:
    tokens_BS = golden[f"in.tokens.{sequence}"].view(1, -1).long()
    visual = tokens_BS == golden.meta["special_tokens"]["<image>"]
    pictures = {0: [0], 1: [1, 2], 2: []}[sequence]
    features_RE = golden["out.features"][pictures].flatten(0, 1)
    assert visual.sum() == len(features_RE)
    batch = MicroBatch(tokens_BS, targets(tokens_BS, visual.byte() * VISUAL), features_RE)
    hidden_SBD = golden.stage(batch)
    close(hidden_SBD[:, 0], golden[f"out.hidden.{sequence}"].squeeze(0))
    close(golden.stage.logits(hidden_SBD)[:, 0], golden[f"out.logits.{sequence}"].squeeze(0))
    close(golden.stage.project_down(hidden_SBD)[:, 0], golden[f"out.regressed.{sequence}"].squeeze(0))
