"""Measures what is not measured yet, part by part, and writes docs/benchmarks.md. `make bench` calls it.

    python benchmarks/run.py [PART ...]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.page import PAGE, RESULTS, TITLES, write_page
from benchmarks.report import ROOT, fingerprint, machine

PARTS = [part for part in TITLES if part != "gpu"]


def is_measured(part: str, file: Path) -> bool:
    """Whether the file holds figures of today's code from this machine, in full."""
    if not file.exists():
        return False
    found = json.loads(file.read_text())
    return (found["command"], found["code"], found["machine"]) == (
        f"python benchmarks/{part}.py", fingerprint(part), machine())


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("parts", nargs="*", metavar="PART", help=f"of {', '.join(PARTS)} (default: all)")
    options.add_argument("--again", action="store_true", help="measure even what is measured already")
    arguments = options.parse_args()
    unknown = sorted(set(arguments.parts) - set(PARTS))
    if unknown:
        options.error(f"there is no part {', '.join(unknown)}; there are {', '.join(PARTS)}")
    failed = []
    for part in arguments.parts or PARTS:
        file = RESULTS / f"{part}.json"
        if not arguments.again and is_measured(part, file):
            print(f"== {part}: measured already, {file.relative_to(ROOT)}", flush=True)
            continue
        print(f"== {part}", flush=True)
        began = time.monotonic()
        done = subprocess.run([sys.executable, f"benchmarks/{part}.py", "--json", str(file)], cwd=ROOT,
                              env={**os.environ, "OMP_NUM_THREADS": "1"})
        print(f"== {part}: {time.monotonic() - began:.0f} s", flush=True)
        if done.returncode:
            failed.append(part)
    write_page()
    print(f"written: {PAGE.relative_to(ROOT)}")
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; their older figures, if any, stay on the page")


if __name__ == "__main__":
    main()
