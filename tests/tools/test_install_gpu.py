"""The installer of GPU kernels, with a pretended pip: what it runs, and what it does when builds fail."""

import io
import sys
import tarfile

import pytest

from model.errors import ConfigError
from tests.trainer.launching import ROOT
from tools import command, install_gpu

WANTED = install_gpu.pins((ROOT / "requirements-gpu.txt").read_text())
CUMSUM = "ExclusiveSum(items,\n\t stream,\n\t debug_synchronous));\n InclusiveSum(items, stream, debug_synchronous));"
SETUP = "if 'cu' in torch.__version__ and CUDA_HOME is not None:\n    ext_modules = [1]\n"


def archive(folder, files):
    with tarfile.open(folder / "megablocks-0.10.0.tar.gz", "w:gz") as made:
        for name, text in files.items():
            entry = tarfile.TarInfo(f"megablocks-0.10.0/{name}")
            entry.size = len(text)
            made.addfile(entry, io.BytesIO(text.encode()))


class Pip:
    """Records commands; `download` writes the archive, and whatever contains a word of `fails` fails once."""

    def __init__(self, folder, fails=(), cumsum=CUMSUM):
        self.folder, self.fails, self.cumsum, self.commands, self.setups = folder, list(fails), cumsum, [], []

    def __call__(self, command, additions):
        self.commands.append(install_gpu.shown(command, additions))
        if "download" in command:
            archive(self.folder, {"csrc/cumsum.h": self.cumsum, "setup.py": SETUP})
        if command[-1] == str(self.folder / "megablocks-0.10.0"):
            source = self.folder / "megablocks-0.10.0"
            assert "debug_synchronous" not in (source / "csrc" / "cumsum.h").read_text()
            self.setups.append((source / "setup.py").read_text())
        failed = next((word for word in self.fails if word in command[-1]), None)
        if failed:
            self.fails.remove(failed)
        return failed is None


def test_without_a_gpu_it_refuses_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["install_gpu.py"])
    monkeypatch.setattr(install_gpu, "capability", lambda: None)
    with pytest.raises(SystemExit) as caught:
        command.run(install_gpu.main)
    printed = capsys.readouterr()
    assert caught.value.code == 80 and printed.out == "" and len(printed.err.splitlines()) == 1
    assert "no CUDA device" in printed.err and "--dry_run" in printed.err


def test_a_dry_run_lists_every_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["install_gpu.py", "--dry_run"])
    install_gpu.main()
    listed = capsys.readouterr().out
    commands = [line for line in listed.splitlines() if line.startswith("$ ")]
    assert len(commands) == 5 and all("--no-deps --no-build-isolation" in line for line in commands)
    assert all(pin in listed for pin in WANTED.values())


def test_where_all_compiles_the_extension_stays(tmp_path):
    pip = Pip(tmp_path)
    install_gpu.install(WANTED, (8, 6), tmp_path, pip, dry_run=False)
    assert len(pip.commands) == 5 and pip.setups == [SETUP]
    assert any(line.startswith("$ FLASH_ATTN_CUDA_ARCHS=80 ") for line in pip.commands)


def test_what_does_not_compile_is_replaced_and_said(tmp_path, capsys):
    pip = Pip(tmp_path, fails=["megablocks-0.10.0", "grouped-gemm"])
    install_gpu.install(WANTED, (9, 0), tmp_path, pip, dry_run=False)
    assert [setup.startswith("if False:") for setup in pip.setups] == [False, True]
    printed = capsys.readouterr().out
    assert "MegaBlocks' extension does not compile here" in printed and "grouped-gemm does not compile" in printed


def test_a_source_it_does_not_know_is_left_alone(tmp_path):
    with pytest.raises(ConfigError, match=r"cumsum\.h is not the file this script knows .*found 0 times"):
        install_gpu.install(WANTED, (9, 0), tmp_path, Pip(tmp_path, cumsum="InclusiveSum(stream)"), dry_run=False)


def test_without_a_download_it_stops(tmp_path):
    with pytest.raises(ConfigError, match="could not be downloaded"):
        install_gpu.install(WANTED, (9, 0), tmp_path, lambda command, additions: False, dry_run=False)


def test_a_failing_command_shows_its_end(capsys):
    code = "import sys; print('first\\n' * 30 + 'last'); sys.exit(3)"
    assert not install_gpu.execute([sys.executable, "-c", code], {"A": "1"})
    printed = capsys.readouterr().out
    assert printed.startswith("$ A=1 ") and "    last\n    exit code 3" in printed and printed.count("first") == 15


@pytest.mark.parametrize("probe", ["print('flash-attn: cannot be used: why')", "raise OSError('why')"])
def test_what_cannot_be_used_is_an_error_at_the_end(monkeypatch, probe):
    monkeypatch.setattr(install_gpu, "_PROBE", probe)
    with pytest.raises(ConfigError, match="not everything can be used"):
        install_gpu.report()
    monkeypatch.setattr(install_gpu, "_PROBE", "print('flash-attn: ready')")
    install_gpu.report()
