"""Requests to stop."""

import os
import signal
import subprocess
import sys

import pytest
import torch

from trainer import signals
from trainer.signals import HANDLED, REASONS, StopRequest, StopRequested


@pytest.fixture
def handlers():
    before = {number: signal.getsignal(number) for number in HANDLED}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", HANDLED)
def test_a_signal_only_sets_the_reason(handlers, monkeypatch, number):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    stop = StopRequest()
    stop.install()
    assert not stop.agreed(None)
    os.kill(os.getpid(), number)
    assert stop.agreed(None) and stop.reason == signal.Signals(number).name


def test_a_signal_during_the_agreement_waits_for_the_next_one(handlers, monkeypatch):
    """The other ranks have not heard of it: answering yes on this rank alone would part them."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    stop = StopRequest()
    stop.install()
    assert not stop.agreed(None)
    assert stop.agreed(None)


def test_another_ranks_request_stops_this_one(monkeypatch):
    """For its reason, so that whoever reads the marker knows whether the run is to be started again."""
    wish = REASONS.index("time budget")
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda flag, **_: flag.clamp_(min=wish))
    stop = StopRequest()
    assert stop.agreed(None) and stop.reason == "time budget"
    for own, common in (("SIGTERM", "time budget"), ("SIGINT", "SIGINT")):
        stop = StopRequest()
        stop.ask(own)
        assert stop.agreed(None) and stop.reason == common


def test_time_budget(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    assert not StopRequest(max_minutes=10).agreed(None)
    assert StopRequest(max_minutes=1e-9).agreed(None)
    assert not StopRequest(max_minutes=0).agreed(None)


def test_after_the_run_repeated_requests_do_not_kill_the_process_that_ends():
    code = """if True:
        import os, subprocess, time
        from trainer.signals import StopRequest
        stop = StopRequest()
        stop.install()
        stop.dismiss()
        subprocess.Popen(["sh", "-c", f"while kill -USR1 {os.getpid()} 2>/dev/null; do :; done"])
        time.sleep(0.2)
        """
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
def test_work_that_may_be_interrupted_anywhere_is_left_at_once(handlers):
    stop = StopRequest()
    stop.install()
    with pytest.raises(StopRequested), stop.at_once():
        try:
            os.kill(os.getpid(), signal.SIGUSR1)
        except Exception:
            pytest.fail("taken for an error")
    os.kill(os.getpid(), signal.SIGUSR1)
    assert stop.reason == "SIGUSR1"
    with pytest.raises(StopRequested), stop.at_once():
        pytest.fail("begun although there was a request")


def test_files_ask_to_stop_and_to_save(tmp_path, monkeypatch):
    monkeypatch.setattr(signals, "_LOOK_EVERY", 0.0)
    stop = StopRequest()
    stop.watch_folder(tmp_path)
    assert not stop.wanted and not stop.take_save()
    (tmp_path / "save").touch()
    assert stop.take_save() and not stop.take_save() and not stop.wanted
    (tmp_path / "stop").touch()
    assert stop.wanted and stop.by_file and not list(tmp_path.iterdir())
    other = StopRequest()
    other.ask("SIGTERM")
    assert not other.by_file
