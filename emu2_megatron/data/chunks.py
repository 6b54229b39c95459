"""Long documents and texts, cut into samples that fit the context. Every word is kept, in order."""

import re
from collections.abc import Callable, Iterable

Part = str | bytes
"""A piece of a document in reading order: text, or a picture or video (only counted here)."""

# A word with the space around it, so that joined words are the text again. Chinese and Japanese characters are words,
# so that texts without spaces are cut as well.
_CJK = r"\u3040-\u30ff\u3400-\u9fff"
_WORD = re.compile(rf"(?:^\s+)?(?:[{_CJK}]|[^\s{_CJK}]+)\s*")

MIN_TOKENS = 16
"""Fewest tokens that a chunk can be limited to: any character fits, with `<s>` and `</s>`."""


def split_document(parts: Iterable[Part], max_words: int, max_pictures: int = 8) -> list[list[Part]]:
    """Cuts a long interleaved document into sub-documents, keeping every word and picture and their order.

    Each holds at most max_words words and max_pictures pictures or videos (8, as the paper takes from MMC4).
    Raises ValueError for limits below 1.
    """
    if max_words < 1 or max_pictures < 1:
        raise ValueError(f"max_words and max_pictures must be at least 1, got {max_words} and {max_pictures}")
    documents: list[list[Part]] = [[]]
    words = pictures = 0
    for part in parts:
        if isinstance(part, bytes):
            if pictures == max_pictures:
                documents.append([])
                words = pictures = 0
            documents[-1].append(part)
            pictures += 1
            continue
        units = _WORD.findall(part.strip())
        while units:
            if words == max_words:
                documents.append([])
                words = pictures = 0
            room = max_words - words
            taken, units = units[:room], units[room:]
            documents[-1].append("".join(taken).rstrip())
            words += len(taken)
    return [document for document in documents if document]


def split_words(text: str, max_words: int) -> list[str]:
    """Cuts a text into chunks of at most max_words words; white space goes only from the ends of chunks."""
    words = _WORD.findall(text)
    return ["".join(words[i : i + max_words]).rstrip() for i in range(0, len(words), max_words)]


def split_tokens(text: str, max_tokens: int, count: Callable[[str], int]) -> list[str]:
    """Cuts a text between words into chunks of at most max_tokens tokens as `count` counts them, at least 98 % full
    where words are short. A word that is too long by itself is cut too; white space goes only from the ends of chunks.

    Raises ValueError if a single character is longer than max_tokens.
    """
    words = _WORD.findall(text)[::-1]  # the next one last, where it is cheap to take away and to put back
    chunks: list[str] = []
    guess = max_tokens
    while words:
        fits, too_many = 0, len(words) + 1  # numbers of words
        while too_many - fits > 1:
            taken = min(max(guess, fits + 1), too_many - 1)
            tokens = count("".join(words[: -taken - 1 : -1]).rstrip())
            if tokens > max_tokens:
                too_many = taken
            else:
                fits = taken
                if tokens >= 0.98 * max_tokens:
                    break
            guess = taken * max_tokens // max(tokens, 1)
        if not fits:
            word = words.pop()
            if len(word) == 1:
                raise ValueError(f"{word!r} alone is {count(word)} tokens, more than {max_tokens}")
            words += [word[len(word) // 2 :], word[: len(word) // 2]]
            continue
        chunk = "".join(words[: -fits - 1 : -1]).rstrip()
        del words[-fits:]
        guess = fits
        if chunk:  # half of a word may have been all white space
            chunks.append(chunk)
    return chunks
