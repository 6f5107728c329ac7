"""Whether a resumed run is the same bit by bit, and a run that is killed while it saves goes on: the tests of it.

    python benchmarks/resume.py

Training with several ranks is interrupted and resumed, and must end with the very weights of a run that was not. It is
killed in every phase of a save, and must go on from a whole checkpoint. Every kind of damage to a checkpoint must be
noticed.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from xml.etree import ElementTree

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.report import ROOT, Report, parser

TESTS = ("tests/trainer/test_run.py::test_interrupted_run_resumes_to_the_same_weights[2]",
         "tests/trainer/test_checkpoint.py::test_killed_once_in_every_phase_of_a_save",
         "tests/trainer/test_checkpoint.py::test_every_damage_is_noticed")


def verdicts(tests: Sequence[str], *options: str) -> list[tuple[str, str]]:
    """Runs pytest: (test, "passed", "failed" or "skipped") for each. Exits where it ran none."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tests.xml"
        subprocess.run([sys.executable, "-m", "pytest", "-q", f"--junitxml={file}", *options, *tests], cwd=ROOT)
        cases = ElementTree.parse(file).getroot().findall(".//testcase") if file.exists() else []
    if not cases:
        sys.exit("pytest ran no test: see above")
    return [(case.get("name").replace("_", " "),
             "passed" if not len(case) else "skipped" if case.find("skipped") is not None else "failed")
            for case in cases]


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--tests", nargs="+", default=TESTS, help="pytest's names of them")
    arguments = options.parse_args()
    report = Report("resume", __doc__)
    found = verdicts(arguments.tests)
    report.table("Tests", ["test", "verdict"], found)
    report.row("failed", "tests that did not pass", sum(verdict != "passed" for _, verdict in found), "")
    report.write(arguments.json)


if __name__ == "__main__":
    main()
