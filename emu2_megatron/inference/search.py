"""Which token comes next: greedy, sampling, beam search, with transformers' semantics, on logits alone.

A search is told the logits of every sequence, step by step, and says which token each reads next, and, for beams, whose
continuation it is.

Shapes: B prompts, K beams, V vocabulary, T tokens so far.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from emu2_megatron.errors import ConfigError

_NEVER = -1e9
"""The score of what cannot be chosen; transformers' value."""


@dataclass(frozen=True)
class Options:
    """How text is generated. Names and meaning are transformers'."""

    max_new_tokens: int = 64
    """Tokens at most, `</s>` included."""
    min_new_tokens: int = 1
    """Tokens before `</s>` may come."""
    beams: int = 5
    """Beams; 1 is greedy, or sampling if there is a temperature."""
    length_penalty: float = -1.0
    """Beams: a finished answer's log-probability is divided by its length to this power. Below 0 favours short ones."""
    temperature: float = 0.0
    """0 takes the likeliest token; else one is drawn, from probabilities that this sharpens, or flattens (above 1)."""
    top_p: float = 1.0
    """Draw among the likeliest tokens that together have this probability."""
    top_k: int = 0
    """Draw among so many of the likeliest tokens; 0: all."""
    seed: int = 0
    """Of the draws."""

    def __post_init__(self) -> None:
        rules = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "min_new_tokens": (self.min_new_tokens >= 0, "0 or more"),
            "beams": (self.beams >= 1, "1 or more"),
            "length_penalty": (-100 <= self.length_penalty <= 100, "-100 to 100"),
            # Logits divided by less would be infinite, and what is drawn from them not a number.
            "temperature": (self.temperature == 0 or 1e-3 <= self.temperature < float("inf"), "0, or 0.001 and more"),
            "top_p": (0 < self.top_p <= 1, "above 0, up to 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
        }
        for name, (holds, legal) in rules.items():
            if not holds:
                raise ConfigError(f"{name}: {getattr(self, name)}; legal: {legal}")
        if self.temperature > 0 and self.beams > 1:
            raise ConfigError(f"beams: {self.beams} with a temperature; legal: 1, or temperature 0")


class Search(Protocol):
    """The state of a generation."""

    beams: int
    done: bool
    """Whether nothing more is wanted."""

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """Take logits fp32 [B * K, V]; the tokens [B * K] to read next, and the sequence [B * K] that each of them
        continues (None: each its own)."""
        ...

    def answers(self) -> list[list[int]]:
        """The tokens generated for each prompt, without `</s>`."""
        ...


def search(options: Options, prompts: int, eos: int, device: torch.device) -> Search:
    """What the options ask for."""
    if options.beams > 1:
        return Beams(options, prompts, eos, device)
    return OneEach(options, prompts, eos, device)


class OneEach:
    """Greedy, or sampling."""

    beams = 1

    def __init__(self, options: Options, prompts: int, eos: int, device: torch.device) -> None:
        self.options, self.eos, self.done = options, eos, False
        self._tokens: list[Tensor] = []
        self._ended_B = torch.zeros(prompts, dtype=torch.bool, device=device)
        self._draw = torch.Generator(device).manual_seed(options.seed)

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Search`."""
        if len(self._tokens) < self.options.min_new_tokens:
            logits = _without(logits, self.eos)
        if self.options.temperature > 0:
            tokens_B = torch.multinomial(probabilities(logits, self.options), 1, generator=self._draw)[:, 0]
        else:
            tokens_B = logits.argmax(-1)
        tokens_B = tokens_B.masked_fill(self._ended_B, self.eos)
        self._tokens.append(tokens_B)
        self._ended_B |= tokens_B == self.eos
        self.done = len(self._tokens) == self.options.max_new_tokens or bool(self._ended_B.all())
        return tokens_B, None

    def answers(self) -> list[list[int]]:
        """See `Search`."""
        return [_until(row, self.eos) for row in torch.stack(self._tokens, 1).tolist()]


def probabilities(logits_BV: Tensor, options: Options) -> Tensor:
    """What sampling draws from, [B, V]: temperature, then top-k, then top-p; the likeliest token always stays."""
    logits_BV = logits_BV / options.temperature
    if 0 < options.top_k < logits_BV.shape[-1]:
        least_B1 = logits_BV.topk(options.top_k).values[:, -1:]
        logits_BV = logits_BV.masked_fill(logits_BV < least_B1, -torch.inf)
    if options.top_p < 1:
        falling_BV, order_BV = logits_BV.sort(descending=True)
        chances_BV = falling_BV.softmax(-1)
        enough_BV = chances_BV.cumsum(-1) - chances_BV >= options.top_p  # those before it are enough
        enough_BV[:, 0] = False
        logits_BV = logits_BV.masked_fill(enough_BV.scatter(1, order_BV, enough_BV), -torch.inf)
    return logits_BV.softmax(-1)


class Beams:
    """Beam search as transformers has it, with `early_stopping=False`.

    2 K candidates a step leave K that go on even if K of them end. A prompt is done when its best running beam, scored
    at today's length, is worse than the worst of K finished ones.
    """

    def __init__(self, options: Options, prompts: int, eos: int, device: torch.device) -> None:
        self.options, self.eos, self.beams, self.done = options, eos, options.beams, False
        K = self.beams
        self._running_BKT = torch.zeros(prompts, K, 0, dtype=torch.long, device=device)
        self._running_scores_BK = torch.full((prompts, K), _NEVER, device=device)
        self._running_scores_BK[:, 0] = 0.0  # all beams begin alike: continue one of them
        self._best_BKT = torch.full((prompts, K, options.max_new_tokens), eos, device=device)
        self._best_scores_BK = torch.full((prompts, K), _NEVER, device=device)
        self._finished_BK = torch.zeros(prompts, K, dtype=torch.bool, device=device)
        self._hopeful_B1 = torch.ones(prompts, 1, dtype=torch.bool, device=device)
        self._first_BK = torch.arange(prompts, device=device)[:, None] * K

    def step(self, logits: Tensor) -> tuple[Tensor, Tensor | None]:
        """See `Search`."""
        (B, K, T), V = self._running_BKT.shape, logits.shape[-1]
        scores = logits.log_softmax(-1)
        if T < self.options.min_new_tokens:
            scores = _without(scores, self.eos)
        scores_BC, chosen_BC = (scores.view(B, K, V) + self._running_scores_BK[..., None]).flatten(1).topk(2 * K)
        parents_BC, tokens_BC = chosen_BC // V, chosen_BC % V
        texts_BCT = torch.cat([_rows(self._running_BKT, parents_BC), tokens_BC[..., None]], -1)
        last = T + 1 == self.options.max_new_tokens
        ends_BC = torch.ones_like(tokens_BC, dtype=torch.bool) if last else tokens_BC == self.eos

        # What goes on.
        self._running_scores_BK, goes_BK = (scores_BC + ends_BC * _NEVER).topk(K)
        self._running_BKT = _rows(texts_BCT, goes_BK)
        parents_BK = parents_BC.gather(1, goes_BK)

        # What has ended: only what is among the best K counts.
        ended_BC = ends_BC.clone()
        ended_BC[:, K:] = False
        final_BC = scores_BC / (T + 1) ** self.options.length_penalty
        final_BC = final_BC + (~self._hopeful_B1) * _NEVER + (~ended_BC) * _NEVER
        whole_BCT = torch.nn.functional.pad(texts_BCT, (0, self.options.max_new_tokens - T - 1), value=self.eos)
        self._best_scores_BK, kept_BK = torch.cat([self._best_scores_BK, final_BC], 1).topk(K)
        self._best_BKT = _rows(torch.cat([self._best_BKT, whole_BCT], 1), kept_BK)
        self._finished_BK = torch.cat([self._finished_BK, ended_BC], 1).gather(1, kept_BK)

        possible_B1 = self._running_scores_BK[:, :1] / (T + 1) ** self.options.length_penalty
        worst_BK = self._best_scores_BK.min(1, keepdim=True).values.where(self._finished_BK, _NEVER)
        self._hopeful_B1 &= (possible_B1 > worst_BK).any(-1, keepdim=True)
        self.done = last or not bool(self._hopeful_B1.any())
        return self._running_BKT[..., -1].flatten(), (self._first_BK + parents_BK).flatten()

    def answers(self) -> list[list[int]]:
        """See `Search`."""
        return [_until(row, self.eos) for row in self._best_BKT[:, 0].tolist()]


def _rows(of_BKT: Tensor, which_BC: Tensor) -> Tensor:
    """[B, C, T]."""
    return of_BKT.gather(1, which_BC[..., None].expand(-1, -1, of_BKT.shape[-1]))


def _without(scores: Tensor, token: int) -> Tensor:
    scores = scores.clone()
    scores[:, token] = -torch.inf
    return scores


def _until(tokens: list[int], eos: int) -> list[int]:
    return tokens[: tokens.index(eos)] if eos in tokens else tokens
