"""Who is named when a run no longer moves, profiles on request, and the launchers above a rank."""

import json
import os
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from model.errors import ConfigError
from tests.trainer.launching import ROOT
from trainer.config import recomputed_layers
from trainer.loop import TrainingRun
from trainer.profiling import Profiler, step_range
from trainer.watchdog import Watchdog, slowest

HERE = os.uname().nodename


def heartbeat(folder, rank, *, age=0.0, host="elsewhere", process=1, phase="train", step=7, beats=20):
    path = folder / "heartbeats" / f"rank{rank:05d}.json"
    path.write_text(json.dumps({"rank": rank, "host": host, "process": process, "phase": phase, "step": step,
                                "beats": beats}))
    os.utime(path, (time.time() - age, time.time() - age))


@pytest.fixture
def dog(tmp_path):
    dog = Watchdog(tmp_path, rank=0, world=3, minutes=0.05)  # a heartbeat every 0.3 s
    dog.start()
    dog.beat("train", 7)
    yield dog
    dog.stop()


def test_a_silent_rank_of_another_host_is_missing(dog, tmp_path):
    heartbeat(tmp_path, 1, age=100, step=5)
    heartbeat(tmp_path, 2)
    assert dog.missing() == "rank 1 (host elsewhere, process 1), last seen in train at step 5"


def test_a_dead_process_of_this_host_is_missing_at_once(dog, tmp_path):
    child = subprocess.Popen(["true"])
    child.wait()
    heartbeat(tmp_path, 1)
    heartbeat(tmp_path, 2, host=HERE, process=child.pid)
    assert dog.missing().startswith(f"rank 2 (host {HERE}, process {child.pid})")


def test_ranks_that_have_ended_are_not_missing(dog, tmp_path):
    heartbeat(tmp_path, 1, age=100, phase="ended")
    heartbeat(tmp_path, 2, age=100, phase="ended", host=HERE, process=2 ** 22 + 1)
    assert dog.missing() == ""


def test_heartbeats_say_where_a_rank_is(dog, tmp_path):
    time.sleep(0.7)
    beat = json.loads((tmp_path / "heartbeats" / "rank00000.json").read_text())
    assert (beat["phase"], beat["step"], beat["process"], beat["beats"]) == ("train", 7, os.getpid(), 1)


def test_a_rank_that_takes_twice_as_long_is_slow():
    assert slowest([1.0, 1.1, 2.5, 0.9]) == 2
    assert slowest([1.0, 1.9]) is None and slowest([1.0, 2.1]) == 1 and slowest([3.0]) is None
    assert slowest([0.01, 0.05]) is None  # too short to matter


def test_layers_to_recompute():
    assert recomputed_layers("none", 6) == frozenset()
    assert recomputed_layers("all", 3) == {0, 1, 2}
    assert recomputed_layers("every:1", 3) == {0, 1, 2} and recomputed_layers("every:2", 5) == {1, 3}
    for wrong in ("every:0", "every:7", "every:", "every:2 ", "All", ""):
        with pytest.raises(ConfigError, match=r"none, all or every:n with n from 1 to model\.layers = 6"):
            recomputed_layers(wrong, 6)


def test_steps_are_profiled(tmp_path):
    profiler = Profiler(step_range("2-3"), memory=False, run_dir=tmp_path)
    traces = []
    for step in range(1, 6):
        profiler.before(step)
        torch.ones(10 + step).cumsum(0)
        traces.append(profiler.after(step))
    assert traces[:2] == traces[3:] == [None, None] and traces[2] == tmp_path / "profile" / "steps-2-3.json"
    shapes = [event["args"]["Input Dims"][0] for event in json.loads(traces[2].read_text())["traceEvents"]
              if event.get("name") == "aten::cumsum"]
    assert shapes == [[12], [13]]
    for wrong in ("5", "3-2", "0-4", "a-b", "1-2-3"):
        with pytest.raises(ConfigError, match="must look like 20-22"):
            step_range(wrong)


_RANK = """
import sys, time
sys.path.insert(0, {root!r})
from trainer import parents
from trainer.signals import StopRequest
stop = StopRequest()
stop.install()
parents.watch_launchers(stop)
print(len(parents._launchers()), flush=True)
while stop.reason is None:
    time.sleep(0.05)
print(stop.reason, flush=True)
"""


def test_the_end_of_a_launcher_is_a_request_to_stop(tmp_path):
    """A launcher that starts another one, as `deepspeed` does, in a shell that ends first."""
    rank = tmp_path / "rank.py"
    rank.write_text(_RANK.format(root=str(ROOT)))
    inner, outer = tmp_path / "torchrun", tmp_path / "deepspeed"
    inner.write_text(f"import subprocess, sys\nsubprocess.run([sys.executable, {str(rank)!r}])\n")
    outer.write_text(f"import os, subprocess, sys\nprint(os.getpid(), flush=True)\n"
                     f"subprocess.run([sys.executable, {str(inner)!r}])\n")
    shell = subprocess.Popen(["sh", "-c", f"{sys.executable} {outer} & sleep 1000"], stdout=subprocess.PIPE, text=True)
    launcher = int(shell.stdout.readline())
    assert shell.stdout.readline() == "2\n"
    shell.kill()
    time.sleep(1.5)
    os.kill(launcher, signal.SIGKILL)
    assert shell.stdout.readline() == "the launcher has ended\n"


def test_a_rank_is_slow_by_the_steps_since_the_last_line():
    """Not by train.log_every: fewer steps lie behind the last line, and behind the first one after a resume."""
    said = []
    run = SimpleNamespace(step=23, logged_at=20, seconds_W=[0.3, 0.9], say=said.append,
                          log=SimpleNamespace(write=lambda *_: None), ranks=SimpleNamespace(world=2),
                          metrics=SimpleNamespace(steps=0), run=SimpleNamespace(train=SimpleNamespace(log_every=20)))
    TrainingRun._log(run, info=None, bar=None)
    assert said == ["step 23: rank 1 is slow: 0.300 s a step for its part"]
    assert run.seconds_W == [0.0, 0.0] and run.logged_at == 23
