"""Every layout computes what one process computes: losses, gradients, updated weights.

The oracle is `tests/oracle.py` in float64: plain autograd through encoder and decoder, no parallelism, no phases, no
megatron-core. Both start from `initial_value(seed, name)`, so a parameter that a layout fills differently shows too.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import harness
import numpy as np
import oracle
import pytest
import torch
from harness import MODEL
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.data.decode import normalize
from emu2_megatron.data.sequence import TEXT_TARGET, VISUAL, VISUAL_TARGET, Features, PackedSequence
from emu2_megatron.model import parameters
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.parallel import topology, wrap
from emu2_megatron.parallel.three_phase import Prepared
from emu2_megatron.training.schedules import lr_factor
from emu2_megatron.training.step import train_step

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


def worker(_rank: int, config: Config, batches: list[list[PackedSequence]], stored: int = 0) -> dict[str, Any]:
    """Gradients of the first batch, then one update per batch; this rank's part of gradients and final weights.

    With `stored`, every stored-th picture of a sequence comes as features.
    """
    here = topology.initialize(config)
    engine = wrap.build(config, here)
    if stored:
        for row in (row for batch in batches for row in batch):
            row.pictures[::stored] = map(partial(features, engine.encoder), row.pictures[::stored])
    mine = here.slots(config.training.global_batch_size)

    first = engine.step(engine.step.prepare([batches[0][i] for i in mine]), force_all_reduce=True)
    gradients = _local(engine, "main_grad")
    prepared: Iterable[Prepared] = (engine.step.prepare([batch[i] for i in mine]) for batch in batches)
    if config.training.encoder_prefetch:
        prepared = list(prepared)  # even further ahead than the loop goes
    reports = [train_step(engine, config, batch, step) for step, batch in enumerate(prepared)]
    engine.settle()
    return {
        "place": [here.pp_rank, here.tp_rank, here.dp_rank * here.cp_size + here.cp_rank],
        "first_layers": engine.first_layers,
        "losses": [[report.text_loss, report.image_loss, report.grad_norm] for report in reports],
        "counts": first.counts.tolist(),
        "moments": first.moments,
        "gradients": gradients,
        "masters": [str(p.dtype) for group in engine.optimizer.param_groups for p in group["params"]],
        "weights": _local(engine, "data"),
    }


def features(encoder: EvaVisionTransformer, picture: np.ndarray) -> Features:
    """What `emu2 embed` stores of a picture."""
    pixels = normalize(torch.from_numpy(picture)[None], torch.float32)
    return Features(encoder(pixels, [harness.QUERIES]).detach(), parameters.fingerprint(encoder))


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


def reference(config: Config, batches: list[list[PackedSequence]]) -> dict[str, Any]:
    """The same run by the oracle: gradients of the first batch, losses and norms of all, final weights."""
    source = parameters.fresh(MODEL, config.training.seed, torch.device("cpu"))
    weights = {name: source(name).double() for name in parameters.released_shapes(MODEL)}
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
        factor = lr_factor(optimizer, step, config.training.steps)
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
    fresh = {name: source(name).double() for name in parameters.released_shapes(MODEL)}
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
    pixels = (torch.from_numpy(np.stack(pictures)).double() / 255 - mean) / std
    return oracle.pool(oracle.encode(weights, SIZES, pixels), harness.QUERIES).flatten(0, 1)


def _peak(optimizer: Any, name: str) -> float:
    part = "encoder" if name.startswith("visual.") else "projection" if name.startswith("project") else "decoder"
    return float(getattr(optimizer, f"{part}_lr"))


_references: dict[Any, dict[str, Any]] = {}


def check(world_size: int, config: Config, pictures: list[list[int]], text: bool = True, stored: int = 0) -> None:
    """Run a layout and compare everything with the oracle."""
    batches = [harness.batch(counts, seed, text) for seed, counts in enumerate(pictures)]
    key = (config.training.train_encoder, str(pictures), text)
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


@pytest.mark.parametrize("micro_batch_size", [1, 4, 8])
def test_micro_batch_sizes(micro_batch_size: int) -> None:
    check(1, harness.config(train_encoder=True, micro_batch_size=micro_batch_size), MIXED)


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_micro_batch_sizes_in_a_pipeline(micro_batch_size: int) -> None:
    check(2, harness.config(pp=2, train_encoder=True, micro_batch_size=micro_batch_size), MIXED)


def test_kept_activations() -> None:
    check(4, harness.config(tp=2, pp=2, train_encoder=True, encoder_keep_activations=True), MIXED)


@pytest.mark.parametrize("recompute", ["attention", "full"])
def test_recompute(recompute: str) -> None:
    check(4, harness.config(tp=2, sp=True, pp=2, train_encoder=True, recompute=recompute), MIXED)


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


def test_bf16_follows_float64() -> None:
    """bf16 weights and activations, everything that adds up in fp32.

    bf16 keeps 8 bits of mantissa, a relative error of 2^-9 in each of a dozen roundings from a weight to the loss:
    losses within 2^-7, gradients within a few percent of a parameter's norm, and no bias in their length, which
    clipping and Adam would hide in the weights.
    """
    config = harness.config(tp=2, pp=2, train_encoder=True, precision="bf16")
    batches = [harness.batch(counts, seed) for seed, counts in enumerate(MIXED)]
    expected = reference(config, batches)
    results = harness.run(4, worker, config, batches)
    for losses, wanted in zip(results[0]["losses"], expected["losses"], strict=True):
        assert losses[:2] == pytest.approx(wanted[:2], rel=2**-7)
        assert losses[2] == pytest.approx(wanted[2], rel=0.02)
    for name, gradient in whole(results, "gradients").items():
        wanted = expected["gradients"][name]
        assert gradient.dtype == torch.float32
        cosine = float((gradient.double() * wanted).sum() / (gradient.norm() * wanted.norm()))
        length = float(gradient.norm() / wanted.norm())
        assert cosine > 0.999 and length == pytest.approx(1, abs=0.02), f"{name}: cosine {cosine}, length {length}"
    assert results[0]["weights"][-1]["cls_token"].dtype == torch.bfloat16
    assert {dtype for result in results for dtype in result["masters"]} == {"torch.float32"}


def test_the_comparison_can_fail() -> None:
    """One picture of one sequence inverted is another run, and must not pass for the first."""
    batches = [harness.batch(MIXED[0], 0)]
    batches[0][1].pictures[0] = 255 - batches[0][1].pictures[0]
    config = harness.config(train_encoder=True)
    results = harness.run(1, worker, config, [harness.batch(MIXED[0], 0)])
    with pytest.raises(AssertionError, match="losses, norm"):
        compare(results, reference(config, batches), [*counts(batches[0]), sum(MIXED[0])])


def test_role_bits_are_the_oracles() -> None:
    assert (TEXT_TARGET, VISUAL, VISUAL_TARGET) == (oracle.TEXT_TARGET, oracle.VISUAL, oracle.VISUAL_TARGET)
