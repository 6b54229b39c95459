"""Token ids: the released table, LLaMA's segmenting, and refusals."""

import io
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.data.tokenizer import Tokenizer
from emu2_megatron.data.tokens import ADDED_TOKENS, BASE_COUNT, CHAT_COUNT
from emu2_megatron.errors import DataError


def test_added_tokens_have_the_released_ids_over_llamas_32000_pieces() -> None:
    ids = {name: 32000 + offset for name, offset in ADDED_TOKENS}
    released = {
        "[PAD]": 32000, "[IMG]": 32001, "[/IMG]": 32002, "<image>": 32003, "[gIMG]": 32004, "[/gIMG]": 32005,
        "[EOC]": 32006, "[VIDEO]": 32007, "<grounding>": 32008, "<phrase>": 32009, "</phrase>": 32010,
        "<object>": 32011, "</object>": 32012, "</delimiter_of_multi_objects/>": 32013, "<REC>": 32014,
        "<patch_index_0000>": 32015, "<patch_index_0224>": 32239, "<patch_index_0256>": 32271,
        "[USER]": 32272, "[ASSISTANT]": 32273,
    }  # fmt: skip
    assert {name: ids[name] for name in released} == released
    assert (BASE_COUNT, CHAT_COUNT, len(ids)) == (272, 274, 274)


def test_vocabulary_and_named_ids(example_data: Path) -> None:
    base, chat = (Tokenizer(example_data / "tokenizer.model", chat=chat) for chat in (False, True))
    assert (base.vocab_size, chat.vocab_size) == (1272, 1274)
    assert (base.bos, base.eos, base.pad) == (1, 2, 1000)
    assert (base.image_begin, base.image_end, base.image, base.frame) == (1001, 1002, 1003, 1004)
    assert "[USER]" not in base.ids and chat.ids["[ASSISTANT]"] == 1273
    assert {**base.ids, "[USER]": 1272, "[ASSISTANT]": 1273} == chat.ids


def test_every_call_is_a_segment_with_a_dummy_space(tokenizer: Tokenizer, example_data: Path) -> None:
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(example_data / "tokenizer.model"))
    assert pieces.id_to_piece(tokenizer.encode("the")) == ["▁the"]
    # As in LLaMA's legacy tokenizer, " the" after an added token has two spaces: the dummy and its own.
    assert "".join(pieces.id_to_piece(tokenizer.encode(" the"))) == "▁▁the"
    assert tokenizer.encode("") == []


@settings(max_examples=150, deadline=None)
# "▁" is SentencePiece's own sign for a space, and comes back as one; lone surrogates are not text.
@given(st.text(st.characters(exclude_characters="▁", exclude_categories=["Cs"])))
def test_any_text_survives_the_round_trip(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert all(2 < token < 1000 for token in ids)  # neither control nor added ids, whatever the text says
    assert tokenizer.decode(ids) == text


def test_names_of_tokens_in_text_are_plain_text(tokenizer: Tokenizer) -> None:
    text = "<s>[IMG]<image></s>[PAD]"
    ids = tokenizer.encode(text)
    assert all(2 < token < 1000 for token in ids)
    assert tokenizer.decode(ids) == text


def test_decode_names_added_tokens_and_hides_bos_and_eos(tokenizer: Tokenizer) -> None:
    ids = [
        tokenizer.bos, *tokenizer.encode("A dog."), tokenizer.image_begin, tokenizer.image, tokenizer.image_end,
        *tokenizer.encode("A cat."), tokenizer.eos, tokenizer.pad,
    ]  # fmt: skip
    assert tokenizer.decode(ids) == "A dog.[IMG]<image>[/IMG]A cat.[PAD]"


@pytest.mark.parametrize("token", [-1, 1272, 10**9])
def test_decode_refuses_ids_outside_the_vocabulary(tokenizer: Tokenizer, token: int) -> None:
    with pytest.raises(DataError, match=f"{token} is outside the vocabulary of 1272"):
        tokenizer.decode([5, token])


def test_lone_surrogate_is_a_data_error(tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError, match="not valid Unicode"):
        tokenizer.encode("half \ud800 a character")


def test_unusable_files_are_named_with_advice(tmp_path: Path) -> None:
    garbage = tmp_path / "garbage.model"
    garbage.write_bytes(b"not a model")
    empty = tmp_path / "empty.model"
    empty.touch()
    for path in (tmp_path / "missing.model", tmp_path, garbage, empty):
        with pytest.raises(DataError) as caught:
            Tokenizer(path)
        assert str(caught.value).startswith(f"{path}: ") and "tokenizer.model" in str(caught.value)


def test_other_control_ids_are_refused(tmp_path: Path) -> None:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d"] * 5), model_writer=model, vocab_size=12, hard_vocab_limit=False,
        unk_id=0, bos_id=2, eos_id=1, minloglevel=2,
    )  # fmt: skip
    path = tmp_path / "swapped.model"
    path.write_bytes(model.getvalue())
    with pytest.raises(DataError, match="<s> has id 2, Emu2 needs 1"):
        Tokenizer(path)
