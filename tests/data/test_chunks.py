"""Where long documents and texts are cut: by hand, and what must hold for any text."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emu2_megatron.data.chunks import MIN_TOKENS, split_document, split_tokens, split_words
from emu2_megatron.data.tokenizer import Tokenizer


def test_split_document_by_hand() -> None:
    a, b, c = b"A", b"B", b"C"
    # At most 3 words: the picture stays with the text before it, the rest of a text follows in the next document.
    assert split_document(["one two  three", a, "four", b], 3) == [["one two  three", a], ["four", b]]
    assert split_document([a, "one two three four", b], 3) == [[a, "one two three"], ["four", b]]
    assert split_document([a, b, c, "one"], 9, max_pictures=2) == [[a, b], [c, "one"]]
    assert split_document(["图形桌面 ok"], 3) == [["图形桌"], ["面 ok"]]
    assert split_document(["  "], 3) == split_document([], 3) == []
    with pytest.raises(ValueError, match="at least 1"):
        split_document(["a"], 0)


@given(st.lists(st.one_of(st.binary(min_size=1, max_size=2), st.text("ab \n图"))), st.integers(1, 5), st.integers(1, 3))
def test_split_document_keeps_everything(parts: list[str | bytes], max_words: int, max_pictures: int) -> None:
    documents = split_document(parts, max_words, max_pictures)

    def letters(pieces: list[str | bytes]) -> list[str | bytes]:
        return [c for p in pieces for c in ([p] if isinstance(p, bytes) else "".join(p.split()))]

    assert letters([part for document in documents for part in document]) == letters(parts)
    for document in documents:
        assert 0 < len(document)
        assert sum(isinstance(part, bytes) for part in document) <= max_pictures
        spaced = [part.replace("图", " 图 ").split() for part in document if isinstance(part, str)]
        assert sum(map(len, spaced)) <= max_words and all(spaced)


def test_split_words_by_hand() -> None:
    assert split_words("  one two\n\nthree  four\n", 3) == ["  one two\n\nthree", "four"]
    assert split_words("图形 a桌面", 2) == ["图形", "a桌", "面"]
    assert split_words(" \n", 2) == split_words("", 2) == []


def test_split_tokens_by_hand() -> None:
    """A token is a character here."""
    assert split_tokens("one two  three", 8, len) == ["one two", "three"]
    assert split_tokens("  a\n\tb", 8, len) == ["  a\n\tb"]
    assert split_tokens("ab abcdefghij c", 4, len) == ["ab", "ab", "cde", "fgh", "ij c"]  # halves of a long word
    assert split_tokens(" \n", 4, len) == split_tokens("", 4, len) == []
    with pytest.raises(ValueError, match="'a' alone is 9 tokens"):
        split_tokens("a", 4, lambda text: 9)


@given(st.text("ab .\n\u3000图", max_size=80), st.integers(1, 9))
def test_chunks_keep_every_word_in_order(text: str, limit: int) -> None:
    for chunks in (split_words(text, limit), split_tokens(text, limit, len)):
        assert "".join("".join(chunks).split()) == "".join(text.split())
        assert all(chunk.strip() for chunk in chunks)
    assert all(len(chunk) <= limit for chunk in split_tokens(text, limit, len))
    # Cut between words: the pieces of words are those of the text.
    if all(len(word) <= limit for word in text.replace("图", " ").split()):
        spaced = [c.replace("图", " 图 ").split() for c in split_words(text, limit)]
        assert sum(spaced, []) == text.replace("图", " 图 ").split()
        assert all(len(words) <= limit for words in spaced)


@settings(max_examples=30, deadline=None)
@given(st.text(max_size=300), st.integers(MIN_TOKENS, 40))
def test_any_text_is_cut_with_a_real_tokenizer(tokenizer: Tokenizer, text: str, limit: int) -> None:
    chunks = split_tokens(text, limit, lambda chunk: len(tokenizer.encode(chunk)) + 2)
    assert "".join("".join(chunks).split()) == "".join(text.split())
    assert all(len(tokenizer.encode(chunk)) + 2 <= limit for chunk in chunks)


@pytest.mark.parametrize("limit", [64, 2048])
def test_books_fill_the_context(tokenizer: Tokenizer, example_data: Path, limit: int) -> None:
    for path in sorted((example_data / "text").glob("*.txt")):
        text = path.read_text(encoding="utf-8")
        chunks = split_tokens(text, limit, lambda chunk: len(tokenizer.encode(chunk)) + 2)
        assert " ".join(chunks).split() == text.split()
        sizes = [len(tokenizer.encode(chunk)) + 2 for chunk in chunks]
        assert max(sizes) <= limit
        assert sum(sizes[:-1]) >= (0.97 if limit == 2048 else 0.9) * limit * (len(sizes) - 1)
