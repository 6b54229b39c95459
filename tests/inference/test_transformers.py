"""The engine generates what transformers generates from the same folder: greedy, by beams, pictures, chat."""

from pathlib import Path
from typing import Any

import pytest
import torch
import weights
from PIL import Image

from emu2_megatron.inference.generate import generate, generate_image
from emu2_megatron.inference.load import find
from emu2_megatron.inference.prompt import COMPREHENSIVE, chat, encode
from emu2_megatron.inference.search import Options, probabilities
from emu2_megatron.parallel import topology

transformers = pytest.importorskip("transformers")

IMAGES = weights.TOKENIZER.parent / "images"
PLACE = "[<IMG_PLH>]"


@pytest.fixture(scope="module")
def both(exported: Path) -> Any:
    """The engine's model and tokenizer, and transformers'."""
    from emu2_megatron.data.tokenizer import tokenizer_for

    found = find(folder=exported / "hf")
    hf = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf", trust_remote_code=True)
    yield found.load(), tokenizer_for(found.config), hf, transformers.AutoTokenizer.from_pretrained(exported / "hf")
    topology.stop()


def _pictures() -> list[Image.Image]:
    return [Image.open(path).convert("RGB") for path in sorted(IMAGES.glob("*.jpg"))[:3]]


OPTIONS = [
    Options(beams=1, max_new_tokens=12),
    Options(beams=5, max_new_tokens=12),
    Options(beams=5, length_penalty=2.0, max_new_tokens=12, min_new_tokens=4),
    Options(beams=3, length_penalty=0.0, max_new_tokens=1),
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("endings", [0.0, 3.0])
def test_same_tokens(both: Any, options: Options, endings: float) -> None:
    """Few-shot prompts of three lengths in one batch; with `endings`, `</s>` is made so likely that answers end at
    different lengths."""
    model, tokenizer, hf, hf_tokenizer = both
    a, b, c = _pictures()
    prompts: list[list[Any]] = [[a, "red.", b, "blue.", c], ["Once upon"], ["<grounding>", a, "it is </phrase> at"]]
    weight = hf.model.decoder.lm.lm_head.weight
    ours = model.stage.output_layer.weight
    row = weight.data[2].clone()
    try:
        for head in (weight, ours):
            # Hidden states of a random model have no common direction: more length is more chance on both sides.
            head.data[2] = row * (1 + endings)
        texts = ["".join(PLACE if isinstance(part, Image.Image) else part for part in prompt) for prompt in prompts]
        inputs = hf_tokenizer(
            [text.replace(PLACE, f"[IMG]{'<image>' * 4}[/IMG]") for text in texts],
            padding="longest", padding_side="left", return_tensors="pt",
        )  # fmt: skip
        wanted = hf.generate(
            inputs["input_ids"], inputs["attention_mask"], image=hf.prepare_image_input([a, b, c, a]),
            num_beams=options.beams, max_new_tokens=options.max_new_tokens, min_len=options.min_new_tokens,
            length_penalty=options.length_penalty,
        )  # fmt: skip
        found = generate(model, [encode(prompt, tokenizer, model.config.model) for prompt in prompts], options)
    finally:
        weight.data[2] = ours.data[2] = row
    pad = hf_tokenizer.pad_token_id
    ended = [[token for token in row if token != pad] for row in wanted.tolist()]
    assert found == [row[: row.index(2)] if 2 in row else row for row in ended]
    if endings and (options.beams == 1 or options.length_penalty > 0):
        assert len({len(row) for row in found}) > 1


def test_same_picture(both: Any) -> None:
    model, tokenizer, hf, hf_tokenizer = both
    a, b, _ = _pictures()
    wanted = hf.generate_image([f"{PLACE}again{PLACE}"], hf_tokenizer, image=[a, b])
    found = generate_image(
        model, [encode([a, "again", b], tokenizer, model.config.model), encode(["no"], tokenizer, model.config.model)],
        tokenizer.image_begin,
    )  # fmt: skip
    assert (found[:1] - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


def test_same_chat(both: Any) -> None:
    """History, pictures, spaces to be stripped, an answer to be grounded."""
    model, tokenizer, hf, hf_tokenizer = both
    a, b, _ = _pictures()
    turns: list[Any] = [
        ([a, "What is this?"], " A dog. "),
        (["An", "d ", b, " this? "], "<phrase>A cat</phrase>."),
        (["Sure?"], None),
    ]
    said = [f"{PLACE}What is this?", f" And{PLACE}this? ", "Sure?"]
    text = hf.format_chat(
        list(zip(said, [" A dog. ", "<phrase>A cat</phrase>.", None], strict=True)), COMPREHENSIVE, True
    )
    wanted = hf.build_input_ids([text], hf_tokenizer, image=[a, b])["input_ids"][0].tolist()
    found = encode(chat(turns, COMPREHENSIVE, grounding=True), tokenizer, model.config.model)
    assert [token for token in found.tokens if token > 2] == [token for token in wanted if token > 2]


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(0.7, 0, 1.0), (1.3, 5, 1.0), (1.0, 0, 0.6), (0.8, 7, 0.5)]
)
def test_same_probabilities(temperature: float, top_k: int, top_p: float) -> None:
    """What sampling draws from is what transformers' processors leave."""
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = torch.randn(6, 50, generator=torch.Generator().manual_seed(0)) * 2
    wanted = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        wanted = TopKLogitsWarper(top_k)(None, wanted)
    if top_p < 1:
        wanted = TopPLogitsWarper(top_p)(None, wanted)
    found = probabilities(logits, Options(beams=1, temperature=temperature, top_k=top_k, top_p=top_p))
    torch.testing.assert_close(found, wanted.softmax(-1))


def test_a_seed_is_a_result(both: Any) -> None:
    model, tokenizer, *_ = both
    prompts = [encode(["Once upon a time"], tokenizer, model.config.model)] * 2

    def drawn(seed: int) -> list[list[int]]:
        return generate(model, prompts, Options(beams=1, temperature=2.0, seed=seed, max_new_tokens=10))

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(1)[0] != drawn(1)[1]
    sharp = generate(model, prompts, Options(beams=1, temperature=1.0, top_k=1, max_new_tokens=10))
    assert sharp == generate(model, prompts, Options(beams=1, max_new_tokens=10))
