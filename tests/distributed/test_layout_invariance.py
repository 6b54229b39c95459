"""Every layout computes what one process computes: losses, gradients, updated weights.

The oracle is `tests/oracle.py` in float64: plain autograd through encoder and decoder, no parallelism, no phases, no
megatron-core. Both start from `initial_value(seed, name)`, so a parameter that a layout fills differently shows too.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import harness
import numpy as np
import oracle
import pytest
import torch
from harness import MODEL
from torch import Tensor

from emu2_megatron.config.schema import Config, OptimizerConfig
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import START, TEXT_TARGET, VISUAL, VISUAL_TARGET, Features, PackedSequence
from emu2_megatron.model import parameters
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.ops import regression_loss
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.platform import library
from emu2_megatron.training.schedules import lr_factor
from emu2_megatron.training.step import StepReport, train_step

# fp32 against float64: sums of a few thousand fp32 terms are good to 1e-6; three Adam steps, which divide small
# gradients by their own root mean square, may lose two more digits in a parameter's norm.
LOSS_TOLERANCE, NORM_TOLERANCE = 1e-5, 1e-4

SIZES = oracle.Sizes(
    encoder_heads=MODEL.encoder.num_attention_heads,
    decoder_heads=MODEL.decoder.num_attention_heads,
    patch_size=MODEL.encoder.patch_size,
)
MIXED = [[0, 1, 2, 3, 1, 0, 2, 1], [2, 0, 0, 1, 3, 1, 0, 1], [1, 1, 1, 1, 0, 2, 2, 0]]
"""Pictures of every sequence, for three steps."""


def worker(
    _rank: int, config: Config, batches: list[list[PackedSequence]], stored: int = 0, fused: bool = True
) -> dict[str, Any]:
    """Gradients of the first batch, then one update per batch; this rank's part of gradients and final weights.

    With `stored`, every stored-th picture of a sequence comes as features. With prefetch all batches are prepared
    before the first one runs: even further ahead than the loop goes. A batch whose update is skipped (fp16) is tried
    again in the next step. `fused`: with the compiled ops, if they are built.
    """
    library.enabled = fused
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    if stored:
        for row in (row for batch in batches for row in batch):
            row.pictures[::stored] = map(partial(features, engine.encoder, config), row.pictures[::stored])
    mine = here.slots(config.training.global_batch_size)

    prepare = engine.step.prepare
    first = engine.step(prepare([batches[0][i] for i in mine]), force_all_reduce=True)
    scale = float(engine.optimizer.get_loss_scale())
    gradients = [{n: g / scale for n, g in part.items()} for part in _local(engine, "main_grad")]
    reports: list[StepReport] = []
    ahead = [prepare([batch[i] for i in mine]) for batch in batches if config.training.encoder_prefetch]
    left = list(batches)
    while left:
        prepared = ahead.pop(0) if ahead else prepare([left[0][i] for i in mine])
        reports.append(train_step(engine, config, prepared, len(reports)))
        if reports[-1].grad_norm is not None:
            left.pop(0)
    engine.settle()
    return {
        "place": [here.pp_rank, here.tp_rank, here.dp_rank * here.cp_size + here.cp_rank],
        "first_layers": engine.first_layers,
        "losses": [[r.text_loss, r.image_loss, r.grad_norm] for r in reports if r.grad_norm is not None],
        "scales": [report.loss_scale for report in reports],
        "skipped": reports[-1].skipped_updates,
        "counts": first.counts.tolist()[:5],  # the others: tests/parallel/test_counts.py
        "moments": first.moments,
        "gradients": gradients,
        "masters": [str(p.dtype) for group in engine.optimizer.param_groups for p in group["params"]],
        "weights": _local(engine, "data"),
    }


def features(encoder: EvaVisionTransformer, config: Config, picture: Tensor) -> Features:
    """What `emu2 embed` stores of a picture."""
    pixels = normalize(picture[None], torch.float32)
    return Features(encoder(pixels, [harness.QUERIES]).detach(), parameters.fingerprint(encoder, config))


def _local(engine: wrap.Engine, attribute: str) -> list[dict[str, Tensor]]:
    """Of every part of the decoder, and last of the encoder."""
    return [
        {n: getattr(p, attribute).clone() for n, p in module.named_parameters() if p.requires_grad}
        for module in (*engine.stages, engine.encoder)
    ]


def whole(results: list[dict[str, Any]], what: str) -> dict[str, Tensor]:
    """Released tensors put together from all ranks; parts that several ranks hold must be the same on all of them."""
    copies: dict[str, Tensor] = {}
    for dp_rank in sorted({r["place"][2] for r in results}):
        for pp_rank in sorted({r["place"][0] for r in results}):
            ranks = [r for r in results if r["place"][0] == pp_rank and r["place"][2] == dp_rank]
            ranks.sort(key=lambda r: r["place"][1])
            joined: dict[str, Tensor] = {}
            for part, first_layer in enumerate(ranks[0]["first_layers"]):
                joined |= parameters.join_stage(MODEL, [r[what][part] for r in ranks], first_layer)
            for r in ranks:
                joined |= {"visual." + name: tensor for name, tensor in r[what][-1].items()}
                for name, tensor in joined.items():
                    assert torch.equal(copies.setdefault(name, tensor), tensor), f"{name} differs between ranks"
    return copies


def reference(config: Config, batches: list[list[PackedSequence]], skipped: int = 0) -> dict[str, Any]:
    """The same run by the oracle: gradients of the first batch, losses and norms of all, final weights.

    `skipped` steps came before without an update: the learning rate moved on, Adam's count did not.
    """
    source = parameters.fresh(config.model, config.training.seed, torch.device("cpu"))
    weights = {name: source(name).double() for name in parameters.released_shapes(config.model)}
    trained = [name for name in weights if config.training.train_encoder or not name.startswith("visual.")]
    optimizer = config.optimizer
    rate = {name: _peak(optimizer, name) for name in trained}
    state: dict[str, Any] = {}
    losses, first = [], {}
    for step, sequences in enumerate(batches):
        leaves = {name: tensor.clone().requires_grad_(name in trained) for name, tensor in weights.items()}
        text, image = oracle_losses(leaves, sequences)
        total = config.training.text_loss_weight * text + config.training.image_loss_weight * image
        grads = torch.autograd.grad(total, [leaves[n] for n in trained], allow_unused=True, materialize_grads=True)
        gradients = dict(zip(trained, grads, strict=True))
        first = first or gradients
        factor = lr_factor(optimizer, step + skipped, config.training.steps)
        norm = oracle.adamw_step(
            {name: weights[name] for name in trained},
            gradients,
            state,
            step + 1,
            {name: lr * factor for name, lr in rate.items()},
            (optimizer.adam_beta1, optimizer.adam_beta2),
            optimizer.adam_eps,
            optimizer.weight_decay,
            optimizer.clip_grad,
        )
        losses.append([text.item(), image.item(), float(norm)])
    fresh = {name: source(name).double() for name in parameters.released_shapes(config.model)}
    return {
        "gradients": first,
        "losses": losses,
        "weights": {name: weights[name] for name in trained},
        "moments": moments(fresh, batches[0]),
    }


def counts(sequences: list[PackedSequence]) -> list[int]:
    """Text targets, regressed embeddings, pictures, sequences."""
    text, visual = (sum(int(((s.roles_S & role) > 0).sum()) for s in sequences) for role in (2, 4))
    return [text, visual, sum(len(s.pictures) for s in sequences), len(sequences)]


def moments(weights: dict[str, Tensor], sequences: list[PackedSequence]) -> Tensor:
    """sum v | sum v² | count over the regressed embeddings."""
    regressed = np.concatenate([((s.roles_S[(s.roles_S & VISUAL) > 0]) & 4) > 0 for s in sequences])
    v = oracle_features(weights, sequences)[torch.from_numpy(regressed)]
    return torch.cat([v.sum(0), v.square().sum(0), torch.tensor([float(len(v))]).double()])


def oracle_losses(weights: dict[str, Tensor], sequences: list[PackedSequence]) -> tuple[Tensor, Tensor]:
    """Text and image loss of a whole global batch, by plain autograd."""
    features_RE = oracle_features(weights, sequences)
    tokens, roles = (torch.from_numpy(np.stack([getattr(s, f) for s in sequences])) for f in ("tokens_S", "roles_S"))
    result = oracle.losses(weights, SIZES, tokens, roles, features_RE)
    return result["text"], result["image"]


def oracle_features(weights: dict[str, Tensor], sequences: list[PackedSequence]) -> Tensor:
    """Visual embeddings of all pictures, [R, E]."""
    pictures = [picture for sequence in sequences for picture in sequence.pictures]
    if not pictures:
        return torch.zeros(0, MODEL.encoder.hidden_size, dtype=torch.float64)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073], dtype=torch.float64)[:, None, None]
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711], dtype=torch.float64)[:, None, None]
    pixels = (torch.stack(pictures).double() / 255 - mean) / std
    return oracle.pool(oracle.encode(weights, SIZES, pixels), harness.QUERIES).flatten(0, 1)


def _peak(optimizer: Any, name: str) -> float:
    part = "encoder" if name.startswith("visual.") else "projection" if name.startswith("project") else "decoder"
    return float(getattr(optimizer, f"{part}_lr"))


_references: dict[Any, dict[str, Any]] = {}


def check(
    world_size: int, config: Config, pictures: list[list[int]], text: bool = True, stored: int = 0, packed: bool = False
) -> None:
    """Run a layout and compare everything with the oracle; `packed`: with several samples in a sequence."""
    batches = [harness.batch(counts, seed, text) for seed, counts in enumerate(pictures)]
    if packed:
        batches = [harness.pack(batch) for batch in batches]
    key = (config.training.train_encoder, config.model.decoder.num_layers, str(pictures), text, packed)
    expected = _references.get(key) or _references.setdefault(key, reference(config, batches))
    results = harness.run(world_size, worker, config, batches, stored)
    encoded = [sum(n - len(range(n)[::stored]) if stored else n for n in pictures[0])]
    compare(results, expected, counts(batches[0]) + encoded)


def compare(results: list[dict[str, Any]], expected: dict[str, Any], wanted_counts: list[int]) -> None:
    """Losses and norms of every step, counts and moments of the first batch, its gradients, the final weights."""
    for result in results:
        for step, (losses, wanted) in enumerate(zip(result["losses"], expected["losses"], strict=True)):
            assert losses == pytest.approx(wanted, rel=LOSS_TOLERANCE, abs=1e-12), f"step {step}: losses, norm"
        assert result["counts"] == wanted_counts
    moments = sum(result["moments"] for result in results)
    assert (moments - expected["moments"]).norm() < LOSS_TOLERANCE * expected["moments"].norm().clamp(min=1e-12)
    for what in ("gradients", "weights"):
        got = whole(results, what)
        assert got.keys() == expected[what].keys()
        for name, wanted in expected[what].items():
            error = (got[name].double() - wanted).norm() / wanted.norm().clamp(min=1e-12)
            assert error < NORM_TOLERANCE, f"{what} of {name}: relative error {error:.2e}"


LAYOUTS = {
    "one process": (1, {}),
    "TP2": (2, {"tp": 2}),
    "PP2": (2, {"pp": 2}),
    "PP4": (4, {"pp": 4}),
    "PP2 uneven": (2, {"pp": 2, "layout": (3, 1)}),
    "PP3 balanced": (3, {"pp": 3}),
    "PP2 VPP2 balanced": (2, {"pp": 2, "vpp": 2, "layers": 6}),
    "DP2": (2, {}),
    "DP4": (4, {}),
    "TP2 PP2": (4, {"tp": 2, "pp": 2}),
    "TP2 PP2 DP2": (8, {"tp": 2, "pp": 2}),
    "TP2 SP": (2, {"tp": 2, "sp": True}),
    "TP4 SP": (4, {"tp": 4, "sp": True}),
    "PP2 VPP2": (2, {"pp": 2, "vpp": 2}),
    "CP2": (2, {"cp": 2}),
    "CP4": (4, {"cp": 4}),
    "TP2 SP CP2 PP2": (8, {"tp": 2, "sp": True, "cp": 2, "pp": 2}),
    "TP2 SP PP2 VPP2 DP2": (8, {"tp": 2, "sp": True, "pp": 2, "vpp": 2}),
    "CP2 PP2 DP2": (8, {"cp": 2, "pp": 2}),
}


@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(name: str, train_encoder: bool) -> None:
    world_size, layout = LAYOUTS[name]
    check(world_size, harness.config(**layout, train_encoder=train_encoder), MIXED)


PACKED = {
    "one process": (1, {}),
    "one process, one by one": (1, {"micro_batch_size": 1}),
    "one process, all at once": (1, {"micro_batch_size": 8, "train_encoder": True}),
    "TP2 SP, attention recomputed": (2, {"tp": 2, "sp": True, "recompute": "attention"}),
    "PP4, one by one": (4, {"pp": 4, "micro_batch_size": 1}),
    "TP2 PP2, recomputed": (4, {"tp": 2, "pp": 2, "recompute": "full"}),
    "PP2 VPP2, half recomputed": (2, {"pp": 2, "vpp": 2, "layers": 8, "recompute": "block", "recompute_layers": 1}),
    "CP2": (2, {"cp": 2}),
    "CP4, one by one": (4, {"cp": 4, "micro_batch_size": 1}),
    "TP2 SP CP2 PP2, attention recomputed": (8, {"tp": 2, "sp": True, "cp": 2, "pp": 2, "recompute": "attention"}),
}


@pytest.mark.parametrize("name", PACKED)
def test_samples_in_a_sequence_are_apart(name: str) -> None:
    """Everything that could lose which samples a micro-batch has, or cut them wrongly."""
    world_size, settings = PACKED[name]
    check(world_size, harness.config(**settings), MIXED[:2], packed=True)


def test_samples_attend_to_those_before_them_if_asked() -> None:
    """As if each sequence were one sample, and not as they do otherwise."""
    config = harness.config(pp=2)
    config = replace(config, data=replace(config.data, attend_across_samples=True))
    batch = harness.pack(harness.batch(MIXED[0], 0))
    wanted_counts = [*counts(batch), sum(MIXED[0])]
    results = harness.run(2, worker, config, [batch])
    with pytest.raises(AssertionError, match="losses, norm"):
        compare(results, reference(config, [batch]), wanted_counts)
    for sequence in batch:
        sequence.roles_S &= ~np.uint8(START)
    compare(results, reference(config, [batch]), wanted_counts)


@pytest.mark.parametrize(
    "layout",
    [{}, {"tp": 2, "pp": 2}, {"tp": 2, "sp": True, "cp": 2, "train_encoder": True}],
    ids=["DP4", "TP2 PP2", "TP2 SP CP2, trained"],
)
def test_without_the_compiled_ops(layout: dict[str, Any]) -> None:
    """Plain PyTorch is as near to the oracle, and gives the compiled ops' losses: they add up in another order, once
    each, so that the first step's agree to fp32's last bits."""
    config, batches = harness.config(**layout), [harness.batch(counts, seed) for seed, counts in enumerate(MIXED)]
    plain, fused = (harness.run(4, worker, config, batches, 0, on) for on in (False, True))
    compare(plain, reference(config, batches), [*counts(batches[0]), sum(MIXED[0])])
    assert plain[0]["losses"][0] == pytest.approx(fused[0]["losses"][0], rel=1e-6)
    assert plain[0]["losses"] == [pytest.approx(losses, rel=LOSS_TOLERANCE) for losses in fused[0]["losses"]]


def backward_passes(_rank: int, config: Config, sequences: list[PackedSequence]) -> dict[str, Any]:
    """Whether each backward pass of the image loss was given the factor that was folded into its gradient."""
    found: list[bool] = []
    equal = regression_loss._equal
    regression_loss._equal = lambda *numbers: found.append(equal(*numbers)) or found[-1]
    engine = wrap.build(config, topology.initialize(config))
    engine.step(engine.step.prepare(sequences))
    return {"equal": found}


@pytest.mark.skipif(bool(library.problem), reason="the compiled ops are not built")
@pytest.mark.parametrize("weight", [0.3, 0.0])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_the_gradient_of_the_image_loss_is_scaled_once(precision: str, weight: float) -> None:
    """Loss scale and weight are multiplied into the stored gradient, and come back to the bit (unless the weight is 0,
    which cannot be multiplied in)."""
    config = harness.config(precision=precision, image_loss_weight=weight, initial_loss_scale=3e4)
    (result,) = harness.run(1, backward_passes, config, harness.batch(MIXED[0], 0))
    assert result["equal"] == [weight != 0] * 4


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batch_sizes(micro_batch_size: int) -> None:
    check(1, harness.config(train_encoder=True, micro_batch_size=micro_batch_size), MIXED)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batch_sizes_in_a_pipeline(micro_batch_size: int) -> None:
    check(2, harness.config(pp=2, train_encoder=True, micro_batch_size=micro_batch_size), MIXED)


def test_kept_activations() -> None:
    check(4, harness.config(tp=2, pp=2, train_encoder=True, encoder_keep_activations=True), MIXED)


@pytest.mark.parametrize(("recompute", "layers"), [("attention", 0), ("full", 0), ("block", 1), ("block", 2)])
def test_recompute(recompute: str, layers: int) -> None:
    """On stages of three layers and of one: block recomputes fewer than there are, or all of them."""
    training = {"recompute": recompute, "recompute_layers": layers}
    check(4, harness.config(tp=2, sp=True, pp=2, layout=(3, 1), train_encoder=True, **training), MIXED)


def passes(_rank: int, config: Config, sequences: list[PackedSequence]) -> dict[str, Any]:
    """How often each layer of this rank runs forward for a batch, for every micro-batch."""
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    layers = [layer for stage in engine.stages for layer in stage.decoder.layers]
    counts = [0] * len(layers)

    def count(i: int, *_: Any) -> None:
        counts[i] += 1

    for i, layer in enumerate(layers):
        layer.register_forward_hook(partial(count, i))
    engine.step(engine.step.prepare([sequences[i] for i in here.slots(len(sequences))]))
    return {"passes": [n * config.training.micro_batch_size / len(sequences) for n in counts]}


@pytest.mark.parametrize(
    ("recompute", "layers", "wanted"),
    [
        ("none", 0, [[1, 1, 1], [1, 1, 1]]),
        ("attention", 0, [[1, 1, 1], [1, 1, 1]]),
        ("full", 0, [[2, 2, 2], [2, 2, 2]]),
        ("block", 1, [[2, 2, 1], [2, 1, 2]]),
        ("block", 2, [[2, 2, 2], [2, 2, 2]]),
    ],
)
def test_recomputed_layers_run_twice(recompute: str, layers: int, wanted: list[list[float]]) -> None:
    """PP2 VPP2 with parts of 1, 2, 2, 1 layers: stage 0 holds parts 0 and 2, stage 1 parts 1 and 3."""
    config = harness.config(pp=2, vpp=2, layers=6, recompute=recompute, recompute_layers=layers)
    results = harness.run(2, passes, config, harness.batch(MIXED[0], 0))
    assert [result["passes"] for result in results] == wanted


@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize(
    "layout", [{}, {"pp": 2, "vpp": 2}, {"tp": 2, "sp": True}], ids=["DP4", "PP2 VPP2 DP2", "TP2 SP DP2"]
)
def test_overlap(layout: dict[str, Any], train_encoder: bool) -> None:
    check(4, harness.config(**layout, overlap=True, train_encoder=train_encoder), MIXED)


def test_overlap_on_text_alone() -> None:
    """Every weight must have a gradient for the sums to start: project_up has one although no picture came."""
    check(4, harness.config(pp=2, overlap=True), [[0] * 8] * 2)


@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True, "pp": 2}], ids=["DP4", "TP2 SP PP2"])
def test_prefetch(layout: dict[str, Any]) -> None:
    check(4, harness.config(**layout, encoder_prefetch=True), MIXED)


@pytest.mark.parametrize("stored", [1, 2], ids=["all", "every other"])
@pytest.mark.parametrize("layout", [{}, {"tp": 2, "sp": True, "pp": 2}], ids=["DP4", "TP2 SP PP2"])
def test_precomputed_features(layout: dict[str, Any], stored: int) -> None:
    check(4, harness.config(**layout), MIXED, stored=stored)


def test_encoder_chunks_of_one_picture() -> None:
    check(2, harness.config(pp=2, train_encoder=True, encoder_micro_batch_size=1), MIXED)


@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "trained"])
def test_no_picture_at_all(train_encoder: bool) -> None:
    check(4, harness.config(tp=2, pp=2, train_encoder=train_encoder), [[0] * 8] * 2)


@pytest.mark.parametrize("train_encoder", [False, True], ids=["frozen", "trained"])
def test_pictures_on_one_rank_only(train_encoder: bool) -> None:
    """PP2 DP2: rank 0 alone loads sequence 0, and its replica's other micro-batches are text only."""
    check(4, harness.config(pp=2, train_encoder=train_encoder), [[3, 0, 0, 0, 0, 0, 0, 0]] * 2)


def test_no_text_target() -> None:
    check(2, harness.config(pp=2, train_encoder=True), [[1, 2, 0, 3, 1, 0, 0, 1]] * 2, text=False)


def test_fewer_sequences_than_ranks() -> None:
    """A replica of four ranks that shares out two sequences: two ranks load nothing."""
    config = harness.config(tp=2, pp=2, train_encoder=True, micro_batch_size=1, global_batch_size=4)
    check(8, config, [[1, 2, 0, 3]] * 2)


@pytest.mark.parametrize(("precision", "dtype", "bits"), [("bf16", torch.bfloat16, 8), ("fp16", torch.float16, 11)])
def test_16_bits_follow_float64(precision: str, dtype: torch.dtype, bits: int) -> None:
    """Weights and activations of 16 bits, everything that adds up in fp32.

    A mantissa of n bits is a relative error of 2^-(n+1), on average, in each of a dozen roundings from a weight to the
    loss: losses within 2^-n. After an update within 2^-(n-2): weights near 1, those of norms, have moved by no more
    than a few of their last bits, and all alike, so that their rounding does not average out. Gradients within a few
    percent (bf16) of a parameter's norm, and no bias in their length, which clipping and Adam would hide in the
    weights. fp16 has three bits more; a cosine's distance from 1 goes with the square of the error.
    """
    finer = 2.0 ** (8 - bits)
    config = harness.config(tp=2, pp=2, train_encoder=True, precision=precision, initial_loss_scale=2.0**12)
    batches = [harness.batch(counts, seed) for seed, counts in enumerate(MIXED)]
    results = harness.run(4, worker, config, batches)
    assert results[0]["skipped"] == 0
    expected = reference(config, batches)
    follows(results, expected, 2.0**-bits)
    for name, gradient in whole(results, "gradients").items():
        wanted = expected["gradients"][name]
        assert gradient.dtype == torch.float32
        cosine = float((gradient.double() * wanted).sum() / (gradient.double().norm() * wanted.norm()))
        length = float(gradient.double().norm() / wanted.norm())
        message = f"{name}: cosine {cosine}, length {length}"
        assert 1 - cosine < 1e-3 * finer**2 and length == pytest.approx(1, abs=0.02 * finer), message
    assert results[0]["weights"][-1]["cls_token"].dtype == dtype
    assert {dtype for result in results for dtype in result["masters"]} == {"torch.float32"}


def follows(results: list[dict[str, Any]], expected: dict[str, Any], error: float) -> None:
    """Losses and norms are the oracle's: losses within `error`, four times that after the first update."""
    for step, (losses, wanted) in enumerate(zip(results[0]["losses"], expected["losses"], strict=True)):
        assert losses[:2] == pytest.approx(wanted[:2], rel=error * (4 if step else 1)), f"step {step}"
        assert losses[2] == pytest.approx(wanted[2], rel=5 * error), f"step {step}"


def test_fp16_goes_on_after_overflows() -> None:
    """A loss scale that is too large: the first updates are skipped, each halves it, then training follows the oracle.

    Skipped steps move the learning rate on and leave Adam's count alone: with no or one step more, later losses are far
    from the oracle's.
    """
    config = harness.config(tp=2, pp=2, train_encoder=True, precision="fp16", initial_loss_scale=2.0**18, steps=64,
                            optimizer=OptimizerConfig(decoder_lr=1e-3, encoder_lr=5e-4, warmup_steps=40))  # fmt: skip
    batches = [harness.batch(counts, seed) for seed, counts in enumerate(MIXED)]
    results = harness.run(4, worker, config, batches)
    skipped = results[0]["skipped"]
    for result in results:
        assert result["skipped"] == skipped >= 2
        assert result["scales"] == [2.0 ** (18 - i) for i in range(skipped + 1)] + [2.0 ** (18 - skipped)] * 2
    follows(results, reference(config, batches, skipped), 2.0**-11)
    for wrong in (0, skipped + 1):
        with pytest.raises(AssertionError, match="step 1"):
            follows(results, reference(config, batches, wrong), 2.0**-11)


def test_the_comparison_can_fail() -> None:
    """One picture of one sequence inverted is another run, and must not pass for the first."""
    batches = [harness.batch(MIXED[0], 0)]
    batches[0][1].pictures[0] = 255 - batches[0][1].pictures[0]
    config = harness.config(train_encoder=True)
    results = harness.run(1, worker, config, [harness.batch(MIXED[0], 0)])
    with pytest.raises(AssertionError, match="losses, norm"):
        compare(results, reference(config, batches), [*counts(batches[0]), sum(MIXED[0])])


def test_role_bits_are_the_oracles() -> None:
    ours = (TEXT_TARGET, VISUAL, VISUAL_TARGET, START)
    assert ours == (oracle.TEXT_TARGET, oracle.VISUAL, oracle.VISUAL_TARGET, oracle.START)
