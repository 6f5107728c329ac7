"""What the tests of conversions share: a run with checkpoints, and the tools called in this process."""

import sys
from pathlib import Path

import pytest
import torch

from tests.trainer.forked import launch
from tests.trainer.launching import command_line, ds_config, write_corpus

ROWS, SECONDS = 8, 300


class Runs:
    """A folder in which runs of the small model are made, each step of ROWS rows, whatever the ranks."""

    def __init__(self, launcher, folder: Path):
        self.launcher, self.folder = launcher, folder
        self.corpus = write_corpus(folder)

    def run(self, name: str, world: int, shards: int, stage: int, steps: int, *arguments: str, settings=None, **ds):
        """Trains to the end. settings: of the run configuration; ds: of the DeepSpeed JSON."""
        config = ds_config(self.folder, micro=ROWS // world, stage=stage, **ds)
        settings = {**self.corpus, "train.steps": steps, "optim.schedule": "constant",
                    "train.expert_parallel_size": shards, **(settings or {})}
        codes, outputs = launch(self.launcher, self.folder,
                                [*command_line(config, self.folder / name, settings), *arguments], world, SECONDS)
        assert codes == [0] * world, "\n".join(outputs)
        return self.folder / name


def call(monkeypatch, capsys, tool, *arguments: object, expect: int = 0) -> str:
    """What a tool's `main` prints, given a command line; it must end with the exit code `expect`."""
    from tools.command import run
    monkeypatch.setattr(sys, "argv", [tool.__name__, *map(str, arguments)])
    capsys.readouterr()
    if expect == 0:
        run(tool.main)
    else:
        with pytest.raises(SystemExit) as ended:
            run(tool.main)
        assert ended.value.code == expect, capsys.readouterr()
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return printed.out + "".join(line for line in printed.err.splitlines(keepends=True) if line.startswith("error"))


def assert_same_state(one, other) -> None:
    """Two training states to the bit: every tensor of every parameter, and what else a run needs to go on."""
    assert one.kinds == other.kinds and one.shapes == other.shapes and one.step == other.step
    for name in one.shapes:
        for kind in one.kinds:
            assert torch.equal(one.whole(kind, name), other.whole(kind, name)), (kind, name)
    assert all(torch.equal(value, other.buffers[name]) for name, value in one.buffers.items())
    for fact in ("manifest", "rows_per_step", "adam_step", "hyper", "counters", "updates"):
        assert getattr(one.training, fact) == getattr(other.training, fact), fact
