"""What a Hugging Face folder is made of: code that runs by itself, and a tokenizer with the vocabulary's ids."""

import gzip
import json
import subprocess
import sys

import pytest

from tests.trainer.launching import ROOT
from tools.huggingface.flatten import flatten
from tools.huggingface.tokenizer import tokenizer_of
from trainer.data.vocabulary import train_vocabulary


@pytest.fixture(scope="module")
def texts():
    with gzip.open(ROOT / "data" / "proposals" / "valid.jsonl.gz", "rt", encoding="utf-8") as file:
        return [json.loads(line)["src"] for line in file][:40]


def test_the_tokenizer_gives_the_vocabularys_ids(texts, tmp_path):
    vocabulary = train_vocabulary(texts, tmp_path / "my.model", 600)
    tokenizer = tokenizer_of(vocabulary.path)
    odd = ["", " x ", "a  b   c    \n\n\n\t d", "        e         f", "</s> <bos> <0x41> <pad>",
           "\u00e9\u65e5\U0001f389"]
    expected = vocabulary.encode(odd)
    assert [tokenizer.encode(text, add_special_tokens=False).ids for text in odd] == expected
    assert tokenizer.encode("x").ids == [vocabulary.bos_id, *vocabulary.encode(["x"])[0], vocabulary.eos_id]
    found = [tokenizer.encode(text, add_special_tokens=False).ids for text in texts]
    assert [tokenizer.decode(ids) for ids in found] == vocabulary.decode(found)
    # Equally probable segmentations are decided by rounding, which differs: the same length, in few texts.
    assert [len(ids) for ids in found] == [len(ids) for ids in vocabulary.encode(texts)]
    assert sum(a != b for a, b in zip(found, vocabulary.encode(texts), strict=True)) <= len(texts) // 10


def test_flattened_code_imports_nothing_of_the_repository(tmp_path):
    folder = tmp_path / "exported"
    folder.mkdir()
    for name, text in flatten(ROOT / "model" / "sampling.py").items():
        (folder / name).write_text(text)
    code = ("import sys; from exported.sampling import SOLVERS, sample; from exported.diffusion_lm import DiffusionLM; "
            "print([name for name in sys.modules if name.split('.')[0] in ('model', 'trainer', 'tools')])")
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "[]", done.stderr
