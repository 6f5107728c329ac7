import gzip
import io
import json

import pytest
import sentencepiece

from trainer.data.corpus import REPOSITORY
from trainer.data.vocabulary import Vocabulary, _sample_lines, train_vocabulary
from trainer.errors import DataError


@pytest.fixture(scope="module")
def documents():
    with gzip.open(REPOSITORY / "data/proposals/valid.jsonl.gz", "rt", encoding="utf-8") as lines:
        records = [json.loads(line) for line in lines][:40]
    return [record[field] for record in records for field in ("src", "trg")]


@pytest.fixture(scope="module")
def vocabulary(documents, tmp_path_factory):
    return train_vocabulary(documents, tmp_path_factory.mktemp("vocabulary") / "a.model", 600, 200_000)


@pytest.mark.parametrize("text", [
    "", " ", "\n", "plain words", "  two spaces  in  and at the end  ", "a\nb\n\nc\n\n\nd\n",
    "def f(x):\n    if x:\n\t\treturn {'k': x % 7}  # ~!@#$^&*\n", "carriage\r\nreturn", "null \x00 byte",
    "naïve café e\u0301 ﬁ ① Ａ \u00a0 \u200b", "日本語 русский عربى 🙂👩‍👩‍👧",
    "<s> </s> <pad> <unk> <0x0A>", "CaSe 0x1234 1,000",
])
def test_gives_text_back(vocabulary, text):
    assert vocabulary.decode(vocabulary.encode([text])) == [text]


def test_gives_documents_back(vocabulary, documents):
    encoded = vocabulary.encode(documents)
    assert encoded == [ids.tolist() for ids in vocabulary.encode_arrays(documents)]
    assert vocabulary.decode(encoded) == documents
    assert encoded == [vocabulary.encode([text])[0] for text in documents]
    assert vocabulary.unk_id not in {token for ids in encoded for token in ids}
    assert sum(map(len, documents)) / sum(map(len, encoded)) > 1.8, "hardly shorter than characters"


def test_parts_join_to_the_whole(vocabulary):
    text = " A document, cut  into\n  chunks anywhere."
    (ids,) = vocabulary.encode([text])
    for cut in range(len(ids)):
        assert "".join(vocabulary.decode([ids[:cut], ids[cut:]])) == text


def test_special_ids(vocabulary):
    assert (vocabulary.unk_id, vocabulary.bos_id, vocabulary.eos_id, vocabulary.pad_id) == (0, 1, 2, 3)
    assert vocabulary.size == 600


def test_decode_stops_at_the_end_and_skips_filler(vocabulary):
    (ids,) = vocabulary.encode(["one two"])
    assert vocabulary.decode([[1, 3, *ids, 2, *ids], [2, *ids], []]) == ["one two", "", ""]


def test_training_is_deterministic_and_keeps_what_is_there(vocabulary, documents, tmp_path):
    again = train_vocabulary(iter(documents), tmp_path / "b.model", 600, characters=200_000)
    assert again.path.read_bytes() == vocabulary.path.read_bytes()
    assert again.digest == vocabulary.digest
    kept = train_vocabulary(iter(()), tmp_path / "b.model", 999)  # no texts: it would fail if it trained
    assert kept.digest == vocabulary.digest


def test_line_sample_spans_the_corpus_within_its_limit():
    texts = [f"{i:04}\n" for i in range(1000)]
    kept = [int(line) for line in _sample_lines(texts, 400)]
    assert kept == list(range(0, 1000, kept[1])), "every n-th line"
    assert 200 < 4 * len(kept) <= 400
    assert _sample_lines(texts, 4000) == [text.strip() for text in texts]


def test_long_lines_are_used_whole():
    line = "".join(chr(0x4E00 + i) for i in range(2500))
    parts = _sample_lines([line], 10**6)
    assert "".join(parts) == line
    assert max(len(part.encode()) for part in parts) <= 4192, "sentencepiece would leave it out"


def test_errors(tmp_path):
    with pytest.raises(DataError, match=r"no\.model: the vocabulary cannot be read: No such file"):
        Vocabulary(tmp_path / "no.model")
    (tmp_path / "bad.model").write_bytes(b"not a model")
    with pytest.raises(DataError, match=r"bad\.model: is not a sentencepiece model"):
        Vocabulary(tmp_path / "bad.model")
    with pytest.raises(DataError, match="hold no text"):
        train_vocabulary(["", "\n"], tmp_path / "empty.model", 4096)
    with pytest.raises(DataError, match=r"vocab_size = 4096: .* Please set it to a value <= "):
        train_vocabulary(["a few words"], tmp_path / "small.model", 4096)
    assert not list(tmp_path.glob("*.tmp-*")), "a failed training leaves nothing behind"


def test_foreign_model_needs_special_tokens(tmp_path, documents):
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(documents[:9]), model_writer=model,
                                             vocab_size=300, pad_id=-1, minloglevel=2)
    (tmp_path / "foreign.model").write_bytes(model.getvalue())
    with pytest.raises(DataError, match="has no pad token"):
        Vocabulary(tmp_path / "foreign.model")
