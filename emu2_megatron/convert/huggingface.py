"""The small files of a Hugging Face folder: `config.json` both ways, generation config, tokenizer, model card."""

import hashlib
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

import sentencepiece
import torch

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.config.schema import DecoderConfig, EncoderConfig, ModelConfig
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.data.tokens import ADDED_TOKENS, BASE_COUNT, CHAT_COUNT
from emu2_megatron.errors import ConversionError, DataError

Json = dict[str, Any]

CODE = ("configuration_emu.py", "modeling_emu.py")
"""Files of `hf_code/` that travel with an export."""

LLAMA_PIECES = 32000
LLAMA_SHA256 = "9e556afd44213b6bd1be2b850ebbbd98f5481437a8021afaf58ee7fb1818d347"
"""Of LLaMA's `tokenizer.model`, which the released models come with too."""

_TORCH_DTYPES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}

# Key of config.json to field, for what is spelled differently. The rest of config.json is the same for all models.
_DECODER = {
    "num_hidden_layers": "num_layers",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "intermediate_size": "ffn_hidden_size",
    "vocab_size": "vocab_size",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "layernorm_epsilon",
    "rope_theta": "rotary_base",
    "initializer_range": "init_method_std",
}
_VISION = {
    "image_size": "image_size",
    "patch_size": "patch_size",
    "layers": "num_layers",
    "width": "hidden_size",
    "intermediate_size": "ffn_hidden_size",
    "layer_norm_eps": "layernorm_epsilon",
}


def config_json(model: ModelConfig, dtype: torch.dtype, chat: bool, pad_token: int) -> Json:
    """The content of `config.json`, with the released keys."""
    encoder, decoder = model.encoder, model.decoder
    vision = {key: getattr(encoder, name) for key, name in _VISION.items()}
    vision |= {
        "head_width": encoder.hidden_size // encoder.num_attention_heads,
        "mlp_ratio": encoder.ffn_hidden_size / encoder.hidden_size,
        "n_query": model.image_queries,
        "v_query": model.frame_queries,
        "eva_model_name": "eva-clip-E-14-plus",
        "drop_path_rate": 0,
        "postnorm": True,
        "qkv_bias": True,
        "xattn": False,
    }
    content = {key: getattr(decoder, name) for key, name in _DECODER.items()}
    return content | {
        "architectures": ["EmuForCausalLM"],
        "auto_map": {
            "AutoConfig": "configuration_emu.EmuConfig",
            "AutoModelForCausalLM": "modeling_emu.EmuForCausalLM",
        },
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": pad_token,
        "d_model": encoder.hidden_size,
        "hidden_act": "silu",
        "model_version": "chat" if chat else "base",
        "num_key_value_heads": decoder.num_attention_heads,
        "pretraining_tp": 1,
        "tie_word_embeddings": False,
        "torch_dtype": _TORCH_DTYPES[dtype],
        "use_cache": True,
        "vision_config": vision,
    }


def model_of(path: Path) -> ModelConfig:
    """The model that a folder's `config.json` describes.

    Raises:
        ConversionError: the file is missing, lacks a key, or describes a model that is built differently.
    """
    try:
        content = json.loads(path.read_text())
        vision = content["vision_config"]
        decoder = DecoderConfig(**{name: content[key] for key, name in _DECODER.items()})
        heads = vision["width"] // vision["head_width"]
        encoder = EncoderConfig(**{name: vision[key] for key, name in _VISION.items()}, num_attention_heads=heads)
        model = ModelConfig(
            encoder=encoder, decoder=decoder, image_queries=vision["n_query"], frame_queries=vision["v_query"]
        )
    except OSError as error:
        raise ConversionError(f"{path}: {error.strerror}; native files have none: give --config") from error
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ConversionError(f"{path} is no config.json of Emu2 ({error})") from error
    except KeyError as error:
        raise ConversionError(f"{path} is no config.json of Emu2: it has no {error.args[0]}") from error
    for key, only in (("num_key_value_heads", decoder.num_attention_heads), ("attention_bias", False),
                      ("tie_word_embeddings", False), ("rope_scaling", None), ("hidden_act", "silu")):  # fmt: skip
        if content.get(key, only) != only:
            raise ConversionError(f"{path}: {key} is {content[key]!r}, Emu2 has {only!r}")
    if not vision.get("postnorm", True):
        raise ConversionError(f"{path}: vision_config.postnorm is false, Emu2's encoder is post-norm")
    return named(model)


def named(model: ModelConfig) -> ModelConfig:
    """With the name of the preset that it is, or that has as many tokens more than LLaMA."""
    for name, preset in PRESETS.items():
        if replace(model, preset=name) == preset:
            return preset
    chat = PRESETS["emu2_chat_37b"]
    return replace(model, preset=chat.preset if model.decoder.vocab_size == chat.decoder.vocab_size else "emu2_37b")


def open_tokenizer(path: Path, model: ModelConfig, released: bool) -> tuple[Tokenizer, bool]:
    """A model's tokenizer, and whether it is Emu2-Chat's.

    Args:
        path: a SentencePiece file.
        model: must have a row for every token, and no more.
        released: the weights are the released ones or LLaMA's, whose rows belong to LLaMA's own 32000 pieces.

    Raises:
        ConversionError: it is not LLaMA's, or the vocabulary does not fit.
    """
    rows = model.decoder.vocab_size
    try:
        both = Tokenizer(path), Tokenizer(path, chat=True)
    except DataError as error:
        raise ConversionError(f"{error}; give LLaMA's as --tokenizer") from error
    for tokenizer in both:
        if tokenizer.vocab_size == rows:
            if released and rows - LLAMA_PIECES in (BASE_COUNT, CHAT_COUNT):
                _is_llamas(path)
            return tokenizer, tokenizer is both[1]
    raise ConversionError(
        f"{path}: {both[0].vocab_size} tokens ({both[1].vocab_size} with Chat's two), the vocabulary has {rows} rows: "
        "give the tokenizer that the model was trained with as --tokenizer"
    )


def _is_llamas(path: Path) -> None:
    found = hashlib.sha256(path.read_bytes()).hexdigest()
    if found != LLAMA_SHA256:
        raise ConversionError(
            f"{path} is not LLaMA's tokenizer.model: its SHA-256 is {found[:12]}..., LLaMA's {LLAMA_SHA256[:12]}..., "
            "and the rows of the weights belong to LLaMA's pieces; give LLaMA's as --tokenizer"
        )


def tokenizer_files(path: Path, chat: bool) -> dict[str, bytes]:
    """The files of a Hugging Face tokenizer: name to content.

    `tokenizer.json` is what transformers reads. It puts the dummy "▁" before every piece of text between added tokens,
    as LLaMA's `legacy` tokenizer does with which Emu2 was trained; what transformers 5 would make of `tokenizer.model`
    alone leaves it out where a text begins with a space.
    """
    model = sentencepiece.SentencePieceProcessor()
    model.load_from_serialized_proto(path.read_bytes())
    count = model.get_piece_size()
    names = [name for name, _ in ADDED_TOKENS[: CHAT_COUNT if chat else BASE_COUNT]]
    added = {name: count + i for i, name in enumerate(names)}
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": True,
        "add_eos_token": False,
        "bos_token": "<s>",
        "eos_token": "</s>",
        "unk_token": "<unk>",
        "pad_token": "[PAD]",
        "padding_side": "left",
        "truncation_side": "left",
        "clean_up_tokenization_spaces": False,
        "legacy": True,
        "model_max_length": int(1e30),
        "sp_model_kwargs": {},
    }
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "[PAD]",
               "additional_special_tokens": names[1:]}  # fmt: skip
    return {
        "tokenizer.model": path.read_bytes(),
        "tokenizer.json": to_text(_fast_tokenizer(model, added)),
        "tokenizer_config.json": to_text(config),
        "added_tokens.json": to_text(added),
        "special_tokens_map.json": to_text(special),
    }


def _fast_tokenizer(model: sentencepiece.SentencePieceProcessor, added: dict[str, int]) -> Json:
    vocab = {model.id_to_piece(i): i for i in range(model.get_piece_size())}
    controls = {model.id_to_piece(i): i for i in range(3)}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {"id": i, "content": name, "single_word": False, "lstrip": False, "rstrip": False, "normalized": False,
             "special": True}
            for name, i in (controls | added).items()
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                     {"SpecialToken": {"id": "<s>", "type_id": 1}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": vocab,
            "merges": _merges(model, vocab),
        },
    }  # fmt: skip


def _merges(model: sentencepiece.SentencePieceProcessor, vocab: dict[str, int]) -> list[str]:
    """Pairs of pieces that make a piece, the first merged first.

    SentencePiece merges the pair whose result has the highest score; of equal scores, the leftmost. Its scores fall
    with the id. BPE by rules merges the pair that is listed first, so all pairs are listed by their result.
    """
    found = []
    for piece, i in vocab.items():
        if model.is_control(i) or model.is_unknown(i) or model.is_byte(i):
            continue
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in vocab and right in vocab:
                found.append((-model.get_score(i), vocab[left], vocab[right], f"{left} {right}"))
    return [pair for *_, pair in sorted(found)]


def generation_config(pad_token: int) -> Json:
    """The content of `generation_config.json`: greedy unless `generate` is told otherwise."""
    return {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": pad_token, "do_sample": False}


def code_files() -> dict[str, bytes]:
    """The Python files that transformers loads with `trust_remote_code=True`."""
    folder = files("emu2_megatron.convert") / "hf_code"
    return {name: (folder / name).read_bytes() for name in CODE}


def model_card(model: ModelConfig, parameters: int, dtype: torch.dtype, chat: bool, source: str) -> bytes:
    """`README.md`."""
    kind = "Emu2-Chat" if chat else "Emu2"
    prompt = "[<IMG_PLH>]What is in the picture?" if chat else "[<IMG_PLH>]Describe the image in details:"
    return f"""---
library_name: transformers
pipeline_tag: image-text-to-text
tags:
- emu2
- multimodal
- custom_code
---

# {kind}, {parameters / 1e9:.3g} B parameters

A model of the {kind} architecture ([arXiv 2312.13286](https://arxiv.org/abs/2312.13286)): a visual encoder of
{model.encoder.num_layers} layers makes {model.image_queries} embeddings of a {model.encoder.image_size} x \
{model.encoder.image_size} picture, and a decoder of {model.decoder.num_layers}
layers reads them among text and predicts text or the next visual embedding. Exported by emu2_megatron from
`{source}`, in {_TORCH_DTYPES[dtype]}.

**To be written by whoever publishes this:** data, intended use, limits, licence.

```python
import torch
from PIL import Image
from transformers import AutoModelForCausalLM, AutoTokenizer

folder = "."
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.{_TORCH_DTYPES[dtype]})

inputs = model.build_input_ids(["{prompt}"], tokenizer, image=[Image.open("picture.jpg")])
print(tokenizer.batch_decode(model.generate(**inputs, max_new_tokens=64), skip_special_tokens=True))

embeddings = model.generate_image(["An oil painting of a dog"], tokenizer)
print(embeddings.shape)  # [1, {model.image_queries}, {model.encoder.hidden_size}]
```

`conversion.json` has the SHA-256 of every file.
""".encode()


def to_text(content: Json) -> bytes:
    """JSON as Hugging Face's folders have it."""
    return (json.dumps(content, indent=2, ensure_ascii=False, sort_keys=False) + "\n").encode()
