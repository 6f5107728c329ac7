from dataclasses import replace

import pytest

from model.errors import ConfigError
from trainer.data import prepare as module
from trainer.data.config import DataConfig
from trainer.data.loader import PackedLoader
from trainer.data.prepare import prepare
from trainer.data.records import documents
from trainer.errors import DataError


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return DataConfig(train="data/proposals/valid.jsonl.gz", valid="data/proposals/valid.jsonl.gz", test="",
                      vocab_size=1000, max_source_tokens=512, max_target_tokens=64, row_tokens=2048,
                      draws_per_source=2, cache_dir=str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(scope="module")
def prepared(config):
    return prepare(config)


def test_bundled_documents_reach_the_batch(config, prepared):
    assert set(prepared.caches) == {"train", "valid"} and prepared.vocabulary.size == 1000
    samples = prepared.samples("train")
    assert len(samples) == 133 and samples.draws == 2 and prepared.samples("valid", draws=1).draws == 1
    _, (batch,) = PackedLoader(samples, rows_per_micro_batch=1).step(0)
    text = prepared.vocabulary.decode([batch.tokens_T[batch.in_loss_T & (batch.copy_T == 0)]])[0]
    (corpus,) = module.find_sources(config, "train")
    targets = [target for block in corpus.blocks() for target in documents(block, corpus.reader)[1]]
    assert targets[int(batch.sample_C[0])].startswith(text) and len(text) > 20


@pytest.mark.parametrize("draws", [1, 40])
def test_other_draws_keep_the_sources_of_training(config, prepared, draws):
    few = replace(config, row_tokens=500)  # so that sources are cut to the row
    training, other = (replace(prepared, config=few).samples("train", draws=n) for n in (None, draws))
    assert training.sources_cut_to_row > 0 and other.draws == draws
    assert (training.source_tokens_S == other.source_tokens_S).all()
    assert (other.tokens_S <= other.row_tokens).all()


def test_second_time_finds_everything(config, prepared, monkeypatch):
    monkeypatch.setattr(module.Corpus, "blocks", None)
    again = prepare(config)
    assert again.vocabulary.digest == prepared.vocabulary.digest
    assert again.caches["train"].folders == prepared.caches["train"].folders


def test_vocabulary_of_another_run(config, prepared, tmp_path):
    again = prepare(replace(config, vocabulary=str(prepared.vocabulary.path), valid=""))
    assert again.vocabulary.digest == prepared.vocabulary.digest and set(again.caches) == {"train"}
    with pytest.raises(DataError, match="cannot be read"):
        prepare(replace(config, vocabulary=str(tmp_path / "none.model")))


def test_vocabulary_comes_from_the_training_documents_whatever_is_prepared(config, prepared):
    only = prepare(config, splits=("valid",))
    assert set(only.caches) == {"valid"} and only.vocabulary.digest == prepared.vocabulary.digest


@pytest.mark.parametrize(("key", "value", "problem"), [
    ("max_target_tokens", 0, "must be positive, not 0"),
    ("draws_per_source", -1, "must be positive, not -1"),
    ("vocab_size", 100, "give at least 320"),
    ("max_source_tokens", 2, "must be 0 (no limit) or at least 3 (<bos>, a token, </s>), not 2"),
    ("train", "", "is empty"),
    ("cache_dir", "", "is empty"),
    ("workers", -1, "must be 0 (one for each core) or positive, not -1"),
    ("row_tokens", 127, "127 tokens cannot hold data.draws_per_source x data.max_target_tokens = 2 x 64"),
])
def test_impossible_values_are_refused(config, key, value, problem):
    with pytest.raises(ConfigError) as caught:
        prepare(replace(config, **{key: value}))
    assert caught.value.key == f"data.{key}" and problem in caught.value.problem
