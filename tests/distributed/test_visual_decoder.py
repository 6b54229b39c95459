"""Training a decoder of pictures or clips on any number of ranks is plain autograd on one, and a stopped run goes on to
the bit."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import clips
import harness
import numpy as np
import pytest
import torch
from torch import Tensor

from emu2_megatron.checkpoint.load import load
from emu2_megatron.checkpoint.save import Saver
from emu2_megatron.checkpoint.state import stored
from emu2_megatron.config.presets import VIDEO_DECODERS, VISUAL_DECODERS
from emu2_megatron.config.schema import Config, DataConfig, OptimizerConfig, trained_decoder
from emu2_megatron.convert.decoder_checkpoint import from_checkpoint
from emu2_megatron.data.decode import CLIP_MEAN, CLIP_STD
from emu2_megatron.data.loader import Loader
from emu2_megatron.data.sequence import Crop, PackedSequence
from emu2_megatron.data.shards import RawSample, write_shard
from emu2_megatron.model import parameters, video_decoder, video_loss, visual_decoder
from emu2_megatron.model.eva_vit import EvaVisionTransformer
from emu2_megatron.parallel import average, diffusion, topology
from emu2_megatron.training import objective as objective_of_run
from emu2_megatron.training.meters import mean_predictor_loss
from emu2_megatron.training.step import train_step

Q = harness.QUERIES


T = 3
"""Frames of a clip."""
OBJECTIVES = pytest.mark.parametrize("objective", ["visual_decoder", "video_decoder"])


def config(objective: str, ema_decay: float = 0.0, **training: Any) -> Config:
    """A small UNet, on the harness's encoder."""
    run = harness.config(objective=objective, **training)
    small: dict[str, Any] = {"image_size": 32, "unet_channels": (16, 32), "unet_attention_heads": (2, 2),
                             "vae_channels": (8, 8), "condition_drop": 0.4, "ema_decay": ema_decay}  # fmt: skip
    pictures = replace(VISUAL_DECODERS["emu2_gen_tiny"], unet_transformer_layers=(0, 1), **small)
    films = replace(VIDEO_DECODERS["emu2_video_tiny"], frames=T, **small)
    optimizer = OptimizerConfig(visual_decoder_lr=1e-3, video_decoder_lr=1e-3, clip_grad=1.0, warmup_steps=2,
                                weight_decay=0.1)  # fmt: skip
    data = DataConfig(sequence_length=Q * (T if objective == "video_decoder" else 1))
    return replace(run, visual_decoder=pictures, video_decoder=films, data=data, optimizer=optimizer)


def rows(config: Config, there: list[bool], seed: int) -> list[PackedSequence]:
    """A global batch; a row has a picture or clip or, if it proved bad, none."""
    draw = np.random.default_rng(seed)
    length = config.data.sequence_length

    def crop() -> Crop:
        seen, painted = (draw.integers(0, 256, (length // Q, 3, size, size), dtype=np.uint8) for size in (56, 32))
        numbers = draw.integers(0, 500, 4).tolist()
        return Crop(torch.from_numpy(seen), torch.from_numpy(painted), (numbers[0] + 32, numbers[1] + 32),
                    (numbers[2], numbers[3]), int(draw.integers(2**32)))  # fmt: skip

    nothing = np.zeros(length, np.int64)
    return [PackedSequence(nothing, nothing.astype(np.uint8), crops=[crop()] if one else []) for one in there]


ALL = [True] * 8
NONE_ON_THE_SECOND = [True, False, True, True, False, False, False, False]
"""Of two ranks, the second one has no picture or clip at all."""


def engine_of(config: Config) -> tuple[topology.Topology, Any]:
    here = topology.initialize(config)
    return here, diffusion.build(config, here, None, None)


def worker(_rank: int, config: Config, there: list[bool]) -> dict[str, Any]:
    here, engine = engine_of(config)
    batch = rows(config, there, 0)
    prepared = engine.step.prepare([batch[i] for i in here.slots(8)])
    output = engine.step(prepared, force_all_reduce=True, flags=(here.rank == 0, True))
    gradients = {n: p.main_grad.clone() for n, p in engine.whole["unet"].named_parameters()}
    frozen = any(p.requires_grad for part in (engine.step.encoder, engine.step.vae) for p in part.parameters())
    return {"gradients": gradients, "loss": output.image_loss, "counts": output.counts, "flags": output.flags,
            "finite": len(output.finite_R), "frozen": not frozen, "moments": output.moments}  # fmt: skip


def by_hand(config: Config, there: list[bool]) -> tuple[float, dict[str, Tensor], float]:
    """Loss, gradients and the sum of squared targets, of all samples at once, by torch alone but for the networks and
    the losses (whose formulas are in tests/model/test_visual_decoder.py and test_video_loss.py)."""
    crops = [crop for row in rows(config, there, 0) for crop in row.crops]
    decoder, width, clips = (
        trained_decoder(config),
        config.model.encoder.hidden_size,
        bool(config.training.objective == "video_decoder"),
    )
    encoder = EvaVisionTransformer(config.model.encoder)
    parameters.fill_encoder(encoder, config.model, parameters.fresh(config.model, 1234, torch.device("cpu")))
    vae = visual_decoder.build_vae(decoder, 1234)
    mean, std = torch.tensor([CLIP_MEAN, CLIP_STD]).view(2, 1, 3, 1, 1)
    seen = torch.cat([crop.seen_T3HW for crop in crops]).float() / 255
    painted = torch.cat([crop.painted_T3HW for crop in crops]).float() / 255 * 2 - 1
    draws = visual_decoder.draw(decoder, [crop.seed for crop in crops], *([T] if clips else []), 16, 16)
    with torch.no_grad():
        embeddings = encoder((seen - mean) / std, [Q] * len(seen)).view(len(seen), Q, -1)
        null = encoder(torch.zeros(1, 3, 56, 56), [Q])
        latents = visual_decoder.encode_latents(vae, painted, draws.posterior.reshape(len(painted), 4, 16, 16))
    if clips:
        network = video_decoder.build(config.video_decoder, width, 1234)
        unet = network.unet
        scheduler = video_loss.training_scheduler(config.video_decoder)
        latents, embeddings = latents.unflatten(0, (-1, T)), embeddings.unflatten(0, (-1, T))
        error, count = video_loss.denoising_loss(network, scheduler, latents, embeddings, null, draws)
        kept = scheduler.alphas_cumprod[draws.timesteps_B].view(-1, 1, 1, 1, 1)
        targets = kept**0.5 * draws.noise - (1 - kept) ** 0.5 * latents
    else:
        unet = visual_decoder.build_unet(config.visual_decoder, width, 1234)
        told = [crop.original for crop in crops], [crop.corner for crop in crops], [(32, 32)] * len(crops)
        sizes = visual_decoder.Sizes(*map(torch.tensor, told))
        scheduler = visual_decoder.training_scheduler()
        error, count = visual_decoder.denoising_loss(unet, scheduler, latents, embeddings, null, sizes, draws)
        targets = draws.noise
    (config.training.image_loss_weight * error / count).backward()
    return (
        float(error.detach() / count),
        {n: p.grad for n, p in unet.named_parameters()},
        float(targets.double().square().sum()),
    )


@pytest.mark.slow
@pytest.mark.parametrize("there", [ALL, NONE_ON_THE_SECOND], ids=["all", "none on a rank"])
@OBJECTIVES
def test_ranks_agree_with_plain_autograd(objective: str, there: list[bool]) -> None:
    """fp32; sums of a few thousand products in another order differ by some 1e-6 of the largest gradient."""
    run = config(objective)
    loss, gradients, squares = by_hand(run, there)
    samples, length = sum(there), run.data.sequence_length
    pictures = samples * length // Q
    for ranks in (1, 2):
        results = harness.run(ranks, worker, run, there)
        for result in results:
            assert result["frozen"] and result["loss"].item() == pytest.approx(loss, rel=1e-5)
            assert result["counts"].tolist()[:6] == [0, samples, pictures, 8, pictures, length * (8 - samples)]
            assert result["counts"][6:].sum() == pictures and result["flags"].tolist() == [1, ranks]
            assert result["gradients"].keys() == gradients.keys()
            for name, wanted in gradients.items():
                torch.testing.assert_close(result["gradients"][name], wanted, rtol=1e-4, atol=2e-6)
        assert sum(result["finite"] for result in results) == samples
        moments = sum(result["moments"] for result in results)
        assert moments[4:8].sum() == pytest.approx(squares, rel=1e-5) and moments[8] == pictures * 16 * 16


def trained(_rank: int, config: Config, directory: str, resume: str, steps: int) -> dict[str, Any]:
    """Train until `steps` updates are done, from nothing or from a checkpoint, and save then and after the second."""
    here, engine = engine_of(config)
    done = int(load(resume, engine)["step"]) if resume else 0
    saver = Saver(config.checkpoint, Path(directory), engine, print)
    losses, states = [], []
    for step in range(done, steps):
        batch = rows(config, ALL, step)
        report = train_step(engine, config, engine.step.prepare([batch[i] for i in here.slots(8)]), step)
        losses.append(report.image_loss)
        assert report.grad_norm is not None
        if step + 1 in (2, steps):
            saver.save(step + 1, {"data": {}})
            states.append({f"{name}{offset}": box.clone() for name, pieces in stored(engine).items()
                           for offset, box in pieces.boxes.items() if not name.startswith("rng.")})  # fmt: skip
    saver.finish()
    if here.rank == 0:
        networks = from_checkpoint(Path(directory) / f"step_{steps:08d}", trained_decoder(config), 28)
    averaged = average.gathered(engine, engine.whole["unet"])
    if here.rank == 0:
        assert networks[0].keys() == averaged.keys() and networks[1].keys() == engine.step.vae.state_dict().keys()
        assert all(networks[0][name].equal(tensor) for name, tensor in averaged.items())
        assert not all(averaged[name].equal(p) for name, p in engine.whole["unet"].named_parameters())
        assert all(networks[1][name].equal(tensor) for name, tensor in engine.step.vae.state_dict().items())
    return {"losses": losses, "states": states}


@pytest.mark.slow
@pytest.mark.parametrize(("objective", "ranks"), [("visual_decoder", 1), ("visual_decoder", 2), ("video_decoder", 1)])
def test_a_stopped_run_goes_on_to_the_bit(tmp_path: Path, objective: str, ranks: int) -> None:
    run = config(objective, ema_decay=0.9, precision="bf16")
    half = str(tmp_path / "straight/step_00000002")
    straight = harness.run(ranks, trained, run, str(tmp_path / "straight"), "", 4)
    again = harness.run(ranks, trained, run, str(tmp_path / "again"), half, 4)
    for a, b in zip(straight, again, strict=True):
        (before, wanted), (state,) = a["states"], b["states"]
        assert a["losses"][2:] == b["losses"]
        assert wanted.keys() == state.keys() and len(wanted) > 100
        assert all(torch.equal(wanted[name], state[name]) for name in wanted)
        assert not all(torch.equal(wanted[name], before[name]) for name in wanted)
    other = harness.run(3 - ranks, trained, run, str(tmp_path / "other"), half, 4)
    # bf16 rounds the gradients of other sums to other neighbours.
    assert other[0]["losses"] == pytest.approx(straight[0]["losses"][2:], rel=5e-3)


def begun(_rank: int, config: Config) -> dict[str, Any]:
    engine = objective_of_run.build(config, topology.initialize(config))
    return {name: dict(engine.whole[name].state_dict()) for name in ("unet", "vae")}


@pytest.mark.slow
@OBJECTIVES
def test_a_run_begins_with_what_stable_diffusion_has(tmp_path: Path, objective: str) -> None:
    """A folder as diffusers itself writes it, of a UNet that reads captions 10 wide; an option of the released
    Stable Diffusion 2.1 that only changes rounding is in it."""
    run, clips = config(objective), objective == "video_decoder"
    torch.manual_seed(5)
    unet: Any = (
        video_decoder.build_2d(run.video_decoder, 10) if clips else visual_decoder.build_unet(run.visual_decoder, 10, 5)
    )
    unet.register_to_config(upcast_attention=True)
    vae = visual_decoder.build_vae(trained_decoder(run), 5)
    unet.save_pretrained(tmp_path / "unet")
    vae.save_pretrained(tmp_path / "vae")
    decoder = replace(trained_decoder(run), **{"sd21" if clips else "sdxl": str(tmp_path)})
    (result,) = harness.run(1, begun, replace(run, **{objective: decoder}))
    assert all(result["vae"][name].equal(tensor) for name, tensor in vae.state_dict().items())
    wanted = unet.state_dict()
    taken = {name for name in wanted if result["unet"][name].shape == wanted[name].shape}
    assert all(result["unet"][name].equal(wanted[name]) for name in taken)
    anew = ("attn2.to_k.weight", "attn2.to_v.weight", "add_embedding.linear_1.weight")
    assert wanted.keys() - taken == {name for name in wanted if name.endswith(anew)} != set()
    assert all(".temporal." in name for name in result["unet"].keys() - wanted.keys())
    assert (len(result["unet"]) > len(wanted)) == clips


def learner(_rank: int, config: Config) -> dict[str, Any]:
    """Train on the loader's first batch, every step with other draws."""
    here, engine = engine_of(config)
    with Loader(config, None, here.slots(config.training.global_batch_size)) as loader:
        batch = next(loader)
    losses, mean_losses = [], []
    for step in range(config.training.steps):
        for slot, row in enumerate(batch):
            row.crops = [replace(crop, seed=harness.sample_seed(step, slot)) for crop in row.crops]
        report = train_step(engine, config, engine.step.prepare(batch), step)
        losses.append(report.image_loss)
        mean_losses.append(mean_predictor_loss(report.output.moments))
    return {"losses": losses, "mean_losses": mean_losses, "clips": sum(len(row.crops) for row in batch)}


@pytest.mark.slow
def test_the_video_decoder_learns_films(tmp_path: Path) -> None:
    """The repository's three films; v is predicted better than at first, and better than by its mean."""
    write_shard(tmp_path / "films.tar", [
        RawSample(path.stem, {"kind": "caption", "video": f"0{path.suffix}", "text": "a film"},
                  {f"0{path.suffix}": path.read_bytes()})
        for path in clips.VIDEOS
    ])  # fmt: skip
    run = config("video_decoder", steps=50, global_batch_size=3, micro_batch_size=3)
    run = replace(run, data=replace(run.data, shards=(str(tmp_path / "films.tar"),), packing_buffer=1),
                  optimizer=replace(run.optimizer, video_decoder_lr=3e-3))  # fmt: skip
    (result,) = harness.run(1, learner, run)
    first, last, mean = (float(np.mean(part)) for part in (
        result["losses"][:5], result["losses"][-10:], result["mean_losses"][-10:]))  # fmt: skip
    assert result["clips"] == 3 and last < 0.75 * min(first, mean)
