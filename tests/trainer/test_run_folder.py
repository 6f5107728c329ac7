"""What a run's folder says of the run, and which configuration it may go on with."""

import os

from tests.trainer.launching import ds_config
from trainer.config_load import load
from trainer.ds_config import load_ds_config
from trainer.run_folder import RunFolder


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
