"""The decoder equals `transformers`' LLaMA, and counts the parameters it should."""

from dataclasses import replace

import harness
import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import Config, TrainingConfig
from emu2_megatron.data.batch import cu_seqlens, targets
from emu2_megatron.data.sequence import PADDING, START, TEXT_TARGET, VISUAL, VISUAL_TARGET
from emu2_megatron.model import parameters
from emu2_megatron.model.decoder import DecoderStage, MicroBatch, padded_vocab_size, transformer_config
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.parallel.topology import Topology

CPU = torch.device("cpu")


def stage_of(config: Config) -> DecoderStage:
    layers = config.model.decoder.num_layers
    return DecoderStage(transformer_config(config, [layers]), config.model, [layers])


@torch.no_grad()
@pytest.mark.parametrize(("preset", "rotary_base"), [("emu2_tiny", 10000.0), ("emu2_tiny", 500.0), ("emu2_small", 1e4)])
def test_equals_transformers(preset: str, rotary_base: float, world_of_one: Topology) -> None:
    decoder = replace(PRESETS[preset].decoder, rotary_base=rotary_base)
    model = replace(PRESETS[preset], decoder=decoder)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=decoder.vocab_size,
            hidden_size=decoder.hidden_size,
            intermediate_size=decoder.ffn_hidden_size,
            num_hidden_layers=decoder.num_layers,
            num_attention_heads=decoder.num_attention_heads,
            rms_norm_eps=decoder.layernorm_epsilon,
            max_position_embeddings=decoder.max_position_embeddings,
            rope_parameters={"rope_type": "default", "rope_theta": decoder.rotary_base},
            tie_word_embeddings=False,
        )
    ).eval()
    weights = {"decoder.lm." + name: tensor for name, tensor in llama.state_dict().items()}
    # The projections are not LLaMA's; without pictures they have no influence.
    shapes = parameters.released_shapes(model)
    weights |= {name: torch.zeros(shapes[name]) for name in ("project_up.weight", "project_down.weight")}
    # Biases towards larger values than initialisation's, so that a wrong norm or rotation is not lost in small numbers.
    for name in weights:
        if "layernorm" in name or name.endswith("norm.weight"):
            weights[name] = weights[name].uniform_(0.5, 1.5)
    stage = stage_of(Config(model=model, training=TrainingConfig(precision="fp32")))
    parameters.fill_decoder(stage, model, weights.__getitem__, 0, 0, 1)

    tokens_BS = torch.randint(0, decoder.vocab_size, (2, 50))
    nothing = targets(tokens_BS, torch.zeros(2, 50, dtype=torch.uint8))
    features_RE = torch.empty(0, model.encoder.hidden_size)
    hidden_SBD = stage(MicroBatch(tokens_BS, nothing, features_RE))
    wanted = llama(tokens_BS).logits
    # Both are fp32; logits are sums of a few hundred products of order 0.1.
    assert (stage.logits(hidden_SBD).transpose(0, 1) - wanted).abs().max() < 1e-5 * wanted.abs().max().clamp(min=1)


def test_a_packed_sequence_is_its_samples_alone(world_of_one: Topology) -> None:
    """Two sequences of three samples, padding among them, and of two: losses and all gradients are the sums of what the
    five give as sequences of their own. fp32, as in `test_equals_transformers`. Without cu_seqlens they are not."""
    stage = stage_of(harness.config())
    for parameter in stage.parameters():  # far from uniform attention
        torch.nn.init.normal_(parameter, 1.0 if parameter.dim() == 1 else 0.0, 0.2)
    tokens_BS = torch.randint(0, 90, (2, harness.LENGTH))
    roles_BS = torch.full_like(tokens_BS, TEXT_TARGET, dtype=torch.uint8)
    roles_BS[0, 3:7] = roles_BS[0, 11:15] = roles_BS[1, 9:13] = VISUAL | VISUAL_TARGET
    roles_BS[0, 17:] = PADDING
    samples = [(0, 0, 10), (0, 10, 17), (0, 17, 24), (1, 0, 5), (1, 5, 24)]
    for b, start, _ in samples:
        roles_BS[b, start] = roles_BS[b, start] & PADDING | START
    features_RE = torch.randn(12, harness.MODEL.encoder.hidden_size)

    def run(tokens_BS: Tensor, roles_BS: Tensor, features_RE: Tensor, apart: Tensor | None) -> list[Tensor]:
        """Both losses, and the gradients of both."""
        batch = MicroBatch(tokens_BS, targets(tokens_BS, roles_BS), features_RE, apart)
        losses = stage.losses(stage(batch), batch, torch.ones(2), torch.ones(()))
        return [*losses, *torch.autograd.grad(losses.sum(), list(stage.parameters()))]

    alone = [
        run(tokens_BS[b : b + 1, start:end], roles_BS[b : b + 1, start:end], rows_RE, None)
        for (b, start, end), rows_RE in zip(samples, features_RE.split([4, 4, 0, 0, 4]), strict=True)
    ]
    wanted = [sum(values) for values in zip(*alone, strict=True)]
    packed = run(tokens_BS, roles_BS, features_RE, cu_seqlens(roles_BS))
    together = run(tokens_BS, roles_BS, features_RE, None)
    names = ["text", "image", *(name for name, _ in stage.named_parameters())]
    for name, got, other, want in zip(names, packed, together, wanted, strict=True):
        assert (got - want).norm() < 1e-5 * want.norm(), name
        assert (other - want).norm() > 1e-2 * want.norm(), name


@torch.no_grad()
@pytest.mark.parametrize("overflowed", [False, True])
def test_an_embedding_that_overflowed_shows_in_the_loss(overflowed: bool, world_of_one: Topology) -> None:
    """fp16: the encoder's output is infinite for a picture that nothing is predicted from, at the end of a sequence."""
    stage = stage_of(harness.config(precision="fp16"))
    parameters.fill_decoder(stage, harness.MODEL, parameters.fresh(harness.MODEL, 0, CPU), 0, 0, 1)
    roles_BS = torch.tensor([[0, TEXT_TARGET, TEXT_TARGET, VISUAL, VISUAL]], dtype=torch.uint8)
    tokens_BS = torch.arange(5)[None]
    features_RE = torch.full((2, harness.MODEL.encoder.hidden_size), 65504.0, dtype=torch.float16)
    batch = MicroBatch(tokens_BS, targets(tokens_BS, roles_BS), features_RE * (2 if overflowed else 1))
    hidden_SBD = torch.ones(5, 1, harness.MODEL.decoder.hidden_size).half()
    text_loss, image_loss = stage.losses(hidden_SBD, batch, torch.ones(2), torch.ones(()))
    assert text_loss.isfinite() and text_loss > 0
    assert image_loss.isnan() if overflowed else image_loss == 0


@pytest.mark.parametrize(
    ("preset", "image_size", "count"),
    [
        ("emu2_37b", 448, 36_906_513_152),
        ("emu2_chat_37b", 448, 36_906_539_776),
        # 16² patches instead of 32², each with a position of 1792 numbers.
        ("emu2_37b", 224, 36_906_513_152 - (32**2 - 16**2) * 1792),
    ],
)
def test_parameter_count(preset: str, image_size: int, count: int, world_of_one: Topology) -> None:
    """The published sizes (spec §8): built on the meta device, and by the table of names."""
    model = PRESETS[preset]
    model = replace(model, encoder=replace(model.encoder, image_size=image_size))
    with torch.device("meta"):
        modules = [stage_of(Config(model=model)), EvaVisionTransformer(model.encoder)]
    assert all(p.is_meta for module in modules for p in module.parameters())
    assert sum(p.numel() for module in modules for p in module.parameters()) == count
    assert sum(torch.Size(shape).numel() for shape in parameters.released_shapes(model).values()) == count


def test_small_preset_is_about_100_million() -> None:
    shapes = parameters.released_shapes(PRESETS["emu2_small"]).values()
    assert 90e6 < sum(torch.Size(shape).numel() for shape in shapes) < 110e6


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_cutting_and_joining_are_inverse(tp: int, world_of_one: Topology) -> None:
    """Every rule, on tensors whose elements are all different."""
    model = harness.MODEL
    whole = {name: torch.rand(shape) for name, shape in parameters.released_shapes(model).items()}
    stage = stage_of(harness.config())
    parts = [
        {
            name: rule.cut(model, [whole[n] for n in names], tp)[rank]
            for name, (rule, names) in ((n, parameters.rule_of(n, 0)) for n, _ in stage.named_parameters())
        }
        for rank in range(tp)
    ]
    joined = parameters.join_stage(model, parts, 0)
    assert joined.keys() == {name for name in whole if not name.startswith("visual.")}
    assert all(torch.equal(tensor, whole[name]) for name, tensor in joined.items())
    assert len(parts[0]["output_layer.weight"]) == padded_vocab_size(model, tp) // tp


def test_initial_values() -> None:
    """Normal with the given deviation, by name: another name or seed gives other numbers, the same ones the same."""
    shape, name = (400, 500), "decoder.lm.model.layers.0.mlp.up_proj.weight"
    value = parameters.initial_value(name, shape, 0.02, 7, CPU)
    # 200,000 samples: the mean is good to 0.02 / sqrt(2e5) = 4.5e-5, the deviation to 0.16 %.
    assert abs(float(value.mean())) < 2e-4
    assert float(value.std()) == pytest.approx(0.02, rel=0.01)
    assert torch.equal(value, parameters.initial_value(name, shape, 0.02, 7, CPU))
    assert not torch.equal(value, parameters.initial_value(name, shape, 0.02, 8, CPU))
    assert not torch.equal(value, parameters.initial_value(name.replace("up", "gate"), shape, 0.02, 7, CPU))
    assert torch.equal(parameters.initial_value("visual.blocks.0.norm1.weight", (5,), 0.02, 7, CPU), torch.ones(5))
    assert torch.equal(parameters.initial_value("visual.blocks.0.norm1.bias", (5,), 0.02, 7, CPU), torch.zeros(5))
