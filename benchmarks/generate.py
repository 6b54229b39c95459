"""Tokens a second of generation beside transformers' own `generate` on the same exported model, in one process.

A model with random weights is exported, and loaded by the engine and by transformers with the code of the export. Both
continue the same batch: a picture and a question in each prompt, of four lengths, padded on the left. Neither may end
early, so both generate as many tokens; encoding pictures and reading prompts count. That the tokens are the same is
checked first.

The RATIO is that of the slowest case: greedy, or five beams.
"""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import _common as common
import torch
from torch import Tensor

from emu2_megatron.config.presets import PRESETS
from emu2_megatron.convert import from_hf
from emu2_megatron.convert.to_hf import to_hf
from emu2_megatron.data.tokens import BASE_COUNT
from emu2_megatron.inference.generate import generate
from emu2_megatron.inference.load import find
from emu2_megatron.inference.model import InferenceModel, Prompt
from emu2_megatron.inference.search import Options
from emu2_megatron.model.parameters import released_shapes

LENGTHS = (12, 20, 28, 36)
"""Tokens of the questions."""


def export(preset: str, folder: Path) -> Path:
    """A folder with random weights, by way of a checkpoint."""
    from safetensors.torch import save_file

    draw = torch.Generator().manual_seed(0)
    model = PRESETS[preset]
    tensors = {
        name: torch.randn(shape, generator=draw) * 0.05 if len(shape) > 1 else torch.ones(shape)
        for name, shape in released_shapes(model).items()
    }
    save_file(tensors, folder / "native.safetensors")
    from_hf.write(from_hf.whole(folder / "native.safetensors", model), folder / "checkpoint", None)
    to_hf(folder / "checkpoint", folder / "hf", model, None)
    return folder / "hf"


def prompts(model: InferenceModel, image_token: int) -> tuple[list[Prompt], Tensor, Tensor, Tensor]:
    """The batch for the engine, and as transformers takes it: tokens, mask and pixels."""
    draw = torch.Generator().manual_seed(1)
    queries, size = model.config.model.image_queries, model.config.model.encoder.image_size
    longest = 1 + queries + max(LENGTHS)
    pixels = torch.randn(len(LENGTHS), 3, size, size, generator=draw)
    tokens, mask = torch.zeros(2, len(LENGTHS), longest, dtype=torch.long)
    batch = []
    for b, length in enumerate(LENGTHS):
        row = [1, *[image_token] * queries, *torch.randint(3, 1000, (length,), generator=draw).tolist()]
        batch.append(Prompt(row, [token == image_token for token in row], [pixels[b]], [queries]))
        tokens[b, longest - len(row) :] = torch.tensor(row)
        mask[b, longest - len(row) :] = 1
    return batch, tokens, mask, pixels


def measure(preset: str, new_tokens: int, rounds: int) -> dict[int, dict[str, list[float]]]:
    """Seconds of both, by beams."""
    from transformers import AutoModelForCausalLM

    os.environ["HF_HUB_OFFLINE"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        hf_folder = export(preset, Path(folder))
        pad = PRESETS[preset].decoder.vocab_size - BASE_COUNT  # the first added token; the others follow from it
        hf: Any = AutoModelForCausalLM.from_pretrained(hf_folder, trust_remote_code=True, pad_token_id=pad)
        model = find(folder=hf_folder).load()
    hf.to(next(model.stage.parameters()).device)
    batch, *inputs = prompts(model, hf.config.image_token_id)
    tokens, mask, pixels = (tensor.to(hf.device) for tensor in inputs)
    seconds = {}
    for beams in (1, 5):
        options = Options(beams=beams, max_new_tokens=new_tokens, min_new_tokens=new_tokens)

        def ours(options: Options = options) -> list[list[int]]:
            return generate(model, batch, options)

        def theirs(beams: int = beams) -> list[list[int]]:
            found: Tensor = hf.generate(
                tokens, mask, image=pixels, num_beams=beams, max_new_tokens=new_tokens, min_len=new_tokens
            )
            return found.tolist()  # type: ignore[no-any-return]

        same = ours() == theirs()
        print(f"beams {beams}: {'the same tokens' if same else 'OTHER TOKENS'}")
        if not same:
            raise SystemExit(1)
        seconds[beams] = common.timed({"ours": ours, "theirs": theirs}, rounds)
    return seconds


def main() -> int:
    parser = common.arguments(__doc__, rounds=7)
    parser.add_argument(
        "--preset", choices=("emu2_tiny", "emu2_small"), default="emu2_small", help="default emu2_small"
    )
    parser.add_argument("--new-tokens", type=int, default=32, help="of each answer (default 32)")
    parser.add_argument("--threads", type=int, default=1, help="default 1: products of a few rows")
    options = parser.parse_args()
    print(
        f"{options.preset}, fp32, one process, {options.threads} threads: {len(LENGTHS)} prompts with a picture and "
        f"{LENGTHS[0]} to {LENGTHS[-1]} tokens, {options.new_tokens} new ones each"
    )
    seconds = common.on_ranks(1, options.threads, measure, options.preset, options.new_tokens, options.rounds)
    ratios = []
    for beams, of in seconds.items():
        made = len(LENGTHS) * options.new_tokens
        speed = {name: made / sorted(times)[len(times) // 2] for name, times in of.items()}
        ratios.append(common.quotient(of["theirs"], of["ours"]))
        print(
            f"beams {beams}: {speed['ours']:.1f} tokens/s, transformers {speed['theirs']:.1f}: {ratios[-1]:.2f} times"
        )
    return common.report([("generate_speed", min(ratios), 1.0)])


if __name__ == "__main__":
    sys.exit(main())
