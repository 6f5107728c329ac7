"""The doctor names what is there and what is missing, and its exit code says whether training can run."""

import importlib
import importlib.metadata
import json
import re
import subprocess
import sys
from collections import namedtuple

import pytest
import torch

from model.allocator import keep_freed_memory
from model.attention.backends import choose_backend as choose_attention
from model.moe.backends import choose_backend as choose_experts
from tests.trainer.launching import ROOT
from tools import doctor
from trainer.config_load import load


def states(findings) -> dict[str, str]:
    return {finding.name: finding.state for finding in findings}


def test_this_machine_can_train_and_auto_is_what_training_takes(tmp_path):
    """The tests train, so the doctor must say that it works here; a run without --json says the same."""
    command = [sys.executable, str(ROOT / "tools" / "doctor.py"), "--json"]
    result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    report = json.loads(result.stdout)
    assert report["can_train"] and str(tmp_path) in {finding["name"] for finding in report["findings"]}
    taken = [finding["name"] for finding in report["findings"] if finding["text"] == "taken by auto"]
    device, model = "cuda" if torch.cuda.is_available() else "cpu", load("base").model
    expected = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        attention = choose_attention("auto", device, dtype, model.head_dim)[0]
        experts = choose_experts("auto", device, dtype, model.width, model.moe.ffn)[0]
        expected += [f"attention {precision} {attention}", f"experts {precision} {experts}"]
    assert taken == expected


def test_help_names_exit_code_and_a_compute_node(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["doctor.py", "--help"])
    with pytest.raises(SystemExit) as caught:
        doctor.main()
    assert caught.value.code == 0
    printed = capsys.readouterr().out
    assert "80 if not" in printed and "srun" in printed


@pytest.mark.parametrize("found, state, text", [
    ("2.13.0", "ok", "2.13.0"),
    ("2.13.0+cu130", "ok", r"2\.13\.0\+cu130"),
    ("2.12.1", "note", "tested with 2.13.0: .* -m pip install torch==2.13.0"),
    (None, "FAILS", "not installed: .* -m pip install torch==2.13.0"),
])
def test_versions_are_held_against_the_pins(monkeypatch, found, state, text):
    def version(name):
        assert name == "torch"
        if found is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return found

    monkeypatch.setattr(importlib.metadata, "version", version)
    _, finding = doctor.versions("# comment\ntorch==2.13.0            # tensors\n")
    assert finding.state == state and re.search(text, finding.text)


def test_old_python_fails(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 9))
    assert states(doctor.versions(""))["python"] == "FAILS"


def test_settings_of_the_allocator_stand(monkeypatch):
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "1048576")
    finding = next(each for each in doctor.devices() if each.name == "allocator")
    assert finding.state == "note" and "as MALLOC_MMAP_THRESHOLD_ in the environment says" in finding.text
    assert not keep_freed_memory()


def test_every_pin_of_the_requirements_is_looked_at():
    text = (ROOT / "requirements.txt").read_text()
    pins = [line for line in text.splitlines() if line and not line.startswith("#")]
    assert len(list(doctor.versions(text))) == len(pins) + 1


def test_package_that_cannot_be_loaded_fails_and_spares_what_needs_it(monkeypatch, tmp_path):
    def import_module(name):
        if name == "deepspeed":
            raise OSError("libmpi.so.40:\n cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", import_module)
    findings = doctor.examine(tmp_path)
    broken = next(finding for finding in findings if finding.name == "import deepspeed")
    assert broken.state == "FAILS" and broken.text == "OSError: libmpi.so.40: cannot open shared object file"
    assert {finding.area for finding in findings} == {"versions", "compiler", "storage", "launchers"}
    assert doctor.to_text(findings).endswith("training cannot run here: mend 1 thing(s) above")


def test_unwritable_folder_ends_with_the_code_for_configuration(monkeypatch, capsys):
    monkeypatch.setattr(doctor.Path, "cwd", lambda: doctor.Path("/proc"))
    monkeypatch.setattr(sys, "argv", ["doctor.py"])
    with pytest.raises(SystemExit) as caught:
        doctor.main()
    assert caught.value.code == 80
    assert re.search(r"FAILS +/proc +cannot be written: ", capsys.readouterr().out)


def test_little_space_is_noted(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: usage(10 ** 9, 0, 64 * 10 ** 6))
    [disk] = doctor.storage(tmp_path)
    assert disk.state == "note" and "0.1 GB free" in disk.text
    shared = next(finding for finding in doctor.communication() if finding.name == "shared memory")
    assert shared.state == "note" and "--shm-size" in shared.text


def test_missing_programs_are_noted_with_their_purpose(monkeypatch):
    monkeypatch.setattr(doctor.shutil, "which", lambda name, path=None: None)
    assert set(states(doctor.launchers()).values()) == set(states(doctor.compiler()).values()) == {"note"}
    assert all("serves" in finding.text for finding in doctor.launchers())
