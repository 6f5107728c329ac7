"""An environment with two packages and what they need, made of links to the installed ones."""

import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement


def link_packages(folder: Path, wanted: list[str]) -> None:
    """Puts links to `wanted` and everything that they depend on into `folder`."""
    seen, waiting = set(), list(wanted)
    while waiting:
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        try:
            found = distribution(name)
        except PackageNotFoundError:  # a dependency that this platform does without
            continue
        for top in {file.parts[0] for file in found.files} - {"..", "__pycache__"}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        requirements = map(Requirement, found.requires or ())
        waiting += [each.name for each in requirements if each.marker is None or each.marker.evaluate({"extra": ""})]


def run_alone(packages: Path, script: str, *arguments: object, home: Path) -> str:
    """What a Python prints that finds modules in the standard library and in `packages` only."""
    begin = f"import sys; sys.path.append({str(packages)!r})\n"
    done = subprocess.run([sys.executable, "-I", "-S", "-c", begin + script, *map(str, arguments)], cwd=home, text=True,
                          env={"HOME": str(home), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PATH": "/usr/bin"},
                          capture_output=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
