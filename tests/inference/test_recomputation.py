"""Generation with a cache, in a padded batch, in every layout, is what computing everything again gives, prompt by
prompt, in one process without the engine (tests/oracle.py)."""

from dataclasses import replace
from typing import Any

import harness
import oracle
import pytest
import torch
import weights
from torch import Tensor

from emu2_megatron.config.schema import Config
from emu2_megatron.inference.generate import generate, generate_image
from emu2_megatron.inference.model import Prompt, build, for_inference
from emu2_megatron.inference.search import Options

IMAGE, IMAGE_BEGIN = 95, 94
NEW = 7


def _config() -> Config:
    return harness.config(layers=3)


def _prompts() -> list[Prompt]:
    """Of 3, 14 and 9 tokens, with no, two and one picture."""
    draw = torch.Generator().manual_seed(3)
    queries = harness.MODEL.image_queries
    prompts = []
    for text, pictures in ((3, 0), (6, 2), (5, 1)):
        tokens = [1, *torch.randint(3, 90, (text - 1,), generator=draw).tolist()]
        for i in range(pictures):
            tokens[1 + i : 1 + i] = [IMAGE] * queries  # the first right behind `<s>`, both touching
        shown = torch.randint(0, 256, (pictures, 3, 56, 56), generator=draw, dtype=torch.uint8)
        prompts.append(Prompt(tokens, [token == IMAGE for token in tokens], list(shown), [queries] * pictures))
    return prompts


def _on_rank(rank: int, tp: int, pp: int) -> dict[str, Any]:
    config = for_inference(_config(), tp, pp)
    model = build(config, weights.native(config.model).__getitem__)
    texts = [generate(model, _prompts(), Options(beams=beams, max_new_tokens=NEW)) for beams in (1, 3)]
    drawn = generate(model, _prompts(), Options(beams=1, temperature=1.5, top_k=20, seed=5, max_new_tokens=NEW))
    image = generate_image(model, _prompts(), IMAGE_BEGIN)
    return {"greedy": str(texts[0]), "beams": str(texts[1]), "drawn": str(drawn), "image": image}


@pytest.fixture(scope="module")
def one() -> dict[str, Any]:
    return harness.run(1, _on_rank, 1, 1)[0]


def _recomputed(prompt: Prompt) -> tuple[list[int], Tensor]:
    """Greedy tokens without `</s>`, and the embeddings of a picture; nothing is remembered from step to step."""
    model = _config().model
    tensors, sizes = weights.native(model), oracle.Sizes(encoder_heads=2, decoder_heads=4)
    rows = torch.empty(0, model.encoder.hidden_size)
    if prompt.pictures:
        mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).view(3, 1, 1)
        std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).view(3, 1, 1)
        pixels = (torch.stack(prompt.pictures).float() / 255 - mean) / std
        rows = oracle.pool(oracle.encode(tensors, sizes, pixels), model.image_queries).flatten(0, 1)

    def run(tokens: list[int], rows: Tensor) -> tuple[Tensor, Tensor]:
        batch = torch.tensor([tokens])
        hidden, logits = oracle.decode(tensors, sizes, batch, batch == IMAGE, rows)
        return hidden[0, -1], logits[0, -1]

    tokens = list(prompt.tokens)
    for step in range(NEW):
        _, logits = run(tokens, rows)
        if step == 0:
            logits[2] = -torch.inf
        tokens.append(int(logits.argmax()))
        if tokens[-1] == 2:
            break
    text = [token for token in tokens[len(prompt.tokens) :] if token != 2]
    start, seen = [*prompt.tokens, IMAGE_BEGIN], rows
    for step in range(model.image_queries):
        hidden, _ = run([*start, *[IMAGE] * step], seen)
        seen = torch.cat([seen, (tensors["project_down.weight"] @ hidden)[None]])
    return text, seen[len(rows) :]


@torch.no_grad()
def test_one_process(one: dict[str, Any]) -> None:
    wanted = [_recomputed(prompt) for prompt in _prompts()]
    assert one["greedy"] == str([text for text, _ in wanted])
    images = torch.stack([image for _, image in wanted])
    assert (one["image"] - images).abs().max() < 1e-4 * images.abs().max()


@pytest.mark.slow
@pytest.mark.parametrize(("tp", "pp"), [(2, 1), (1, 2), (2, 2)])
def test_layouts(one: dict[str, Any], tp: int, pp: int) -> None:
    """On every rank: the tokens of one process, greedy, drawn and by beams, and its embeddings."""
    for found in harness.run(tp * pp, _on_rank, tp, pp):
        for name in ("greedy", "beams", "drawn"):
            assert found[name] == one[name]
        assert (found["image"] - one["image"]).abs().max() < 1e-4 * one["image"].abs().max()


def test_a_layout_that_cannot_be() -> None:
    from emu2_megatron.errors import ConfigError

    with pytest.raises(ConfigError, match="tensor_parallel_size: 3; legal"):
        for_inference(_config(), 3, 1)
    with pytest.raises(ConfigError, match="pipeline_parallel_size: 4; legal: 1 to 3"):
        for_inference(_config(), 1, 4)
    assert for_inference(replace(_config()), 2, 3).training.global_batch_size == 1
