"""Small corpora whose tokens can be told by eye: a text is a list of numbers, which are its tokens."""

import json
from pathlib import Path

import numpy as np
import pytest

from trainer.data.config import CorpusConfig
from trainer.data.corpus import find_corpus
from trainer.data.token_cache import open_token_cache


class NumberVocabulary:
    """Stands in for a vocabulary: the text "7 8" has the tokens 7 and 8."""

    size, unk_id, bos_id, eos_id, pad_id = 1000, 0, 1, 2, 3

    def __init__(self, size=1000):
        self.size, self.digest = size, f"numbers {size}"

    def encode_arrays(self, texts):
        return [np.array([int(word) for word in text.split()], np.int32) for text in texts]


def local(path, **fields):
    """The corpus in a file, with the usual fields."""
    fields = {"source_field": "src", "target_field": "trg", "text_field": "text"} | fields
    return find_corpus(CorpusConfig(documents=str(path), **fields), "train", "/nowhere")


@pytest.fixture
def numbers():
    """Makes a vocabulary of the numbers below a size."""
    return NumberVocabulary


@pytest.fixture
def write_jsonl(tmp_path):
    def write(records, name="corpus.jsonl") -> Path:
        path = tmp_path / name
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        return path
    return write


@pytest.fixture
def cache_of(tmp_path, write_jsonl):
    """Token cache of [(source tokens, target tokens), ...] or of [text tokens, ...]."""
    def make(documents):
        def text(tokens):
            return " ".join(map(str, tokens))

        path = write_jsonl([{"src": text(d[0]), "trg": text(d[1])} if isinstance(d, tuple)
                            else {"text": text(d)} for d in documents])
        return open_token_cache(local(path), NumberVocabulary(), tmp_path / "cache")
    return make
