"""Continue prompts: with text, or with the visual embeddings of a picture.

Called by all ranks together; every rank gets the result.
"""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from emu2_megatron.inference.model import InferenceModel, Prompt
from emu2_megatron.inference.search import Options, search
from emu2_megatron.parallel import topology
from emu2_megatron.platform.device import device

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


def _from_last_stage(model: InferenceModel, answers: list[list[int]]) -> list[list[int]]:
    if model.here.pp_size == 1:
        return answers
    box = [answers]
    stages = topology.pipeline()
    dist.broadcast_object_list(box, stages.last, group=stages.group)
    return box[0]
