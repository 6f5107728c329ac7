"""Every benchmark at small sizes, as a process of its own: it ends well and writes what the page needs."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks.page import TITLES, page_text
from benchmarks.report import ROOT

SMALL = {
    "attention": ["--lengths", "256", "512", "--dense_limit", "256", "--patterns_at", "512", "--repeats", "1"],
    "moe": ["--most_tokens", "1500", "--repeats", "1"],
    "step": ["--lengths", "256", "--tokens", "512", "--growth", "512", "4096", "--repeats", "1"],
    "sampling": ["--source", "256", "--joint_steps", "1", "--repeats", "1"],
    "data": ["--megabytes", "4", "--workers", "1", "--steps", "5"],
    "checkpoint": ["--gigabytes", "0.02"],
    "resume": ["--tests", "tests/trainer/test_topology.py"],
    "balance": ["--steps", "6"],
    "scaling": ["--ranks", "2", "--steps", "15"],
    "gpu": ["--tiny", "--repeats", "1"],
}
KEYS = {"attention": "of_dense.256", "moe": "1500.192.256.2.4", "step": "long_doc.256", "sampling": "cached.256",
        "data": "exposed", "checkpoint": "waits", "resume": "failed", "balance": "variation",
        "scaling": "2.zero3.of_ideal", "gpu": "step.of_dense"}
FAST = ("gpu",)


def test_every_part_is_here():
    assert set(SMALL) == set(TITLES) == set(KEYS)


@pytest.mark.parametrize("part", [part if part in FAST else pytest.param(part, marks=pytest.mark.slow)
                                  for part in SMALL])
def test_runs(part, tmp_path):
    file = tmp_path / f"{part}.json"
    more = ["--out", str(tmp_path / "runs")] if part == "balance" else []
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run([sys.executable, f"benchmarks/{part}.py", *SMALL[part], *more, "--json", str(file)], cwd=ROOT,
                          capture_output=True, text=True, timeout=600, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "FAILED" not in done.stdout
    found = json.loads(file.read_text())
    rows = {row["key"]: row for row in found["rows"]}
    row = rows[f"{found['part']}.{KEYS[part]}"]
    assert row["low"] is None or row["low"] <= row["value"] <= row["high"]
    assert all(len(line) == len(table["columns"]) for table in found["tables"] for line in table["rows"])
    assert row["what"] in page_text({part: found}, "plots")
