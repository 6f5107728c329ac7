"""The two tools that `make train` ends with, on an exported model that was never trained."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

from model.diffusion_lm import DiffusionLM
from tests.trainer.launching import ROOT, SMALL, write_corpus
from trainer.config_load import load
from trainer.data.prepare import prepare
from trainer.export import read_model, write_model


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run's folder with nothing but its model."""
    folder = tmp_path_factory.mktemp("tools")
    settings = {**SMALL, **write_corpus(folder)}
    overrides = [f"{key}={value}" for key, value in {**settings, "data.test": settings["data.valid"]}.items()]
    run = load("tiny", overrides=overrides)
    vocabulary = prepare(run.data, splits=("train",)).vocabulary
    run = replace(run, model=replace(run.model, vocab_size=vocabulary.size))
    model = DiffusionLM(run.model)
    model.init_weights(0)
    write_model(folder / "model", run, model.state_dict(), vocabulary.path, {"step": 0})
    return folder


def tool(name: str, *arguments: object, expect: int = 0) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / f"{name}.py"), *map(str, arguments)], text=True,
                          capture_output=True, cwd="/", timeout=120)
    assert done.returncode == expect, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    return done.stdout + done.stderr


def test_an_exported_model_comes_back_as_it_was(run_dir):
    model, vocabulary, run = read_model(run_dir / "model")
    other = DiffusionLM(run.model)
    other.init_weights(0)
    assert vocabulary.size == run.model.vocab_size and not model.training
    assert all(torch.equal(one, two) for one, two in
               zip(model.state_dict().values(), other.state_dict().values(), strict=True))


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
])
def test_mistakes_are_one_line(run_dir, arguments, expect, message):
    broken = run_dir / "broken.jsonl"
    broken.write_text('{"text": "a", "source": "b", "reference": "c"}\n{"text": "a"}\n')
    arguments = [part.format(run=run_dir, broken=broken) for part in arguments]
    printed = tool(*arguments, expect=expect)
    assert message in printed and len(printed.strip().splitlines()) == 1
