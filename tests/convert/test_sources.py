"""Everything weights come in, and every way in which it can be wrong."""

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch
import weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from emu2_megatron.config.schema import ModelConfig
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.huggingface import open_tokenizer
from emu2_megatron.convert.places import Scratch
from emu2_megatron.convert.sources import Released
from emu2_megatron.errors import ConversionError
from emu2_megatron.model.eva_vit import resize_positions
from emu2_megatron.model.parameters import fresh, released_shapes

MODEL = weights.shallow(1)


def read(released: Released) -> dict[str, Tensor]:
    return {name: released.read(name, Scratch()).clone() for name in released_shapes(released.model)}


def assert_equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("kind", ["bin", "safetensors"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_folders(tmp_path: Path, kind: str, dtype: torch.dtype) -> None:
    """Shards with an index, fused biases, rotary frequencies that are not looked at; the model from config.json."""
    native = weights.native(MODEL, dtype)
    weights.folder(tmp_path / "hf", weights.hugging_face(native), kind, 3, weights.config_json(MODEL))
    released = from_hf.whole(tmp_path / "hf")
    assert replace(released.model, preset="emu2_tiny") == MODEL
    assert_equal(read(released), native)


def test_split_biases_in_a_folder(tmp_path: Path) -> None:
    native = weights.native(MODEL)
    named = {name if name.startswith("project") else f"model.{name}": tensor for name, tensor in native.items()}
    weights.folder(tmp_path / "hf", named, "safetensors", 2, weights.config_json(MODEL))
    assert_equal(read(from_hf.whole(tmp_path / "hf")), native)


@pytest.mark.parametrize(
    "file", ["Emu2_pytorch_model.bf16.bin", "Emu2-Chat_pytorch_model.bf16.pth", "native.safetensors"]
)
def test_native_files(tmp_path: Path, file: str) -> None:
    native = weights.native(MODEL, torch.bfloat16)
    (save_file if file.endswith("safetensors") else torch.save)(native, tmp_path / file)  # type: ignore[operator]
    assert_equal(read(from_hf.whole(tmp_path / file, MODEL)), native)


def test_emu2_gen(tmp_path: Path) -> None:
    """Its native file, with decoder of pictures and all, and its folder in diffusers' layout."""
    native = weights.native(MODEL, torch.bfloat16)
    other = {f"{part}.weight": torch.zeros(3) for part in ("unet.conv_in", "vae.encoder", "safety_checker.head")}
    save_file({f"multimodal_encoder.{name}": t for name, t in native.items()} | other, tmp_path / "gen.safetensors")
    assert_equal(read(from_hf.whole(tmp_path / "gen.safetensors", MODEL)), native)
    hf = weights.hugging_face(native)
    weights.folder(tmp_path / "gen" / "multimodal_encoder", hf, "safetensors", 2, weights.config_json(MODEL))
    index = tmp_path / "gen" / "multimodal_encoder" / "model.safetensors.index.json"
    index.rename(index.with_name("model.safetensors.index.bf16.json"))
    (tmp_path / "gen" / "tokenizer").mkdir()
    (tmp_path / "gen" / "tokenizer" / "tokenizer.model").write_bytes(weights.TOKENIZER.read_bytes())
    assert_equal(read(from_hf.whole(tmp_path / "gen")), native)
    assert from_hf.find_tokenizer(tmp_path / "gen") == tmp_path / "gen" / "tokenizer" / "tokenizer.model"


def eva_file(native: dict[str, Tensor], side: int) -> dict[str, Tensor]:
    """EVA-CLIP's file: both towers, final norm and head, a position table for another size."""
    table = torch.randn(1, 1 + side * side, native["visual.pos_embed"].shape[2])
    return {
        **{name: tensor for name, tensor in native.items() if name.startswith("visual.")},
        "visual.pos_embed": table, "visual.norm.weight": torch.ones(3), "visual.head.weight": torch.ones(3),
        "text.transformer.weight": torch.ones(3), "logit_scale": torch.tensor(4.6),
    }  # fmt: skip


@pytest.mark.parametrize("wrapped", [False, True])
def test_starting_points(tmp_path: Path, wrapped: bool) -> None:
    """LLaMA without the added tokens and EVA-CLIP for smaller pictures become Emu2 before its first step."""
    native = weights.native(MODEL)
    rows = MODEL.decoder.vocab_size - 272
    llama = {name.removeprefix("decoder.lm."): t for name, t in native.items() if name.startswith("decoder.lm.")}
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        llama[name] = llama[name][:rows].clone()
    llama["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(16)
    weights.folder(tmp_path / "llama", llama, "bin", 2)
    eva = eva_file(native, 2)
    torch.save({"module": eva} if wrapped else eva, tmp_path / "EVA02_CLIP_E_psz14_plus_s9B.pt")

    found = read(from_hf.parts(tmp_path / "llama", tmp_path / "EVA02_CLIP_E_psz14_plus_s9B.pt", MODEL, seed=5))
    wanted = dict(native)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        old = llama[name]
        wanted[f"decoder.lm.{name}"] = torch.cat([old, old.mean(0, keepdim=True).expand(272, -1)])
    wanted["visual.pos_embed"] = resize_positions(eva["visual.pos_embed"], 16)
    source = fresh(MODEL, 5, torch.device("cpu"))
    wanted |= {name: source(name) for name in ("project_up.weight", "project_down.weight")}
    assert_equal(found, wanted)


def test_a_trained_key_bias_is_dropped(tmp_path: Path) -> None:
    """It moves all scores of a query alike: the function stays the same."""
    native = weights.native(MODEL)
    hf = weights.hugging_face(native)
    width = MODEL.encoder.hidden_size
    hf["model.visual.blocks.0.attn.qkv.bias"][width : 2 * width] = 3.0
    weights.folder(tmp_path / "hf", hf, "safetensors", 1, weights.config_json(MODEL))
    assert_equal(read(from_hf.whole(tmp_path / "hf")), native)


# What can be wrong: (what is done to a sound folder, what the error says).


def _drop_shard(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").unlink()


def _cut_shard(folder: Path) -> None:
    path = folder / "model-00002-of-00003.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _no_header(folder: Path) -> None:
    (folder / "model-00002-of-00003.safetensors").write_bytes(b"not safetensors at all")


def _edit(change: Callable[[dict[str, Tensor]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = folder / "model-00002-of-00003.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)

    return edit


def _without_first(tensors: dict[str, Tensor]) -> None:
    tensors.pop(min(tensors))


def _wider(tensors: dict[str, Tensor]) -> None:
    name = min(name for name in tensors if name.endswith("weight") and tensors[name].dim() == 2)
    tensors[name] = torch.zeros(3, 3)


def _broken_index(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text("{")


def _config(**changes: object) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text()) | changes
        content = {key: value for key, value in content.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(content))

    return edit


def _drop_config(folder: Path) -> None:
    (folder / "config.json").unlink()


@pytest.mark.parametrize(("damage", "says"), [
    (_drop_shard, r"model-00002-of-00003\.safetensors is missing, .*index\.json lists it \(1 of 3 shards\)"),
    (_cut_shard, r"model-00002-of-00003\.safetensors is no whole safetensors file .*copy it again"),
    (_no_header, r"model-00002-of-00003\.safetensors is no whole safetensors file"),
    (_edit(lambda tensors: tensors.update(surplus=torch.zeros(2))), r"00002.*: surplus is too many \(1 in all\)"),
    (_edit(_without_first), r"00002.* has no model\..*, which the index of .* says: copy both again"),
    (_edit(_wider), r"00002.*: decoder\.lm\..* has shape \[3, 3\], the model wants"),
    (_broken_index, r"index\.json is no index of shards: copy it again"),
    (_config(vocab_size=1274), r"the vocabulary has 1272 rows .* the model 1274: set model\.decoder\.vocab_size"),
    (_config(vocab_size=1270), r"the vocabulary has 1272 rows .* the model 1270"),
    (_config(num_key_value_heads=1), r"config\.json: num_key_value_heads is 1, Emu2 has 4"),
    (_config(vision_config=...), r"config\.json is no config\.json of Emu2: it has no vision_config"),
    (_config(num_hidden_layers=2), r"decoder\.lm\.model\.layers\.1\..* is missing"),
    (_drop_config, r"config\.json: No such file or directory; native files have none: give --config"),
])  # fmt: skip
def test_errors_name_thing_place_and_remedy(tmp_path: Path, damage: Callable[[Path], None], says: str) -> None:
    hf = weights.hugging_face(weights.native(MODEL))
    folder = weights.folder(tmp_path / "hf", hf, "safetensors", 3, weights.config_json(MODEL))
    damage(folder)
    with pytest.raises(ConversionError, match=says) as error:
        from_hf.whole(folder)
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_no_code_runs_from_a_file(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return Path.mkdir, (tmp_path / "made",)

    torch.save({"x": Evil()}, tmp_path / "evil.bin")
    with pytest.raises(ConversionError, match=r"evil\.bin is no whole file of tensors that torch wrote"):
        from_hf.whole(tmp_path / "evil.bin", MODEL)
    assert not (tmp_path / "made").exists()


def test_there_is_nothing(tmp_path: Path) -> None:
    with pytest.raises(ConversionError, match="is not there: give a folder"):
        from_hf.whole(tmp_path / "nowhere", MODEL)
    with pytest.raises(ConversionError, match="has no weights"):
        from_hf.whole(tmp_path, MODEL)
    for name in ("a.bin", "b.bin"):
        torch.save({}, tmp_path / name)
    with pytest.raises(ConversionError, match="has 2 files .* and no index"):
        from_hf.whole(tmp_path, MODEL)


def test_parts_of_several_dtypes(tmp_path: Path) -> None:
    native = weights.native(MODEL)
    native["decoder.lm.model.layers.0.self_attn.k_proj.weight"] = torch.zeros(128, 128, dtype=torch.float16)
    save_file(native, tmp_path / "native.safetensors")
    released = from_hf.whole(tmp_path / "native.safetensors", MODEL)
    with pytest.raises(ConversionError, match=r"k_proj.* are of several dtypes.*: give --dtype"):
        from_hf.write(released, tmp_path / "checkpoint", None)
    from_hf.write(released, tmp_path / "checkpoint", None, torch.bfloat16)


def _pieces(count: int) -> bytes:
    """A SentencePiece model of so many meaningless pieces, with LLaMA's control ids, written by hand as protobuf."""

    def field(number: int, content: bytes) -> bytes:
        return bytes([number << 3 | 2, len(content)]) + content

    pieces = [(b"<unk>", 2), (b"<s>", 3), (b"</s>", 3), *((b"x%d" % i, 1) for i in range(count - 3))]
    # repeated pieces = 1 {piece = 1, type = 3}; trainer_spec = 2 {model_type = 3: BPE}
    body = b"".join(field(1, field(1, text) + bytes([3 << 3, kind])) for text, kind in pieces)
    return body + field(2, bytes([3 << 3, 2]))


def test_tokenizers_that_are_not_llamas(tmp_path: Path) -> None:
    stranger = tmp_path / "tokenizer.model"
    stranger.write_bytes(_pieces(32000))
    assert sentencepiece.SentencePieceProcessor(model_file=str(stranger)).get_piece_size() == 32000
    with pytest.raises(ConversionError, match=r"is not LLaMA's tokenizer\.model: its SHA-256 is .* give LLaMA's"):
        open_tokenizer(stranger, ModelConfig(), released=True)
    assert open_tokenizer(stranger, ModelConfig(), released=False)[1] is False  # a model of one's own may have it
    with pytest.raises(ConversionError, match=r"32272 tokens \(32274 with Chat's two\), the vocabulary has 1272 rows"):
        open_tokenizer(stranger, weights.TINY, released=False)
    stranger.write_bytes(b"no tokenizer")
    with pytest.raises(ConversionError, match=re.escape(str(stranger)) + ": not a SentencePiece model"):
        open_tokenizer(stranger, weights.TINY, released=False)
    with pytest.raises(ConversionError, match="cannot read the tokenizer .*--tokenizer"):
        open_tokenizer(tmp_path / "none", weights.TINY, released=False)
