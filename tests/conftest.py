"""Prints how long each area of the tests took; makes shared fixtures known."""

from collections import defaultdict
from pathlib import Path

from tests.trainer.forked import launcher  # noqa: F401


def pytest_terminal_summary(terminalreporter):
    areas = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            if hasattr(report, "duration"):
                areas[str(Path(report.nodeid.split("::")[0]).parent)] += report.duration
    terminalreporter.section("seconds by area")
    for area, seconds in sorted(areas.items()):
        terminalreporter.write_line(f"{seconds:8.1f}  {area}")
