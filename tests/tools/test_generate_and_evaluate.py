"""The two tools that `make train` ends with, on an exported model that was never trained."""

import importlib
import io
import json
import sys
from contextlib import redirect_stderr, redirect_stdout

import pytest

from tests.tools.exported import exported_run
from tools.command import run


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    return exported_run(tmp_path_factory.mktemp("tools"))


def tool(name: str, *arguments: object, expect: int = 0) -> str:
    """What a tool prints, started in another folder; it must end with the exit code `expect`."""
    printed, code = io.StringIO(), 0
    with redirect_stdout(printed), redirect_stderr(printed), pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [name, *map(str, arguments)])
        patch.chdir("/")
        try:
            run(importlib.import_module(f"tools.{name}").main)
        except SystemExit as ended:
            code = ended.code
    assert code == expect and "Traceback" not in printed.getvalue(), printed.getvalue()
    return printed.getvalue()


def test_generation_resumes_and_its_texts_are_scored(run_dir):
    output = run_dir / "out.jsonl"
    tool("generate", run_dir, "--output", output, "--batch", 4)
    whole = output.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["document"] for record in records] == list(range(6))
    assert all(record["source"] and record["reference"] and "text" in record for record in records)

    lines = whole.splitlines(keepends=True)
    output.write_text("".join(lines[:3]) + lines[3][:20])  # killed while writing the fourth
    tool("generate", run_dir, "--output", output, "--batch", 2)
    assert output.read_text() == whole

    printed = tool("evaluate", output)
    scores = json.loads(output.with_suffix(".scores.json").read_text())
    assert {"model", "greedy extractive oracle"} < scores.keys() and scores["model"]["documents"] == 6
    assert output.with_suffix(".scores.md").read_text() in printed

    other = output.with_name("other.jsonl")
    other.write_text("".join(json.dumps({**record, "text": record["reference"]}) + "\n" for record in records))
    printed = tool("evaluate", output, other)
    assert f"| {other} | +" in printed and "against" in printed
    assert json.loads(other.with_suffix(".scores.json").read_text())["model"]["bleu"] > 99
    other.write_text("".join(whole.splitlines(keepends=True)[:2]))
    assert "other references" in tool("evaluate", output, other, expect=81)


def test_a_file_of_other_settings_is_not_continued(run_dir):
    output = run_dir / "seeded.jsonl"
    tool("generate", run_dir, "--output", output, "--limit", 2)
    assert "other settings" in tool("generate", run_dir, "--output", output, "--limit", 2, "--seed", 5, expect=80)


@pytest.mark.parametrize("arguments, expect, message", [
    (["generate", "/nowhere"], 84, "is no exported model"),
    (["generate", "{run}", "--input", "/nowhere.jsonl"], 81, "/nowhere.jsonl"),
    (["evaluate", "/nowhere.jsonl"], 81, "cannot be read"),
    (["evaluate", "{broken}"], 81, "broken.jsonl:2"),
    (["evaluate", "{numbers}"], 81, "numbers.jsonl:1: text, source and reference must be strings"),
    (["evaluate", "{broken}", "--resamples", "0"], 80, "--resamples: must be at least 1"),
    (["generate", "{run}", "--output", "{run}"], 80, "--output: {run} cannot be written: Is a directory"),
])
def test_mistakes_are_one_line(run_dir, arguments, expect, message):
    broken = run_dir / "broken.jsonl"
    broken.write_text('{"text": "a", "source": "b", "reference": "c"}\n{"text": "a"}\n')
    numbers = run_dir / "numbers.jsonl"
    numbers.write_text('{"text": "a", "source": "b", "reference": 7}\n')
    arguments = [part.format(run=run_dir, broken=broken, numbers=numbers) for part in arguments]
    printed = tool(*arguments, expect=expect)
    assert message.format(run=run_dir) in printed and len(printed.strip().splitlines()) == 1


def test_scores_that_cannot_be_kept_are_printed(tmp_path):
    texts = tmp_path / "a.jsonl"
    texts.write_text('{"text": "a", "source": "b", "reference": "c"}\n')
    texts.with_suffix(".scores.md").mkdir()
    printed = tool("evaluate", texts, expect=80)
    assert "| model |" in printed
    assert printed.endswith(f"error: generations: {tmp_path}/a.scores.md cannot be written: Is a directory\n")
