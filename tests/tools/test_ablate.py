"""tools/ablate.py itself: a grid with a cell that fails, interrupted and resumed."""

import json
import signal
import subprocess
import sys
import time
import tomllib

import pytest

from tests.trainer.launching import ROOT, SMALL, write_corpus

SECONDS = 240
OWN = {key: value for key, value in SMALL.items() if not key.startswith("train.")}


@pytest.fixture(scope="module", params=["tokens = 96000", pytest.param("minutes = 0.1", marks=pytest.mark.slow)])
def place(request, tmp_path_factory):
    """A folder with documents and a grid."""
    place = tmp_path_factory.mktemp("ablate")
    (place / "made").mkdir()
    write_corpus(place / "made")
    (place / "made" / "test.jsonl").write_text((place / "made" / "valid.jsonl").read_text())
    settings = "\n".join(f"settings.{key} = {json.dumps(value)}" for key, value in OWN.items())
    (place / "grid.toml").write_text(f"""
        title = "Trial"
        question = "Does it run?"
        preset = "tiny"
        {request.param}
        {settings}
        [data.made]
        [[cells]]
        name = "good"
        [[cells]]
        name = "broken"
        settings.optim.lr = 1e30
        settings.train.max_skipped = 2
        [[samplers]]
        axes.steps = [2, 3]
        [[plots]]
        x = "sample.steps"
        y = "bleu"
        """)
    return place


def command(place, *more) -> list[str]:
    return [sys.executable, str(ROOT / "tools" / "ablate.py"), str(place / "grid.toml"), "--data", str(place),
            "--out", str(place / "out"), *map(str, more)]


def test_a_grid_is_interrupted_and_goes_on(place):
    process = subprocess.Popen(command(place), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=place)
    run = place / "out" / "runs" / "made" / "good" / "seed-0"
    deadline = time.monotonic() + SECONDS
    while not (run / "metrics.jsonl").exists() or '"train"' not in (run / "metrics.jsonl").read_text():
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=SECONDS)
    assert process.returncode == 130 and "the same command goes on" in said and "Traceback" not in said
    assert json.loads((run / "status.json").read_text())["status"] == "preempted"
    configured = (run / "config" / "run.toml").read_text()

    done = subprocess.run(command(place), capture_output=True, text=True, cwd=place, timeout=SECONDS)
    assert done.returncode == 1, done.stderr  # because of the broken cell
    failed, = [line for line in done.stderr.splitlines() if line.startswith("failed: ")]
    assert failed.startswith("failed: made, broken, seed 0: ") and "2 steps in a row were skipped" in failed
    assert "1 of 2 runs failed" in done.stderr and "Traceback" not in done.stderr
    assert "resumed from" in run.with_suffix(".log").read_text()
    assert (run / "config" / "run.toml").read_text() == configured

    made, = json.loads((place / "out" / "grid.json").read_text())["sets"]
    assert [(row["cell"], row["settings"]["sample.steps"]) for row in made["rows"]] == [("good", 2), ("good", 3)]
    values = made["rows"][0]["values"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert values["steps"] == [lines[-1]["step"]] == [tomllib.loads(configured)["train"]["steps"]]
    assert values["documents"] == [6]
    assert values["tokens"] == [sum(line["tokens"] for line in lines if line["kind"] == "train")]
    assert 0 < values["minutes"][0] < 1
    assert {"random training target", "copy of the source"} < made["trivial"].keys()
    page = (place / "out" / "grid.md").read_text()
    assert "| good, steps 2 |" in page and done.stdout.startswith(page.splitlines()[0])
    assert (place / "out" / "grid-made-0.svg").is_file()

    model = (run / "model" / "model.safetensors").stat().st_mtime_ns
    grid, test = place / "grid.toml", place / "made" / "test.jsonl"
    good = grid.read_text()
    grid.write_text(good.replace('name = "good"', 'name = "good"\nsettings.sample.temperature = 0.25'))
    test.write_text(test.read_text() + '{"src": "one more", "trg": "of these"}\n')
    subprocess.run(command(place), capture_output=True, cwd=place, timeout=SECONDS)
    made, = json.loads((place / "out" / "grid.json").read_text())["sets"]
    assert [(row["settings"]["sample.temperature"], row["values"]["documents"]) for row in made["rows"]] == [
        (0.25, [7]), (0.25, [7])]  # measured anew, of the same model
    page = (place / "out" / "grid.json").read_text()
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == model

    grid.write_text(good.replace("optim.eps = 1e-06", "optim.eps = 1e-07"))
    done = subprocess.run(command(place), capture_output=True, text=True, cwd=place, timeout=SECONDS)
    assert "was trained with optim.eps = 1e-06 (now 1e-07): choose another folder, or remove" in done.stderr
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == model
    assert "every run failed" in done.stderr and (place / "out" / "grid.json").read_text() == page

    grid.write_text(good)
    train = place / "made" / "train.jsonl"
    train.write_text(train.read_text() + '{"src": "one more", "trg": "of these"}\n')
    done = subprocess.run(command(place), capture_output=True, text=True, cwd=place, timeout=SECONDS)
    assert "was trained with other documents than" in done.stderr
    assert (run / "model" / "model.safetensors").stat().st_mtime_ns == model


@pytest.mark.parametrize("arguments, code, message", [
    (["--jobs", "1000"], 80, "--jobs: is 1000, but this process may use"),
    (["--data", "/nowhere"], 81, "Put it in a folder and name the folder above with --data"),
])
def test_mistakes_are_one_line(place, arguments, code, message):
    done = subprocess.run(command(place, *arguments, "--out", place / "other"), capture_output=True, text=True,
                          cwd=place, timeout=SECONDS)
    assert done.returncode == code and message in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
