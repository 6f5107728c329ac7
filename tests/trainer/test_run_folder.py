"""What a run's folder says of the run, and which configuration it may go on with."""

import hashlib
import os
from types import SimpleNamespace

import pytest

from tests.trainer.launching import ds_config
from trainer.config_load import load
from trainer.ds_config import load_ds_config
from trainer.errors import CheckpointError
from trainer.run_folder import RunFolder, check_vocabulary


def open_folder(tmp_path, *settings) -> list[str]:
    """Opens tmp_path/run as a start of `trainer/run.py` does; what was said."""
    said, folder = [], RunFolder(tmp_path / "run", "auto", None)
    folder.open(load(overrides=settings), load_ds_config(ds_config(tmp_path)), {}, said.append)
    folder._lock.close()
    return said


def test_the_number_of_workers_may_change(tmp_path):
    open_folder(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert open_folder(tmp_path, "data.workers=3") == ["resuming with data.workers = 3 (was 0)"]


def test_the_configuration_is_never_half_written(tmp_path):
    """What an earlier start wrote stays whole until the new file takes its name: a kill may come at any point."""
    open_folder(tmp_path)
    config = tmp_path / "run" / "config"
    before = {path.name: path.read_text() for path in config.iterdir()}
    assert before.keys() == {"run.toml", "deepspeed.json", "environment.json", "code.diff"}
    for name in before:
        os.link(config / name, tmp_path / name)
    (config / "run.toml.tmp-0123456789ab").write_text("")  # all that a kill leaves
    open_folder(tmp_path, "train.steps=7")
    assert {name: (tmp_path / name).read_text() for name in before} == before
    assert (config / "run.toml").read_text() != before["run.toml"]
    assert {path.name for path in config.iterdir()} == before.keys()


def test_a_vocabulary_is_held_against_that_of_the_weights(tmp_path):
    weights, empty, keeps = tmp_path / "step-00000001", tmp_path / "empty", tmp_path / "keeps"
    keeps.mkdir()
    (keeps / "vocabulary.model").write_bytes(b"ours")
    ours, other = (SimpleNamespace(path=f"{content}.model", digest=hashlib.sha256(content.encode()).hexdigest())
                   for content in ("ours", "other"))
    for digest, folders in ((ours.digest, [empty]), (ours.digest, [keeps]), (None, [empty, keeps])):
        check_vocabulary(weights, digest, folders, ours)
        with pytest.raises(CheckpointError, match=r"step-00000001 was trained with another .* other\.model") as refused:
            check_vocabulary(weights, digest, folders, other)
        place = keeps / "vocabulary.model" if keeps in folders else "the vocabulary.model that it was trained with"
        assert str(refused.value).endswith(f": set data.vocabulary = {place}")
    check_vocabulary(weights, None, [empty], other)  # of an earlier version, and nothing says what it was
    with pytest.raises(CheckpointError, match=r"= the vocabulary\.model that it was trained with"):
        check_vocabulary(weights, other.digest, [keeps], ours)  # another one has taken its place


def test_a_vocabulary_may_be_named_in_place_of_the_one_that_was_trained(tmp_path):
    open_folder(tmp_path)
    (tmp_path / "run" / "checkpoints" / "step-00000001").mkdir(parents=True)
    assert open_folder(tmp_path, "data.vocabulary=kept.model") == [
        "resuming with data.vocabulary = 'kept.model' (was 'train')"]
