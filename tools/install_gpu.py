"""Install flash-attn and MegaBlocks on a CUDA machine, beside the PyTorch that is there.

    make gpu                                         # into .venv
    python tools/install_gpu.py                      # into the Python that runs it
    python tools/install_gpu.py --dry_run            # only list the commands, on any machine

Versions are those of requirements-gpu.txt. MegaBlocks demands an older torch, so everything goes in without its
dependencies (`pip check` will name that). Each command is printed before it runs. What cannot be compiled here, for
want of nvcc or of the right one, is replaced by PyTorch where that is possible, and said. flash-attn takes a ready
wheel where its authors publish one for this torch, and otherwise compiles for up to an hour.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import os
import re
import shlex
import subprocess
import tarfile
import tempfile
from collections.abc import Callable

from model.errors import ConfigError
from tools.command import run

_ROOT = Path(__file__).resolve().parents[1]
_PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
_INSTALL = [*_PIP, "install", "--no-deps", "--no-build-isolation"]
_SHOWN = (9, 0)
"""Compute capability that a dry run assumes where there is no GPU."""
# CUDA 13's CUB has no argument debug_synchronous any more.
_FOR_CUDA_13 = ("csrc/cumsum.h", r"stream,\s*debug_synchronous\)", "stream)", 2)
_WITHOUT_EXTENSION = ("setup.py", r"'cu' in torch\.__version__ and CUDA_HOME is not None", "False", 1)
_PROBE = """
import torch
from model.attention import flash_attn
from model.moe import megablocks
case = torch.device("cuda"), torch.bfloat16
for name, why, remark in (("flash-attn", flash_attn.unavailable(*case, 64), ""),
                          ("MegaBlocks", megablocks.unavailable(*case, 64, 64), megablocks.remark)):
    print(f"{name}: " + (f"cannot be used: {why}" if why else "ready " + (remark and remark())).strip())
"""

Execute = Callable[[list[str], dict[str, str]], bool]
"""Runs a command with additions to the environment; whether it succeeded."""


def pins(requirements: str) -> dict[str, str]:
    """Package -> `package==version` from the text of requirements-gpu.txt."""
    return {name: f"{name}=={version}" for name, version in
            re.findall(r"^([\w-]+)==([\w.]+)", requirements, flags=re.MULTILINE)}


def install(wanted: dict[str, str], capability: tuple[int, int], folder: Path, execute: Execute,
            dry_run: bool) -> None:
    """Installs what `wanted` pins. capability: of the GPU. folder: an empty one, for MegaBlocks' source."""
    execute([*_INSTALL, wanted["wheel"], wanted["einops"], wanted["stanford-stk"]], {})
    # Its kernels for 8.0 run on all of 8.x; 10.x and 12.x have one set each.
    execute([*_INSTALL, wanted["flash-attn"]], {"FLASH_ATTN_CUDA_ARCHS": f"{capability[0]}0"})

    execute([*_PIP, "download", "--no-deps", "--no-build-isolation", "--no-binary", "megablocks", "--dest", str(folder),
             wanted["megablocks"]], {})
    source = folder / wanted["megablocks"].replace("==", "-")
    if dry_run:
        print("  (unpack, leave out of csrc/cumsum.h what CUDA 13 no longer has, install; if its extension does not "
              "compile, again without it)")
    else:
        unpack(folder, source)
        edit(source, *_FOR_CUDA_13)
    if not execute([*_INSTALL, str(source)], {}):
        print("MegaBlocks' extension does not compile here: PyTorch does its work")
        edit(source, *_WITHOUT_EXTENSION)
        execute([*_INSTALL, str(source)], {})
    if not execute([*_INSTALL, wanted["grouped-gemm"]], {}):
        print("grouped-gemm does not compile here: PyTorch's grouped_mm does its work")


def unpack(folder: Path, source: Path) -> None:
    """The one archive in `folder`, which holds the folder `source`."""
    archives = list(folder.glob("*.tar.gz"))
    if len(archives) != 1:
        raise ConfigError("megablocks", f"its source could not be downloaded (see above): {folder} holds "
                          f"{len(archives)} archives")
    with tarfile.open(archives[0]) as archive:
        archive.extractall(folder, filter="data")
    assert source.is_dir(), source


def edit(source: Path, file: str, pattern: str, replacement: str, times: int) -> None:
    """Replaces a pattern that must be found as often as expected: another version would need another edit."""
    path = source / file
    text, found = re.subn(pattern, replacement, path.read_text())
    if found != times:
        raise ConfigError("megablocks", f"{path} is not the file this script knows ({pattern!r} found {found} times, "
                          f"not {times}): keep the version of requirements-gpu.txt")
    path.write_text(text)


def shown(command: list[str], additions: dict[str, str]) -> str:
    return "$ " + shlex.join([*(f"{name}={value}" for name, value in additions.items()), *command])


def list_only(command: list[str], additions: dict[str, str]) -> bool:
    print(shown(command, additions))
    return True


def execute(command: list[str], additions: dict[str, str]) -> bool:
    """Shows the command, then its last lines if it fails."""
    print(shown(command, additions), flush=True)
    done = subprocess.run(command, env={**os.environ, **additions}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          text=True, errors="replace")
    if done.returncode:
        print("".join(f"    {line}\n" for line in done.stdout.splitlines()[-15:]), end="")
        print(f"    exit code {done.returncode}")
    return done.returncode == 0


def capability() -> tuple[int, int] | None:
    """Of the first GPU; None where PyTorch sees none."""
    import torch

    return torch.cuda.get_device_capability() if torch.cuda.is_available() else None


def report() -> None:
    """What a new process can use now. ConfigError if that is not all."""
    done = subprocess.run([sys.executable, "-c", _PROBE], cwd=_ROOT, capture_output=True, text=True)
    print(done.stdout, end="")
    if done.returncode or "cannot be used" in done.stdout:
        raise ConfigError("make gpu", "not everything can be used (see above): training chooses among the others, "
                          f"python tools/doctor.py says which{done.stderr and ': ' + done.stderr.splitlines()[-1]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry_run", action="store_true", help="list the commands instead of running them")
    args = parser.parse_args()
    wanted, found = pins((_ROOT / "requirements-gpu.txt").read_text()), capability()
    if args.dry_run:
        print("" if found else f"no CUDA device here: commands for compute capability {_SHOWN[0]}.{_SHOWN[1]}")
        install(wanted, found or _SHOWN, Path("FOLDER"), list_only, dry_run=True)
        return
    if found is None:
        raise ConfigError("make gpu", "PyTorch sees no CUDA device, so there is nothing to install: CPUs need no more "
                          "than requirements.txt. On a GPU machine see nvidia-smi and `python tools/doctor.py`; "
                          "--dry_run lists the commands")
    with tempfile.TemporaryDirectory() as folder:
        install(wanted, found, Path(folder), execute, dry_run=False)
    report()


if __name__ == "__main__":
    run(main)
