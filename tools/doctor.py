"""Says what this machine can train, which kernels `auto` would take, and why the others not.

    python tools/doctor.py            aligned text; exit code 0 if training can run here, 80 if not
    python tools/doctor.py --json     the same for machines

Each line begins with

    ok      there, and used where it serves
    note    not there, or unusual: training works without it, and the line says what for it would be
    FAILS   training cannot run before this is mended

Nothing is changed, and no network is used. Run it with the Python that is to train, in the folder of the run, and on
a cluster on a compute node: `srun --gres=gpu:1 .venv/bin/python tools/doctor.py`.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
import contextlib
import importlib
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import NamedTuple

from tools.command import run
from trainer.errors import ExitCode
from trainer.parser import Parser

OK, NOTE, FAILS = "ok", "note", "FAILS"
_REQUIREMENTS = Path(__file__).resolve().parents[1] / "requirements.txt"
_VENV = _REQUIREMENTS.with_name(".venv")
_PYTHON = (3, 11)
_GB = 1e9
_MUCH_SHARED_MEMORY, _MUCH_DISK = 1 * _GB, 5 * _GB
_LAUNCHERS = {"deepspeed": "one machine", "torchrun": "one machine or several", "mpirun": "MPI clusters",
              "srun": "SLURM, as in slurm/train_8node.sh"}


class Finding(NamedTuple):
    """One line of the report."""

    state: str
    area: str
    name: str
    text: str


def versions(requirements: str) -> Iterator[Finding]:
    """Python and the packages pinned in `requirements` (the text of requirements.txt), against those installed."""
    good = sys.version_info >= _PYTHON
    yield Finding(OK if good else FAILS, "versions", "python", platform.python_version()
                  + ("" if good else f"; {'.'.join(map(str, _PYTHON))} or newer is needed"))
    if (_VENV / "bin" / "python").exists() and Path(sys.prefix).resolve() != _VENV.resolve():
        yield Finding(NOTE, "versions", "environment",
                      f"{sys.prefix}, not the one that `make setup` made: . .venv/bin/activate")
    for name, wanted in re.findall(r"^([\w.-]+)==([\w.]+)", requirements, flags=re.MULTILINE):
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(FAILS, "versions", name, f"not installed: {sys.executable} -m pip install {name}=={wanted}")
            continue
        same = found.partition("+")[0] == wanted
        yield Finding(OK if same else NOTE, "versions", name, found if same else
                      f"{found}; tested with {wanted}: {sys.executable} -m pip install {name}=={wanted}")


def imports() -> Iterator[Finding]:
    """Whether torch and DeepSpeed can be loaded; both may be installed and still lack a library."""
    for name in ("torch", "deepspeed"):
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                importlib.import_module(name)
        except Exception as error:  # whatever its initialisation stumbles over
            yield Finding(FAILS, "versions", f"import {name}", f"{type(error).__name__}: {_one_line(error)}")


def devices() -> Iterator[Finding]:
    """GPUs, cores, memory, allocator."""
    import torch

    from model.allocator import SETTINGS, keep_freed_memory

    for index in range(torch.cuda.device_count()):
        gpu = torch.cuda.get_device_properties(index)
        yield Finding(OK, "devices", f"GPU {index}", f"{gpu.name}, {gpu.total_memory / _GB:.0f} GB, compute capability "
                      f"{gpu.major}.{gpu.minor}")
    if not torch.cuda.is_available():
        why = (f"this torch is built for CUDA {torch.version.cuda}, but finds no usable GPU or driver: see nvidia-smi"
               if torch.version.cuda else "this torch is built without CUDA")
        yield Finding(NOTE, "devices", "GPU", f"none: {why}. Training runs on the CPU")
    cores = len(os.sched_getaffinity(0))
    yield Finding(OK, "devices", "CPU", f"{cores} core{'s' * (cores > 1)} for this process, {platform.machine()}")
    yield Finding(OK, "devices", "RAM", f"{_memory() / _GB:.1f} GB")
    kept = keep_freed_memory()
    settings = " ".join(name for name in SETTINGS if name in os.environ)
    why = f"as {settings} in the environment says" if settings else "not glibc"
    yield Finding(OK if kept else NOTE, "devices", "allocator", "glibc, keeps the memory that tensors free" if kept else
                  f"{why}: on a CPU long documents are slower, where freed memory goes back to the system")


def kernels() -> Iterator[Finding]:
    """Every backend of attention and experts in the precisions that training uses, for the `base` preset's widths."""
    import torch

    from model.attention import backends as attention
    from model.moe import backends as moe
    from trainer.config_load import load

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = load("base").model
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        parts = {"attention": (attention.UNAVAILABLE, (device, dtype, model.head_dim)),
                 "experts": ({name: backend.unavailable for name, backend in moe.BACKENDS.items()},
                             (device, dtype, model.width, model.moe.ffn))}
        for part, (refusals, case) in parts.items():
            chosen = None
            for name, unavailable in refusals.items():
                reason = unavailable(*case)
                if reason is None and chosen is None:
                    chosen = name
                remark = moe.remark(name) if part == "experts" and reason is None else ""
                yield Finding(NOTE if reason else OK, f"kernels on {device.type}", f"{part} {precision} {name}",
                              f"cannot run: {reason}" if reason else
                              ("taken by auto" if name == chosen else "can run") + remark)


def communication() -> Iterator[Finding]:
    """Backends of torch.distributed, and the shared memory that NCCL uses between the GPUs of a machine."""
    import torch

    cuda = torch.cuda.is_available()
    gloo = torch.distributed.is_available() and torch.distributed.is_gloo_available()
    nccl = torch.distributed.is_available() and torch.distributed.is_nccl_available()
    yield Finding(OK if gloo else FAILS, "communication", "gloo", "serves CPUs, and decisions of all ranks" if gloo else
                  "this torch is built without it: install one of PyTorch's own wheels")
    yield Finding(OK if nccl else FAILS if cuda else NOTE, "communication", "nccl", "serves GPUs" if nccl else
                  "this torch is built without it; only GPUs need it")
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free
        enough = free >= _MUCH_SHARED_MEMORY
        yield Finding(OK if enough else NOTE, "communication", "shared memory", f"{free / _GB:.1f} GB free" + (
            "" if enough else "; several GPUs of one machine need about 1 GB: start the container with --shm-size=8g"))


def compiler() -> Iterator[Finding]:
    """What DeepSpeed builds its CPU optimizer with, which only the offload of the optimizer uses."""
    for name, found in (("C++ compiler", _program(os.environ.get("CXX", "c++")) or _program("g++")),
                        ("ninja", _program("ninja"))):
        yield Finding(OK if found else NOTE, "compiler", name,
                      found or "not found; only ds_configs/zero2_offload.json needs it")


def storage(folder: Path) -> Iterator[Finding]:
    """Whether a run can write into `folder`, and how much."""
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"\0" * 4096)
            file.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        yield Finding(FAILS, "storage", str(folder), f"cannot be written: {error.strerror}. Start from another folder, "
                      "or give --run_dir and data.cache_dir elsewhere")
        return
    enough = free >= _MUCH_DISK
    yield Finding(OK if enough else NOTE, "storage", str(folder), f"can be written, {free / _GB:.1f} GB free" + (
        "" if enough else "; a checkpoint of the base preset takes about 16 bytes for each parameter"))


def launchers() -> Iterator[Finding]:
    """Programs that start several ranks. One rank needs none: `python trainer/run.py`."""
    for name, purpose in _LAUNCHERS.items():
        found = _program(name)
        yield Finding(OK if found else NOTE, "launchers", name, found or f"not found; serves {purpose}")


def examine(folder: Path) -> list[Finding]:
    """All findings. What needs torch is left out where torch or DeepSpeed cannot be loaded."""
    findings = [*versions(_REQUIREMENTS.read_text()), *imports()]
    if not any(finding.name.startswith("import") for finding in findings):
        for area in (devices, kernels, communication):
            findings += area()
    return [*findings, *compiler(), *storage(folder), *launchers()]


def to_text(findings: list[Finding]) -> str:
    """Aligned lines under a heading for each area, and the verdict."""
    width = max(len(finding.name) for finding in findings)
    lines, area = [], None
    for finding in findings:
        if finding.area != area:
            area = finding.area
            lines += ["", area]
        lines.append(f"  {finding.state:<5}  {finding.name:<{width}}  {finding.text}")
    failures = sum(finding.state == FAILS for finding in findings)
    verdict = "training can run here" if not failures else f"training cannot run here: mend {failures} thing(s) above"
    return "\n".join([*lines[1:], "", verdict])


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object: can_train, and the findings")
    return parser


def main() -> None:
    args = build_parser().parse_args()
    findings = examine(Path.cwd())
    can_train = not any(finding.state == FAILS for finding in findings)
    print(json.dumps({"can_train": can_train, "findings": [finding._asdict() for finding in findings]}, indent=1)
          if args.json else to_text(findings))
    sys.exit(ExitCode.FINISHED if can_train else ExitCode.CONFIG)


def _program(name: str) -> str | None:
    """Where a program is: beside this Python, or on the PATH."""
    return shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)


def _memory() -> int:
    """Bytes of RAM, or the limit of this control group where that is less."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    with contextlib.suppress(OSError, ValueError):
        return min(total, int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return total


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    run(main)
