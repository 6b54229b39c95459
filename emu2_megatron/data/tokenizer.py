"""Text to token ids and back: a SentencePiece model plus Emu2's added tokens (`data/tokens.py`)."""

from collections.abc import Iterable
from pathlib import Path

import sentencepiece

from emu2_megatron.config.schema import Config
from emu2_megatron.data.tokens import ADDED_TOKENS, BASE_COUNT, CHAT_COUNT
from emu2_megatron.errors import ConfigError, DataError

_CONTROL_IDS = {"<unk>": 0, "<s>": 1, "</s>": 2}


class Tokenizer:
    """A SentencePiece model with LLaMA's control ids (`<unk>` 0, `<s>` 1, `</s>` 2) and Emu2's tokens after its pieces.

    Attributes: `vocab_size` (pieces + added tokens); `ids` (added token's name -> id); and the ids by use, `bos`
    (`<s>`), `eos` (`</s>`), `pad` (`[PAD]`), `image_begin` (`[IMG]`), `image_end` (`[/IMG]`), `image` (`<image>`, one
    visual embedding of a picture), `frame` (`[gIMG]`, one of a video frame).

    Raises DataError if the file is missing, is no SentencePiece model, or has other control ids.
    """

    def __init__(self, path: str | Path, chat: bool = False) -> None:
        """`chat` adds `[USER]` and `[ASSISTANT]`, which only Emu2-Chat has."""
        self._model = _load(Path(path))
        self._num_pieces: int = self._model.get_piece_size()
        count = CHAT_COUNT if chat else BASE_COUNT
        self.ids = {name: self._num_pieces + offset for name, offset in ADDED_TOKENS[:count]}
        self._names = {token: name for name, token in self.ids.items()}
        self.vocab_size = self._num_pieces + count
        self.bos = _CONTROL_IDS["<s>"]
        self.eos = _CONTROL_IDS["</s>"]
        self.pad = self.ids["[PAD]"]
        self.image_begin = self.ids["[IMG]"]
        self.image_end = self.ids["[/IMG]"]
        self.image = self.ids["<image>"]
        self.frame = self.ids["[gIMG]"]

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without `<s>` and `</s>`.

        Every call is a segment of its own that begins with SentencePiece's dummy "▁", also where it follows an added
        token: this is the `legacy` behaviour of LLaMA's tokenizer that Emu2 was trained and released with. Names of
        added tokens inside `text` are plain text here, so that no caption can smuggle in an `[IMG]`.

        Raises DataError if `text` is not valid Unicode (a lone surrogate).
        """
        try:
            text.encode()  # SentencePiece's own error for this differs from version to version
        except UnicodeEncodeError as error:
            raise DataError(f"text is not valid Unicode: {error.reason} at character {error.start}") from error
        ids: list[int] = self._model.encode(text)
        return ids

    def piece(self, token: int) -> str:
        """A token as the vocabulary has it: a piece ("▁dog", "<0xE4>") or the name of an added token.

        Raises DataError for an id outside the vocabulary.
        """
        if not 0 <= token < self.vocab_size:
            raise DataError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
        return self._names.get(token) or str(self._model.id_to_piece(token))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids. Added tokens appear by name, `<s>` and `</s>` not at all. As in `encode`, each run of
        pieces between them is a segment of its own: no space is put around an added token.

        Raises DataError for an id outside the vocabulary.
        """
        text = ""
        segment: list[int] = []
        for token in ids:
            name = self._names.get(token)
            if name is None and not 0 <= token < self._num_pieces:
                raise DataError(f"token id {token} is outside the vocabulary of {self.vocab_size}")
            if name is None and token not in (self.bos, self.eos):
                segment.append(token)
                continue
            text += self._model.decode(segment) + (name or "")
            segment = []
        return text + str(self._model.decode(segment))


def _load(path: Path) -> sentencepiece.SentencePieceProcessor:
    advice = "data.tokenizer must be a SentencePiece model such as LLaMA's tokenizer.model"
    model = sentencepiece.SentencePieceProcessor()
    try:
        model.load_from_serialized_proto(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path}: cannot read the tokenizer ({error.strerror}); {advice}") from error
    except RuntimeError as error:  # SentencePiece's only way to say that it cannot parse or use the model
        raise DataError(f"{path}: not a SentencePiece model; {advice}") from error
    for piece, wanted in _CONTROL_IDS.items():
        found = {"<unk>": model.unk_id(), "<s>": model.bos_id(), "</s>": model.eos_id()}[piece]
        if found != wanted:
            raise DataError(f"{path}: {piece} has id {found}, Emu2 needs {wanted} as in LLaMA; {advice}")
    return model


def tokenizer_for(config: Config) -> Tokenizer:
    """The tokenizer of a run, with Emu2-Chat's two tokens if the model has rows for them.

    Raises DataError like `Tokenizer`, ConfigError if it has another number of tokens than the model has rows.
    """
    sizes = []
    for chat in (False, True):
        tokenizer = Tokenizer(config.data.tokenizer, chat)
        if tokenizer.vocab_size == config.model.decoder.vocab_size:
            return tokenizer
        sizes.append(tokenizer.vocab_size)
    raise ConfigError(
        f"data.tokenizer: {config.data.tokenizer} has {sizes[0]} tokens ({sizes[1]} with Chat's), but "
        f"model.decoder.vocab_size is {config.model.decoder.vocab_size}; legal: {sizes[0]} or {sizes[1]}"
    )
