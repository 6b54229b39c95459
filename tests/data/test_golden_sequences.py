"""Every kind of sample, and a packed row, equal files written by hand (`tests/golden/sequences/README.md`)."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import media
import pytest
import sentencepiece
import torch

from emu2_megatron.config.schema import Config
from emu2_megatron.data.batch import targets
from emu2_megatron.data.shards import RawSample
from emu2_megatron.data.tokenizer import Tokenizer

GOLDEN = Path(__file__).parents[1] / "golden"
NAMES = sorted(path.stem for path in (GOLDEN / "sequences").glob("*.json"))
KINDS = {"caption", "interleaved", "grounded", "text", "chat", "generation"}

# Ids that follow the demo tokenizer's 1000 pieces, in the order of the released vocabulary.
ADDED = {
    "[PAD]": 1000, "[IMG]": 1001, "[/IMG]": 1002, "<image>": 1003, "[gIMG]": 1004, "[VIDEO]": 1007, "<grounding>": 1008,
    "<phrase>": 1009, "</phrase>": 1010, "<object>": 1011, "</object>": 1012, "</delimiter_of_multi_objects/>": 1013,
    **{f"<patch_index_{i:04d}>": 1015 + i for i in range(225)}, "[USER]": 1272, "[ASSISTANT]": 1273,
}  # fmt: skip
VIDEOS = {"mp4": ("mp4", "libx264"), "webm": ("webm", "libvpx")}


def _load(name: str) -> dict[str, Any]:
    golden: dict[str, Any] = json.loads((GOLDEN / f"{name}.json").read_text(encoding="utf-8"))
    return golden


def _member(name: str, number: int, what: dict[str, Any]) -> bytes:
    extension = name.rpartition(".")[2]
    if "frames" in what:
        container, codec = VIDEOS[extension]
        return media.video(what["frames"], container, codec)
    return media.picture("PNG" if extension == "png" else "JPEG", tuple(what["size"]), seed=number)


def _config(golden: dict[str, Any], make_config: Callable[..., Config]) -> Config:
    config = make_config()
    for key, value in golden["settings"].items():
        section, field = key.split(".")
        value = tuple(value) if isinstance(value, list) else value
        part = replace(getattr(config, section), **{field: value})
        config = replace(config, **{section: part})
    decoder = replace(config.model.decoder, vocab_size=1274 if golden["chat_vocabulary"] else 1272)
    return replace(config, model=replace(config.model, decoder=decoder))


def _visual(visual: Any, files: dict[str, bytes]) -> dict[str, Any]:
    """A part of a built sample as the files write it."""
    from emu2_megatron.data.visuals import BoxPicture, EncodedPicture, EncodedVideo

    if isinstance(visual, BoxPicture):
        return {"box": list(visual.box_xyxy)}
    assert isinstance(visual, EncodedPicture | EncodedVideo)
    (name,) = [name for name, data in files.items() if data == visual.data]
    if isinstance(visual, EncodedVideo):
        return {"video": name, "frames": list(visual.frames)}
    return {"picture": name}


@pytest.mark.parametrize("name", NAMES)
def test_built_sample(name: str, example_data: Path, make_config: Callable[..., Config]) -> None:
    from emu2_megatron.data.samples import build_sample

    golden = _load(f"sequences/{name}")
    files = {member: _member(member, i, what) for i, (member, what) in enumerate(golden["files"].items())}
    tokenizer = Tokenizer(example_data / "tokenizer.model", chat=golden["chat_vocabulary"])
    raw = RawSample(name, golden["sample"], files)
    sample = build_sample(raw, tokenizer, _config(golden, make_config), epoch=0, index=0)
    assert sample.tokens_S.dtype == "int64" and sample.roles_S.dtype == "uint8"
    assert sample.tokens_S.tolist() == golden["tokens"]
    assert sample.roles_S.tolist() == golden["roles"]
    assert [_visual(visual, files) for visual in sample.visuals] == golden["visuals"]
    assert list(sample.queries) == golden["queries"]


@pytest.mark.parametrize("name", NAMES)
def test_tokens_are_what_the_readable_line_says(name: str, example_data: Path) -> None:
    """The line that a person compares with the paper, and the ids: through SentencePiece alone."""
    golden = _load(f"sequences/{name}")
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(example_data / "tokenizer.model"))
    ids: list[int] = []
    line = golden["readable"]
    for text, word, count in re.findall(r"“([^”]*)”|(\S+?)(?:\*(\d+))?(?:\s|$)", line):
        if word:
            ids += [{"<s>": 1, "</s>": 2, **ADDED}[word]] * int(count or 1)
        else:
            ids += pieces.encode(text)
    assert ids[: golden["settings"]["data.sequence_length"]] == golden["tokens"]
    assert ("“" in line) and (golden["chat_vocabulary"] == ("[USER]" in line))


@pytest.mark.parametrize("name", NAMES)
def test_files_agree_with_themselves(name: str) -> None:
    golden = _load(f"sequences/{name}")
    tokens, roles = golden["tokens"], golden["roles"]
    assert len(tokens) == len(roles) <= golden["settings"]["data.sequence_length"]
    visual = [token in (ADDED["<image>"], ADDED["[gIMG]"]) for token in tokens]
    assert [bool(role & 1) for role in roles] == visual
    assert sum(golden["queries"]) == sum(visual)
    assert len(golden["queries"]) == sum(len(visual.get("frames", [0])) for visual in golden["visuals"])
    assert roles[0] == 32 and not any(role & 32 for role in roles[1:])
    assert (tokens[-1] == 2) != name.endswith("_cut")


def test_every_kind_has_a_file() -> None:
    assert {_load(f"sequences/{name}")["sample"]["kind"] for name in NAMES} == KINDS


def test_targets_of_the_packed_row() -> None:
    golden = _load("packed_row")
    tokens, roles = torch.tensor([golden["tokens"]]), torch.tensor([golden["roles"]], dtype=torch.uint8)
    got = targets(tokens, roles)
    assert got.text_labels_SB.flatten().tolist() == golden["text_labels"]
    assert got.text_mask_SB.flatten().tolist() == golden["text_mask"]
    slots = torch.full((len(golden["tokens"]), 1), -1)
    slots[golden["visual_positions"], 0] = torch.arange(len(golden["visual_positions"]))
    assert got.visual_slots_SB.tolist() == slots.tolist()
    assert got.visual_rows_R.tolist() == golden["visual_rows"]
    assert got.predictor_positions_T.tolist() == golden["predictor_positions"]
    assert got.predicted_rows_T.tolist() == golden["predicted_rows"]


def test_packed_row_is_its_samples_and_padding() -> None:
    golden = _load("packed_row")
    samples = [_load(f"sequences/{name}") for name in golden["samples"]]
    room = golden["sequence_length"] - sum(len(sample["tokens"]) for sample in samples)
    assert golden["tokens"] == sum((sample["tokens"] for sample in samples), []) + [ADDED["[PAD]"]] * room
    assert golden["roles"] == sum((sample["roles"] for sample in samples), []) + [32 + 64] + [64] * (room - 1)
    assert golden["queries"] == sum((sample["queries"] for sample in samples), [])
