"""An export in plain transformers, in a process that has nothing of this package."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import oracle
import pytest
import torch
import weights
from PIL import Image
from safetensors.torch import load_file, save_file

from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.data.tokenizer import Tokenizer

transformers = pytest.importorskip("transformers")

PROGRAM = """
import sys
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, inputs, outputs = sys.argv[1:]
given = load_file(inputs)
tokenizer = AutoTokenizer.from_pretrained(folder)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
with torch.no_grad():
    out = model(given["tokens"], image=given["pixels"], output_hidden_states=True)
    found = {"logits": out.logits, "regressed": model.project_down(out.hidden_states[-1]),
             "features": model.encode_image(given["pixels"])}
prompt = model.build_input_ids(["[<IMG_PLH>]What is it?[<IMG_PLH>]"], tokenizer, image=given["pixels"])
found["prompt"] = prompt["input_ids"]
found["greedy"] = model.generate(**prompt, num_beams=1, max_new_tokens=8)
found["beams"] = model.generate(**prompt, num_beams=5, length_penalty=2.0, max_new_tokens=8)
found["drawn"] = model.generate_image(["[<IMG_PLH>]again[<IMG_PLH>]"], tokenizer, image=given["pixels"])
assert isinstance(tokenizer.batch_decode(found["greedy"], skip_special_tokens=True)[0], str)
save_file({name: tensor.contiguous() for name, tensor in found.items()}, outputs)
assert not {"emu2_megatron", "megatron"} & {name.partition(".")[0] for name in sys.modules}
"""


@pytest.mark.slow
def test_plain_transformers(exported: Path, tmp_path: Path) -> None:
    """Loaded without this package: logits, features and regressed embeddings are the oracle's, and so are the tokens
    and the picture generated from them."""
    model, tokenizer = weights.shallow(), Tokenizer(weights.TOKENIZER)
    draw = torch.Generator().manual_seed(1)
    pixels = torch.randn(2, 3, 56, 56, generator=draw)
    queries = model.image_queries
    picture = [tokenizer.image_begin, *[tokenizer.image] * queries, tokenizer.image_end]
    text = torch.randint(3, 1000, (12,), generator=draw).tolist()
    tokens = torch.tensor([[1, *text[:5], *picture, *text[5:], *picture]])
    save_file({"tokens": tokens, "pixels": pixels}, tmp_path / "inputs")
    shutil.copytree(exported / "hf", tmp_path / "away")  # nothing above it in the tree is ours
    command = [sys.executable, "-I", "-c", PROGRAM, "away", "inputs", "outputs"]
    subprocess.run(command, check=True, cwd=tmp_path, capture_output=True)
    found = load_file(tmp_path / "outputs")

    tensors = weights.native(model)
    sizes = oracle.Sizes(encoder_heads=4, decoder_heads=4)

    def run(tokens: Any, features: Any, visual: Any) -> tuple[Any, Any]:
        return oracle.decode(tensors, sizes, tokens, visual, features.flatten(0, -2))

    features = oracle.pool(oracle.encode(tensors, sizes, pixels), queries)
    hidden, logits = run(tokens, features, tokens == tokenizer.image)
    for name, wanted in (("features", features), ("logits", logits),
                         ("regressed", hidden @ tensors["project_down.weight"].T)):  # fmt: skip
        assert (found[name] - wanted).abs().max() < 1e-4 * wanted.abs().max()

    # Greedy, token by token without a cache.
    prompt = [1, *picture, *tokenizer.encode("What is it?"), *picture]
    assert found["prompt"].tolist() == [prompt]
    so_far = list(prompt)
    for _ in range(8):
        tokens = torch.tensor([so_far])
        logits = run(tokens, features, tokens == tokenizer.image)[1][0, -1]
        if len(so_far) == len(prompt):
            logits[2] = -torch.inf  # at least one token, as released
        so_far.append(int(logits.argmax()))
    assert found["greedy"].tolist() == [so_far[len(prompt) :]]
    assert found["beams"].shape[0] == 1

    # The picture, embedding by embedding.
    prompt = [1, *picture, *tokenizer.encode("again"), *picture, tokenizer.image_begin]
    rows = features.flatten(0, 1)
    for step in range(queries):
        tokens = torch.tensor([[*prompt, *[tokenizer.image] * step]])
        hidden, _ = run(tokens, rows, tokens == tokenizer.image)
        rows = torch.cat([rows, hidden[0, -1:] @ tensors["project_down.weight"].T])
    wanted = rows[-queries:]
    assert (found["drawn"][0] - wanted).abs().max() < 1e-4 * max(1.0, float(wanted.abs().max()))


TEXTS = [
    "hello",
    " hello",
    "  two  spaces ",
    "",
    "[IMG]x[/IMG] y",
    "a[IMG] b",
    "línea\nnueva 語 🙂",
    "</s>after",
    "[USER]: hi",
]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_is_the_engines(exported: Path, text: str) -> None:
    """Between added tokens the ids are SentencePiece's, with its dummy space before every piece of text."""
    import re

    ours = Tokenizer(weights.TOKENIZER)
    theirs = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    special = {**ours.ids, "<s>": 1, "</s>": 2}
    wanted = [1]
    for part in re.split(f"({'|'.join(map(re.escape, special))})", text):
        wanted += [special[part]] if part in special else ours.encode(part)
    assert theirs(text)["input_ids"] == wanted
    assert len(theirs) == ours.vocab_size and theirs.pad_token_id == ours.pad


def test_tokenizer_over_much_text(exported: Path) -> None:
    """Merging by rules gives what SentencePiece's scores give, over 60 kB of English, Chinese, French and digits."""
    ours = Tokenizer(weights.TOKENIZER)
    theirs = transformers.AutoTokenizer.from_pretrained(exported / "hf")
    data = Path(weights.TOKENIZER).parent
    pages = [json.loads(path.read_text())["content"] for path in sorted((data / "interleaved").glob("handbook*.json"))]
    texts = [part["text"] for page in pages for part in page if part["type"] == "text"]
    texts += (data / "text" / "us_constitution.txt").read_text().splitlines()
    assert sum(map(len, texts)) > 50_000
    for text in texts:
        assert theirs(text)["input_ids"] == [1, *ours.encode(text)]


@pytest.mark.slow
def test_chat_is_formatted_as_in_training(tmp_path: Path) -> None:
    """The ids of a conversation are those of tests/golden/sequences/chat.json, which were written by hand."""
    golden = json.loads((Path(__file__).parents[1] / "golden" / "sequences" / "chat.json").read_text())
    model = weights.shallow(1, vocab_size=1274)
    save_file(weights.native(model), tmp_path / "native.safetensors")
    from_hf.write(from_hf.whole(tmp_path / "native.safetensors", model), tmp_path / "checkpoint", weights.TOKENIZER)
    to_hf(tmp_path / "checkpoint", tmp_path / "chat", model, weights.TOKENIZER)
    hf = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "chat", trust_remote_code=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "chat")
    assert hf.config.model_version == "chat"
    turns = [("[<IMG_PLH>]What is this?", "A dog."), ("Is it old?", None)]
    text = hf.format_chat(turns, golden["sample"]["system"])
    found = hf.build_input_ids([text], tokenizer, image=[Image.new("RGB", (40, 30))])["input_ids"][0].tolist()
    assert found == golden["tokens"][: len(found)]
    assert golden["tokens"][len(found) :] == [*Tokenizer(weights.TOKENIZER, chat=True).encode("No."), 2]
    single = hf.build_input_ids(["Is it old?"], tokenizer, system_msg="You are a helpful assistant.")
    assert tokenizer.decode(single["input_ids"][0]).startswith("<s>")
    assert single["input_ids"][0].tolist().count(1272) == 1


def test_pictures_are_prepared_as_in_training(exported: Path) -> None:
    from emu2_megatron.data.decode import normalize
    from emu2_megatron.platform.precision import DTYPES

    hf = transformers.AutoModelForCausalLM.from_pretrained(exported / "hf", trust_remote_code=True)
    picture = Image.open(weights.TOKENIZER.parent / "images" / "gc_dog.jpg")
    found = hf.prepare_image_input([picture])
    squashed = picture.convert("RGB").resize((56, 56), Image.Resampling.BICUBIC)
    pixels = torch.tensor(list(squashed.tobytes()), dtype=torch.uint8).view(1, 56, 56, 3).permute(0, 3, 1, 2)
    torch.testing.assert_close(found, normalize(pixels, DTYPES["fp32"]), rtol=0, atol=1e-5)
