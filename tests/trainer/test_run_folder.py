"""What a run's folder says of the run, and which configuration it may go on with."""

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
