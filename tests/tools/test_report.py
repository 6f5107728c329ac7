"""The report on small run folders written by hand, its parts that need a model, and the page in a real browser."""

import json
import math
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from model.packing import generation_batch
from model.sampling import SamplerSettings, sample
from tests.model.small import small_config, small_model
from tests.tools.test_generate_and_evaluate import run_dir, tool  # noqa: F401
from tests.trainer.launching import ROOT
from tools.reporting import charts
from tools.reporting.runs import read_run
from trainer.errors import CheckpointError, DataError

HOSTILE = "<script>broken()</script> & \"quotes\" 文書"
LEVELS = [-0.5, -1.5, -2.5]
BY_LEVEL = {"model": [1.0, 2.0, 3.0], "shuffled_sources": [1.1, 2.2, 3.3], "context_free": [1.5, 2.5, 3.5]}
SCORES = {"documents": 2, "rouge1": 17.7, "rouge2": 2.0, "rougeL": 13.1, "distinct1": 34.8, "distinct2": 76.9,
          "words": 26.5, "empty": 0, "short": 1}


def train_line(step: int, seconds: float) -> dict:
    return {"kind": "train", "step": step, "loss": 5 - step / 100, "cross_entropy": 4.9 - step / 100, "balance": 1.02,
            "router_z": 3.0, "cross_entropy_by_noise": [1 + step / 50, None, 3.0],
            "expert_tokens": [[500, 250, 250, 0], [250, 250, 250, 250]],
            "expert_share_by_position": [[[0.25, 0.75, 0.0, 0.0]] * 10, [[0.25] * 4] * 10],
            "expert_share_by_noise": [[[0.0, 0.0, 0.25, 0.75]] * 10, [[0.25] * 4] * 10],
            "router_entropy_by_layer": [1.1, 1.3], "dead_experts": 1,
            "expert_variation_worst": 0.7, "router_entropy": 1.2, "tokens_per_s": 1000.0 * step,
            "trained_tokens_per_s": 300.0 * step,
            "memory_gb": 1.25, "lr": 1e-3, "gradient_norm": math.nan if step == 20 else 0.5, "epoch": 0.5,
            "seconds": seconds}


def write_run(folder: Path, *, lines: bool = True, finished: bool = True, texts: bool = True) -> Path:
    (folder / "config").mkdir(parents=True)
    (folder / "config" / "run.toml").write_text(
        'preset = "tiny"\nrecipe = "long_doc"\n[model.diffusion]\nschedule = "log_snr"\n[train]\nsteps = 40\n')
    (folder / "config" / "environment.json").write_text(json.dumps({
        "command": ["trainer/run.py", "--local_rank=0", "--preset", "tiny"], "kernels": {"attention": "cpu_band (why)"},
        "commit": "0123456789abcdef", "python": "3.11.7", "device": "cpu", "packages": {"torch": "2.13.0"}}))
    if lines:
        records = [train_line(10, 60.0), train_line(20, 130.0), train_line(30, 50.0), train_line(40, 100.0)]
        means = {f"cross_entropy_{name}": sum(values) / 3 for name, values in BY_LEVEL.items()}
        records += [{"kind": "eval", "step": step, **means, "log_snr": LEVELS, "by_level": BY_LEVEL, "tokens": 9,
                     "levels_averaged": 3} for step in (20, 40)]
        records.append({"kind": "event", "step": 20, "event": "experts starve", "layer_and_expert": [[0, 3]]})
        text = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(text + '{"kind": "train", "st')  # its writer is in the middle of a line
    if finished:
        (folder / "model").mkdir()
        (folder / "status.json").write_text('{"status": "done", "step": 40, "reason": null}')
    if texts:
        (folder / "generations").mkdir()
        records = [{"document": n, "text": HOSTILE if n else "", "ended": n == 0, "source": f"source {n} {HOSTILE}",
                    "reference": f"reference\u2028 {n}"} for n in range(5)]
        (folder / "generations" / "test.jsonl").write_text(
            "".join(json.dumps(each, ensure_ascii=False) + "\n" for each in records))
        (folder / "generations" / "test.scores.json").write_text(
            json.dumps({"model": SCORES, "first 50 words": {**SCORES, "rougeL": 17.3}}))
        (folder / "generations" / "trace.json").write_text(json.dumps(
            {"document": 0, "log_snr": [-3.0, -2.0, -1.0], "texts": ["a the", "one the three", "one two three"]}))
    return folder


def report(*arguments: object, expect: int = 0) -> str:
    done = subprocess.run([sys.executable, str(ROOT / "tools" / "report.py"), *map(str, arguments)], text=True,
                          capture_output=True, cwd="/", timeout=60)
    assert done.returncode == expect, done.stdout + done.stderr
    return done.stdout + done.stderr


class Page(HTMLParser):
    """Text of the page, elements by tag, and whether every element is closed where it must be."""

    OPEN = frozenset(("meta", "link"))

    def __init__(self, path: Path):
        super().__init__()
        self.stack, self.text, self.elements = [], [], []
        self.source = path.read_text()
        self.feed(self.source)
        self.close()
        assert self.stack == []
        self.words = " ".join(" ".join(self.text).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in self.OPEN:
            self.stack.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.stack.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_a_finished_run_shows_every_part(tmp_path):
    run = write_run(tmp_path / "run")
    assert report(run).strip() == f"report in {run / 'report.html'}"
    page = Page(run / "report.html")
    headings = re.findall(r"<h2>(.*?)</h2>", page.source)
    assert headings == ["Evaluation", "A text emerges", "Samples", "Scores", "Losses", "Noise levels", "Experts",
                        "Optimisation", "Speed"]
    for words in ("tiny, long_doc", "40 of 40", "3 min 50 s", "cpu_band (why)", "torch 2.13.0", "0123456789ab ",
                  "first 50 words", "17.3", "reference 2", "log-SNR -2.50", "fills the canvas", "empty",
                  "trainer/run.py --preset tiny", "Layer 1, by position", "Layer 1, by noise", "Dead experts",
                  "Starved: expert 3 of layer 0 (step 20)."):
        assert words in page.words, words
    assert "class=missing" not in page.source and "log-SNR -1.50" not in page.words  # no training token fell there
    assert "<script" not in page.source and HOSTILE in page.words
    assert not re.search(r"(?:src|href)=[\"']?(?:https?:|//)|url\(|@import", page.source)
    plots = [attrs for tag, attrs in page.elements if tag == "svg" and attrs.get("class") == "plot"]
    assert len(plots) >= 18 and all(attrs["aria-label"] and attrs["role"] == "img" for attrs in plots)
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"<style>.*?</style>", "", page.source), re.IGNORECASE)


@pytest.mark.parametrize("parts, wanted", [
    ({"finished": False, "texts": False}, ["no generated texts, for want of a finished model",
                                           "finish it: trainer/run.py --preset tiny"]),
    ({"texts": False}, ["python tools/generate.py {run}", "python tools/generate.py {run} --trace"]),
    ({"lines": False, "finished": False, "texts": False}, ["no training metrics yet", "no evaluation yet"]),
])
def test_what_is_missing_is_said_with_its_command(tmp_path, parts, wanted):
    run = write_run(tmp_path / "run", **parts)
    report(run)
    words = Page(run / "report.html").words
    assert [line for line in wanted if line.format(run=run) not in words] == []


def test_a_trace_without_texts_is_missing(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "generations" / "trace.json").write_text('{"document": 0, "log_snr": [-3.0], "texts": []}')
    report(run)
    assert f"python tools/generate.py {run} --trace" in Page(run / "report.html").words


def test_texts_without_scores_ask_for_them(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "generations" / "test.scores.json").unlink()
    report(run)
    page = Page(run / "report.html")
    assert f"python tools/evaluate.py {run}/generations/test.jsonl" in page.words and "reference 1" in page.words


def test_lines_of_an_older_trainer_leave_parts_out(tmp_path):
    run = write_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text('{"kind": "train", "step": 5, "loss": 2.5}\n')
    report(run)
    page = Page(run / "report.html")
    assert "No cross-entropy by noise level" in page.words and "No use of experts" in page.words
    assert "<h2>Speed" not in page.source and "<h2>Optimisation" not in page.source


def test_several_runs_share_figures_and_tables(tmp_path):
    one, two = write_run(tmp_path / "a" / "run"), write_run(tmp_path / "b" / "run", texts=False)
    assert "--out" in report(one, two, expect=80)
    report(one, two, "--out", tmp_path / "both.html")
    page = Page(tmp_path / "both.html")
    assert f"{one} · {two}" in page.words and f"{two}, wrong source" in page.words
    assert f"{two}: no generated texts yet" in page.words
    swatches = [attrs for tag, attrs in page.elements if tag == "path" and attrs["class"].startswith("line c1")]
    assert swatches


@pytest.mark.parametrize("damage, expect, message", [
    (lambda run: shutil.rmtree(run), 84, "is no run's folder"),
    (lambda run: (run / "metrics.jsonl").write_text('{"kind": "train", "step": 1}\nnonsense\n'), 81, "metrics.jsonl:2"),
    (lambda run: (run / "metrics.jsonl").write_text('{"step": 1}\n'), 81, "metrics.jsonl:1: has no kind"),
    (lambda run: (run / "metrics.jsonl").write_text("5\n"), 81, "metrics.jsonl:1"),
    (lambda run: (run / "generations" / "trace.json").write_text("{"), 81, "trace.json"),
    (lambda run: (run / "config" / "run.toml").write_text("a ="), 81, "run.toml"),
    (lambda run: (run / "report.html").mkdir(), 80, "--out"),
])
def test_mistakes_are_one_line(tmp_path, damage, expect, message):
    run = write_run(tmp_path / "run")
    damage(run)
    printed = report(run, expect=expect)
    assert message in printed and len(printed.strip().splitlines()) == 1


def test_errors_carry_their_exit_codes(tmp_path):
    with pytest.raises(CheckpointError):
        read_run(tmp_path, "x")
    run = write_run(tmp_path / "run")
    (run / "generations" / "test.jsonl").write_text('{"document": 0}\n')
    with pytest.raises(DataError, match="has no text"):
        read_run(run, "x")


@pytest.mark.parametrize("low, high", [(0, 1), (-3.2, 4.7), (1e-9, 3e-9), (4.1, 4.2), (0, 987654)])
def test_ticks_are_round_and_inside(low, high):
    places = charts.ticks(low, high)
    assert 2 <= len(places) <= 11 and all(low - 1e-12 <= place <= high + 1e-6 for place in places)
    step = places[1] - places[0]
    assert re.fullmatch(r"[125]\.0+e.*", f"{step:.6e}")


def test_long_curves_are_thinned_to_means():
    points = [(step, float(step % 2)) for step in range(1000)]
    thin = charts.thinned(points)
    assert len(thin) == 200 and thin[-1][0] == 999 and all(abs(y - 0.5) < 0.11 for _, y in thin)
    assert charts.thinned(points[:200]) == points[:200]


def test_a_flat_curve_is_drawn():
    drawn = charts.lines("flat", [charts.Series("a", [(1, 0.0), (2, 0.0)]), charts.Series("b", [(1, math.nan)])], y="y")
    path = re.search(r'class="line c0 d0" d="([^"]+)"', drawn).group(1)
    assert len(set(re.findall(r"[ML][\d.]+ ([\d.]+)", path))) == 1 and ">b<" not in drawn


def test_what_is_not_finite_is_left_blank():
    drawn = charts.heat_map("map", [1, 2], [("a", [math.nan, 0.0]), ("b", [1.0, 1.0])], float, y="y")
    cells = {level: len(path.split("M")) - 1 for level, path in re.findall(r'class="cell q(\d)" d="([^"]+)"', drawn)}
    assert cells == {"0": 1, "8": 2}
    assert charts.panels("panels", [("a", [charts.Series("s", [(1, math.nan)])])], y="y") == ""


def test_parameters_are_those_of_the_model(tmp_path):
    model = small_model(small_config())
    run = write_run(tmp_path / "run")
    save_file(model.state_dict(), run / "model" / "model.safetensors")
    assert read_run(run, "x").parameters == sum(each.numel() for each in model.parameters())


def test_a_trace_ends_with_the_result():
    model = small_model(small_config())
    empty = torch.zeros(0, dtype=torch.long).numpy()
    batch = generation_batch([empty] * 2, canvas_tokens=16, pad_id=3, samples=[4, 9])
    trace: list[torch.Tensor] = []
    drawn = sample(model, batch, SamplerSettings(steps=4), trace=trace)
    assert [tokens.shape for tokens in trace] == [(2, 16)] * 4
    assert torch.equal(trace[-1], drawn.tokens_CL) and not torch.equal(trace[0], trace[-1])
    assert torch.equal(sample(model, batch, SamplerSettings(steps=4)).tokens_CL, drawn.tokens_CL)


def test_generate_keeps_the_trace_of_its_first_document(run_dir, tmp_path):  # noqa: F811
    tool("generate", run_dir, "--output", tmp_path / "texts.jsonl", "--limit", 2, "--steps", 3, "--trace")
    record = json.loads((tmp_path / "texts.jsonl").read_text().splitlines()[0])
    trace = json.loads((tmp_path / "trace.json").read_text())
    assert trace["document"] == record["document"] and trace["texts"][-1] == record["text"]
    assert len(trace["texts"]) == 3 and trace["log_snr"] == sorted(trace["log_snr"])


MEASURE = """<script>
const problems = [];
addEventListener("error", event => problems.push(event.message));
addEventListener("load", () => {
  const plots = [...document.querySelectorAll("svg[role=img]")];
  const cut = plots.flatMap(svg => [...svg.querySelectorAll("text")].filter(text => {
    const inner = text.getBoundingClientRect(), outer = svg.getBoundingClientRect();
    return inner.left < outer.left - 1 || inner.right > outer.right + 1
        || inner.top < outer.top - 1 || inner.bottom > outer.bottom + 1;
  }).map(text => text.textContent));
  const marks = plots.map(svg =>
    [...svg.querySelectorAll(".line, .bar, .cell")].filter(mark => mark.getTotalLength() > 0).length);
  parent.postMessage({problems, cut, marks, width: innerWidth,
                      needed: document.documentElement.scrollWidth}, "*");
});
</script>"""
FRAME = """<!doctype html><title>frame</title>
<iframe src="{page}" style="width:{width}px;height:800px;border:0"></iframe>
<pre id=measured></pre><script>
addEventListener("message", event => document.getElementById("measured").textContent = JSON.stringify(event.data));
</script>"""


@pytest.fixture(scope="module")
def chromium():
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        assert "REQUIRE_BROWSER" not in os.environ, "REQUIRE_BROWSER is set and there is no Chromium"
        pytest.skip("there is no Chromium to look at the page with")
    return found


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("runs", [1, 7])
def test_a_browser_draws_it_whole(tmp_path, chromium, width, runs):
    folders = [write_run(tmp_path / f"a-run-with-a-long-name-{n}") for n in range(runs)]
    path, frame = tmp_path / "report.html", tmp_path / "frame.html"
    report(*folders, "--out", path)
    path.write_text(path.read_text().replace("<style>", MEASURE + "<style>", 1))
    frame.write_text(FRAME.format(page=path.name, width=width))
    quiet = "headless no-sandbox disable-gpu disable-quic no-first-run disable-background-networking " \
            "disable-component-update disable-sync enable-logging=stderr v=0 virtual-time-budget=5000 dump-dom"
    done = subprocess.run([chromium, *(f"--{option}" for option in quiet.split()),
                           f"--user-data-dir={tmp_path / 'profile'}", frame.as_uri()],
                          capture_output=True, text=True, timeout=90)
    measured = json.loads(re.search(r"<pre id=\"measured\">(.+?)</pre>", done.stdout, re.DOTALL).group(1))
    assert measured["problems"] == [] and ":CONSOLE" not in done.stderr
    assert measured["width"] == width and measured["needed"] <= width
    assert len(measured["marks"]) >= 18 and min(measured["marks"]) > 0
    assert measured["cut"] == []
