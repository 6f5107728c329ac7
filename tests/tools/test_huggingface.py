"""What a Hugging Face folder is made of: code that runs by itself, and a tokenizer with the vocabulary's ids."""

import gzip
import json
import subprocess
import sys

import pytest
import sentencepiece

from model.errors import ConfigError
from tests.trainer.launching import ROOT
from tools.huggingface.flatten import flatten
from tools.huggingface.tokenizer import tokenizer_of
from trainer.data.vocabulary import Vocabulary, train_vocabulary


@pytest.fixture(scope="module")
def texts():
    with gzip.open(ROOT / "data" / "proposals" / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["src"] for line in file][:40]


@pytest.fixture(params=["bpe", "unigram"])
def vocabulary(request, texts, tmp_path):
    if request.param == "bpe":
        return train_vocabulary(texts, tmp_path / "my.model", 600)
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line[:4000] for text in texts for line in text.split("\n")), vocab_size=600,
        model_prefix=str(tmp_path / "my"), model_type="unigram", byte_fallback=True, pad_id=3, minloglevel=2,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        user_defined_symbols=["\n", "\n\n", "\t", *("\u2581" * n for n in (2, 4, 8))])
    return Vocabulary(tmp_path / "my.model")


def test_the_tokenizer_gives_the_vocabularys_ids(vocabulary, texts, request):
    tokenizer = tokenizer_of(vocabulary.path)
    odd = ["", " x ", "a  b   c    \n\n\n\t d", "        e        f", "</s> <bos> <0x41> <pad>",
           "\u00e9\u65e5\U0001f389"]
    expected = vocabulary.encode(odd)
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in odd] == expected
    assert tokenizer.encode("x").ids == [vocabulary.bos_id, *vocabulary.encode(["x"])[0], vocabulary.eos_id]
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.decode(ids) for ids in found] == vocabulary.decode(found)
    # A unigram's equally probable segmentations are decided by rounding, which differs: the same length, in few texts.
    assert [len(ids) for ids in found] == [len(ids) for ids in vocabulary.encode(texts)]
    differing = sum(a != b for a, b in zip(found, vocabulary.encode(texts), strict=True))
    assert differing <= (len(texts) // 10 if "unigram" in request.node.name else 0)


def test_a_vocabulary_of_words_makes_no_tokenizer(texts, tmp_path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), vocab_size=600, model_prefix=str(tmp_path / "my"), model_type="word", pad_id=3,
        minloglevel=2, hard_vocab_limit=False)
    with pytest.raises(ConfigError, match="take a BPE or unigram vocabulary"):
        tokenizer_of(tmp_path / "my.model")


def test_flattened_code_imports_nothing_of_the_repository(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, text in flatten(ROOT / "model" / "sampling.py").items():
        (folder / name).write_text(text)
    code = ("import sys; from exported.sampling import SOLVERS, sample; from exported.diffusion_lm import DiffusionLM; "
            "print([name for name in sys.modules if name.split('.')[0] in ('model', 'trainer', 'tools')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
