"""Trains a small SentencePiece tokenizer in LLaMA's manner, for models too small for LLaMA's 32000 pieces.

    python tools/train_tokenizer.py --input examples/data --output examples/data/tokenizer.model --vocab-size 1000

reads every `*.txt`, `*.jsonl` (field `caption`) and `interleaved/*.json` (texts) below the inputs. BPE with byte
fallback, `<unk>` `<s>` `</s>` = 0 1 2, digits split, text not normalised. The same input gives the same file.
"""

import argparse
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path

import sentencepiece


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", required=True, help="folders or files with text")
    parser.add_argument("--output", type=Path, required=True, help="the model file to write")
    parser.add_argument("--vocab-size", type=int, default=1000, help="pieces, bytes and control pieces included")
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.999,
        help="share of the text's characters that get a piece; the rest is spelled in bytes. With much English and "
        "little Chinese, 0.999 keeps Latin letters and leaves Chinese to bytes: it would fill the vocabulary",
    )
    options = parser.parse_args(arguments)
    lines = [line for root in options.input for path in _files(root) for line in _lines(path)]
    if not lines:
        print(f"error: no text below {', '.join(map(str, options.input))}", file=sys.stderr)
        return 1
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_bytes(train(lines, options.vocab_size, options.character_coverage))
    print(f"{options.output}: {options.vocab_size} pieces from {len(lines)} lines")
    return 0


def train(lines: list[str], vocab_size: int, character_coverage: float) -> bytes:
    """A SentencePiece model, serialised, with LLaMA's settings but for vocabulary and coverage."""
    model = io.BytesIO()
    sentencepiece.set_random_generator_seed(0)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=vocab_size,
        character_coverage=character_coverage,
        byte_fallback=True,
        split_digits=True,
        allow_whitespace_only_pieces=True,
        remove_extra_whitespaces=False,
        normalization_rule_name="identity",
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        max_sentence_length=1 << 20,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def _files(root: Path) -> list[Path]:
    if root.is_file():
        return [root]
    patterns = ("**/*.txt", "**/*.jsonl", "**/interleaved/*.json")
    return sorted(path for pattern in patterns for path in root.glob(pattern))


def _lines(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        yield from (json.loads(line)["caption"] for line in text.splitlines() if line.strip())
    elif path.suffix == ".json":
        yield from (part["text"] for part in json.loads(text)["content"] if part["type"] == "text")
    else:
        yield from (line for line in text.splitlines() if line.strip())


if __name__ == "__main__":
    sys.exit(main())
