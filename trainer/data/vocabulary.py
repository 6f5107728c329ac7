"""Sub-word vocabulary (sentencepiece) that gives every text back as it was: case, spaces, newlines."""

from __future__ import annotations

import functools
import hashlib
import io
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from trainer.data.files import build_once
from trainer.errors import DataError

UNK_ID, BOS_ID, EOS_ID, PAD_ID = 0, 1, 2, 3
TRAINING_CHARACTERS = 3_000_000
_LINE = 1000  # characters, so at most 4,000 bytes; sentencepiece leaves out what is longer than 4,192
_SPACE = "\u2581"  # how sentencepiece writes the space
_SPACING = ["\n", "\n\n", "\t", *(_SPACE * n for n in (2, 4, 8))]  # pieces it would not find itself
_THREADS = 2  # of the training: the pieces depend on their number, which therefore is not the machine's


class Vocabulary:
    """A sentencepiece model with the ids that the data needs.

    Attributes: `size`; `bos_id`, `eos_id`, `pad_id`, `unk_id`; `digest`, a hash of the model file.
    Raises DataError if the file is missing, is no sentencepiece model, or has no <bos>, </s> or <pad>.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            model = self.path.read_bytes()
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        except OSError as error:
            raise DataError(f"{path}: the vocabulary cannot be read: {error.strerror}") from None
        except RuntimeError:
            raise DataError(f"{path}: is not a sentencepiece model") from None
        self.digest = hashlib.sha256(model).hexdigest()
        self.size = self._processor.vocab_size()
        self.unk_id, self.bos_id = self._processor.unk_id(), self._processor.bos_id()
        self.eos_id, self.pad_id = self._processor.eos_id(), self._processor.pad_id()
        for name in ("bos", "eos", "pad"):
            if getattr(self, f"{name}_id") < 0:
                raise DataError(f"{path}: the vocabulary has no {name} token; train one with "
                                "--bos_id, --eos_id and --pad_id, or let data.vocabulary be `train`")

    def __reduce__(self) -> tuple:
        """Pickles as the path: a process that is sent many tasks reads the model once."""
        return _opened, (self.path.absolute(),)

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, without special tokens."""
        return self._processor.encode(list(texts))

    def encode_arrays(self, texts: Sequence[str]) -> list[np.ndarray]:
        """The same as int32 arrays, in less than half the time."""
        return self._processor.encode(list(texts), num_threads=1, return_type="numpy")

    def decode(self, ids: Iterable[Iterable[int]]) -> list[str]:
        """Texts of sequences of ids. A text ends at its first </s>; <bos> and <pad> are left out."""
        return [self._processor.decode(self._text_ids(sequence)) for sequence in ids]

    def _text_ids(self, sequence: Iterable[int]) -> list[int]:
        kept = []
        for token in map(int, sequence):
            if token == self.eos_id:
                break
            if token not in (self.bos_id, self.pad_id):
                kept.append(token)
        return kept


@functools.cache
def _opened(path: Path) -> Vocabulary:
    return Vocabulary(path)


def train_vocabulary(texts: Iterable[str], path: str | Path, vocab_size: int,
                     characters: int = TRAINING_CHARACTERS) -> Vocabulary:
    """`vocabulary_model` of these texts, written to `path`, atomically, unless it is there."""
    def build(temporary: Path) -> None:
        temporary.write_bytes(vocabulary_model(texts, vocab_size, characters))

    build_once(Path(path), Path.is_file, build)
    return Vocabulary(path)


def vocabulary_model(texts: Iterable[str], vocab_size: int, characters: int = TRAINING_CHARACTERS) -> bytes:
    """A BPE vocabulary of `vocab_size` pieces, trained on `texts`: the content of a sentencepiece model file.

    The same texts give the same bytes. Every byte is a piece, so that no text is out of vocabulary. At most
    `characters` are used, taken as every n-th line of all texts. The one character that is not given back is
    U+2581, which sentencepiece uses for the space.
    Raises DataError where the texts do not hold enough different pieces.
    """
    lines = _sample_lines(texts, characters)
    if not lines:
        raise DataError("data.train: the documents hold no text to train a vocabulary on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines), model_writer=model, model_type="bpe", vocab_size=vocab_size,
            byte_fallback=True, split_digits=True, user_defined_symbols=_SPACING,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            unk_id=UNK_ID, bos_id=BOS_ID, eos_id=EOS_ID, pad_id=PAD_ID,
            num_threads=_THREADS, minloglevel=2)
    except RuntimeError as error:
        raise DataError(f"data.vocab_size = {vocab_size}: no vocabulary of this size can be trained on "
                        f"{len(lines)} lines of text: {str(error).rpartition('] ')[2].strip()}") from None
    return model.getvalue()


def _sample_lines(texts: Iterable[str], characters: int) -> list[str]:
    """Every n-th line, with n doubled (and the lines thinned) whenever there are too many characters."""
    lines: list[str] = []
    every, seen, held = 1, 0, 0
    for text in texts:
        for line in _lines(text):
            if seen % every == 0:
                lines.append(line)
                held += len(line)
                if held > characters:
                    lines, every = lines[::2], every * 2
                    held = sum(map(len, lines))
            seen += 1
    return lines


def _lines(text: str) -> Iterator[str]:
    for line in text.split("\n"):
        for start in range(0, len(line), _LINE):
            yield line[start:start + _LINE]
