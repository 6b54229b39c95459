"""The tokens Emu2 adds to LLaMA's vocabulary, in the order of the released models.

A token's id is the number of SentencePiece pieces plus its offset: LLaMA's 32000 pieces give the released ids (`[PAD]`
32000, `[IMG]` 32001, ...). The released names of what the paper (arXiv 2312.13286) writes `<p>`, `<coor>` and
`<loc000>` ... `<loc224>` are `<phrase>`, `<object>` and `<patch_index_0000>` ... `<patch_index_0224>`; the patch
indices above 0224 are spare.
"""

_COMMON = (
    "[PAD]",
    "[IMG]",
    "[/IMG]",
    "<image>",
    "[gIMG]",
    "[/gIMG]",
    "[EOC]",
    "[VIDEO]",
    "<grounding>",
    "<phrase>",
    "</phrase>",
    "<object>",
    "</object>",
    "</delimiter_of_multi_objects/>",
    "<REC>",
    *(f"<patch_index_{i:04d}>" for i in range(257)),
)
_CHAT = ("[USER]", "[ASSISTANT]")

ADDED_TOKENS: tuple[tuple[str, int], ...] = tuple((name, offset) for offset, name in enumerate(_COMMON + _CHAT))
"""(name, offset from the SentencePiece piece count) of every added token."""
BASE_COUNT = len(_COMMON)
"""Added tokens of Emu2 and Emu2-Gen: the first 272."""
CHAT_COUNT = len(ADDED_TOKENS)
"""Added tokens of Emu2-Chat: all 274."""
