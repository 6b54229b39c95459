"""Continue prompts: with text, or with the visual embeddings of a picture.

Called by all ranks together; every rank gets the result.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from emu2_megatron.config.schema import VisualDecoderConfig
from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.inference.model import InferenceModel, Prompt
from emu2_megatron.inference.prompt import encode
from emu2_megatron.inference.search import Options, search
from emu2_megatron.model.visual_decoder import null_embeddings
from emu2_megatron.parallel import topology
from emu2_megatron.platform.device import device
from emu2_megatron.platform.precision import DTYPES

EOS = 2
"""`</s>` of every tokenizer of Emu2."""


@torch.inference_mode()
def generate(model: InferenceModel, prompts: Sequence[Prompt], options: Options) -> list[list[int]]:
    """The new tokens of each prompt, without `</s>`.

    Args:
        model: of this rank.
        prompts: one batch, of any lengths; the same on all ranks.
        options: the same on all ranks.
    """
    if not prompts:
        return []
    cache, hidden_BD = model.begin(prompts, options.max_new_tokens)
    # The last stage searches; the others follow what it says.
    state = search(options, len(prompts), EOS, device())
    # In a row for each sequence: the token it reads next, whose continuation it is, whether that was all.
    choice = torch.empty(len(prompts) * state.beams, 3, dtype=torch.long, device=device())
    moves = False
    while True:
        if model.here.last_stage:
            logits_BV = model.logits(hidden_BD)
            if not moves:
                logits_BV = logits_BV.repeat_interleave(state.beams, 0)
            tokens_B, parents_B = state.step(logits_BV)
            if model.here.pp_size > 1:
                choice[:, 0] = tokens_B
                choice[:, 1] = 0 if parents_B is None else parents_B
                choice[:, 2] = state.done
        if model.here.pp_size > 1:
            tokens_B, parents_B, done_B = model.from_last_stage(choice).unbind(1)
            state.done = bool(done_B[0])
        if state.done:
            return _from_last_stage(model, state.answers() if model.here.last_stage else [])
        if state.beams > 1:
            if not moves:
                cache.repeat(state.beams)
            assert parents_B is not None
            cache.reorder(parents_B)
        moves = True
        hidden_BD = model.read_tokens(tokens_B, cache)


@torch.inference_mode()
def generate_image(model: InferenceModel, prompts: Sequence[Prompt], image_begin: int) -> Tensor:
    """The visual embeddings of a picture after each prompt, [B, Q, E], each read again before the next is regressed.

    Args:
        model: of this rank.
        prompts: without the `[IMG]` of the picture wanted.
        image_begin: the id of `[IMG]`.
    """
    queries = model.config.model.image_queries
    prompts = [
        Prompt([*prompt.tokens, image_begin], [*prompt.visual, False], prompt.pictures, prompt.queries)
        for prompt in prompts
    ]
    cache, hidden_BD = model.begin(prompts, queries - 1)
    regressed = [model.regress(hidden_BD)]
    while len(regressed) < queries:
        regressed.append(model.regress(model.read_embeddings(regressed[-1], cache)))
    return torch.stack(regressed, 1)


@torch.inference_mode()
def conditions(
    model: InferenceModel,
    prompts: Sequence[Prompt],
    again: Sequence[bool],
    tokenizer: Tokenizer,
    decoder: VisualDecoderConfig,
    batch_size: int = 8,
) -> tuple[Tensor, Tensor]:
    """What the visual decoder paints for each prompt, and what guidance leads away from: Emu2-Gen's two modes.

    A picture to be painted again (autoencoding) has the encoder's embeddings of it, away from those of no picture. Any
    other prompt (generation) has what the language model regresses after it, away from what it regresses after
    `<s>[IMG]`.

    Args:
        model: of this rank.
        prompts: without the `[IMG]` of the picture wanted.
        again: which of them are a picture to be painted again; `prompt.is_picture` says which those are by default.
        tokenizer: the model's.
        decoder: says what stands for no picture.
        batch_size: prompts that the language model continues at once.

    Returns:
        Two tensors [B, Q, E], on the CPU. Pictures to be painted again have theirs on the first stage only, which rank
        0 is on.
    """
    shape = len(prompts), model.config.model.image_queries, model.config.model.encoder.hidden_size
    embeddings_BQE, null_BQE = torch.zeros(2, *shape, dtype=DTYPES[model.config.training.precision])
    again_B = torch.tensor(again, dtype=torch.bool)
    if not again_B.all():
        asked = [prompt for prompt, painted in zip(prompts, again, strict=True) if not painted]
        asked.append(encode([""], tokenizer, model.config.model))
        batches = [asked[i : i + batch_size] for i in range(0, len(asked), batch_size)]
        regressed = torch.cat([generate_image(model, batch, tokenizer.image_begin).cpu() for batch in batches])
        embeddings_BQE[~again_B], null_BQE[~again_B] = regressed[:-1], regressed[-1]
    if again_B.any() and model.encoder is not None:
        seen = [prompt for prompt, painted in zip(prompts, again, strict=True) if painted]
        rows_RE = model.encode([p.pictures[0] for p in seen], [p.queries[0] for p in seen]).cpu()
        embeddings_BQE[again_B] = rows_RE.view(len(seen), *shape[1:])
        null_BQE[again_B] = null_embeddings(decoder, model.encoder, shape[1]).cpu()
    return embeddings_BQE, null_BQE


def _from_last_stage(model: InferenceModel, answers: list[list[int]]) -> list[list[int]]:
    if model.here.pp_size == 1:
        return answers
    box = [answers]
    stages = topology.pipeline()
    dist.broadcast_object_list(box, stages.last, group=stages.group)
    return box[0]
