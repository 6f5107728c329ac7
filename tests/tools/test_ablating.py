"""The parts of tools/ablate.py: grid files, matched noise levels, differences, tables and plots."""

import gzip
import json
import signal
import sys
import xml.dom.minidom
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from model.errors import ConfigError
from tests.trainer.launching import ROOT, SMALL, write_corpus
from tools import ablate
from tools.ablate import build_parser, command
from tools.ablating import documents, jobs, page, plots
from tools.ablating.grid import DataSet, Run
from tools.ablating.grid_file import read_grid
from tools.ablating.jobs import training_seconds
from tools.ablating.levels import ACCURACIES, matched_levels
from tools.ablating.results import bleu_difference, expert_use
from tools.scoring import facts
from tools.scoring.overlap import bleu_counts, bleu_of, corpus_bleu
from tools.scoring.support import supported
from trainer.config_load import load
from trainer.data.evaluation import evaluation_batches
from trainer.data.prepare import prepare
from trainer.errors import DataError
from trainer.randomness import evaluation_draw

GRID = """
title = "Trial"
question = "Does it run?"
preset = "short"
tokens = 1000
[data.proposals]
[[cells]]
name = "one"
"""
GRIDS = sorted((ROOT / "benchmarks" / "grids").glob("*.toml"))


def write(folder: Path, text: str) -> Path:
    path = folder / "grid.toml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", GRIDS, ids=lambda path: path.stem)
def test_shipped_grids_fit_into_four_hours_of_two_cores(path):
    grid = read_grid(path)
    runs = list(grid.runs())
    assert grid.question.endswith(("?", ".")) and all(each.samplers for each in runs)
    assert len(runs) * (grid.minutes + 1) / 2 <= 240


def test_the_grid_in_the_documentation_is_one(tmp_path):
    text = (ROOT / "docs" / "ablations.md").read_text()
    grid = read_grid(write(tmp_path, text.partition("```toml\n")[2].partition("```")[0]))
    assert [cell.name for cell in grid.cells] == ["plain", "absorbing, absorbing 0.1", "absorbing, absorbing 0.5"]
    assert next(grid.runs()).config().data.max_source_tokens == 128


def test_axes_make_a_cell_or_sampler_of_every_combination(tmp_path):
    grid = read_grid(write(tmp_path, GRID + """
        [[cells]]
        name = "wide"
        axes.model.attention.window = [32, 64]
        axes.model.attention.dilation = ["1", "2"]
        settings.optim.lr = 1e-4
        samplers = ["own"]
        [[samplers]]
        name = "own"
        [[samplers]]
        name = "few"
        axes.steps = [5, 10]
        seeds = 1
        """), seeds=None)
    assert [cell.name for cell in grid.cells] == [
        "one", "wide, window 32, dilation 1", "wide, window 32, dilation 2", "wide, window 64, dilation 1",
        "wide, window 64, dilation 2"]
    assert {cell.curve for cell in grid.cells[1:]} == {"wide, dilation 1", "wide, dilation 2"}
    run = list(replace(grid, seeds=[0, 1]).runs())[1]
    config = run.config()
    assert (config.model.attention.window, config.optim.lr, config.recipe) == (32, 1e-4, "long_doc")
    assert [each.name for each in run.samplers] == ["own"]
    first, second = (Run(replace(grid, seeds=[0, 1]), "proposals", DataSet(), grid.cells[0], seed) for seed in (0, 1))
    assert [each.name for each in first.samplers] == ["own", "few, steps 5", "few, steps 10"]
    assert [each.name for each in second.samplers] == ["own"]


def test_the_command_line_goes_before_the_grid(tmp_path):
    path = write(tmp_path, GRID.replace("tokens", "seeds = [3, 4, 5]\ndocuments = 9\ntokens"))
    grid = read_grid(path, minutes=2.0, seeds=2, documents=5)
    assert (grid.minutes, grid.tokens, grid.seeds, grid.documents) == (2.0, 0, [3, 4], 5)


@pytest.mark.parametrize("given, message", [
    ({"seeds": 2}, "--seeds: is 2, but {path} has 1: give fewer, or add some to its `seeds`"),
    ({"data": ["proposal"]}, "--sets: 'proposal' is not known; did you mean proposals?"),
    ({"documents": 1}, "documents: must be 2 or more, not 1"),
])
def test_mistakes_on_the_command_line(tmp_path, given, message):
    path = write(tmp_path, GRID)
    with pytest.raises(ConfigError) as raised:
        read_grid(path, **given)
    assert str(raised.value) == message.format(path=path)


@pytest.mark.parametrize("change, message", [
    (("title =", "titel ="), "titel: 'titel' is not known; did you mean title?"),
    (("[[cells]]", "[[cells]]\nrecipee = 'x'"), "cells[0].recipee: 'recipee' is not known; did you mean recipe?"),
    (("[[cells]]", "[[cells]]\nrecipe = 'diffseq'"), "cells.recipe: 'diffseq' is not known; did you mean diffuseq?"),
    (("[[cells]]", "[[cells]]\nsettings.model.widht = 3"), "model.widht: is not a key of the run configuration "
     "(--set); did you mean model.width? [proposals, one]"),
    (("[[cells]]", "[[cells]]\nsettings.train.steps = 3"), "train.steps: cannot be set in a grid: the budget "
     "decides it"),
    (("[[cells]]", "[[samplers]]\nname = 'a'\nsettings.step = 3\n[[cells]]"),
     "samplers[0].settings: 'step' is not known; did you mean steps?"),
    (("[[cells]]", "[[samplers]]\nname = 'own'\n[[cells]]\nsamplers = ['on']"),
     "cells.samplers: 'on' is not known; did you mean own?"),
    (("tokens = 1000", ""), "minutes: or tokens, one of the two, must be positive: it is the budget of each run"),
    (("tokens = 1000", "tokens = 1.5"), "tokens: must be a whole number, not 1.5"),
    (("[data.proposals]", ""), "data: is missing: name at least one set, as [data.NAME]"),
    (("tokens", "columns = ['blue']\ntokens"), "columns: 'blue' is not known; did you mean bleu?"),
    (("tokens", "seeds = [1, 1]\ntokens"), "seeds: repeats one: [1, 1]"),
    (('name = "one"', 'name = "a b"\n[[cells]]\nname = "a-b"'),
     "cells: names are needed that differ in letters and digits, not ['a b', 'a-b']"),
])
def test_mistakes_in_a_grid(tmp_path, change, message):
    assert change[0] in GRID
    with pytest.raises(ConfigError) as raised:
        read_grid(write(tmp_path, GRID.replace(*change, 1)))
    assert str(raised.value) == message


def test_missing_documents_are_named_with_their_origin(tmp_path):
    with pytest.raises(DataError, match=r"nowhere: no train, valid and test .* It can be had from example.org\. "):
        documents.prepare("nowhere", DataSet(origin="example.org"), tmp_path, 5, tmp_path / "out")


@pytest.fixture(scope="module")
def facts_folder(tmp_path_factory):
    """A set of facts with two references for the first of three sources."""
    folder = tmp_path_factory.mktemp("facts") / "set"
    folder.mkdir()
    lines = [("name[Aromi], food[Chinese]", "Aromi serves Chinese food."),
             ("name[Aromi], food[Chinese]", "It's Aromi."), ("name[Cocum]", "Cocum, a pub."),
             ("name[Zizzi], near[Aromi]", "Zizzi is near Aromi.")]
    for split in documents.SPLITS:
        (folder / f"{split}.jsonl").write_text("".join(json.dumps({"src": s, "trg": t}) + "\n" for s, t in lines))
    return folder


def test_facts_are_grouped_and_looked_up(facts_folder, tmp_path):
    settings = documents.prepare("set", DataSet(form="facts"), facts_folder.parent, 10, tmp_path)
    test = documents.Test.read(tmp_path)
    assert test.sources == ["name aromi , food chinese", "name cocum", "name zizzi , near aromi"]
    assert test.references[0] == ["aromi serves chinese food .", "it ' s aromi ."]
    assert test.trivial["nearest training facts' sentence"] == [each[0] for each in test.references]
    assert [json.loads(line)["src"] for line in Path(settings["data.test"]).read_text().splitlines()] == test.sources
    assert len(Path(settings["data.train"]).read_text().splitlines()) == 4
    before = Path(settings["data.train"]).stat().st_mtime_ns
    documents.prepare("set", DataSet(form="facts"), facts_folder.parent, 10, tmp_path)
    assert Path(settings["data.train"]).stat().st_mtime_ns == before
    assert facts.coverage(["cocum is a pub", "aroma"], [[("name", "cocum"), ("rating", "low")],
                                                       [("name", "aroma"), ("near", "zizzi")]]) == pytest.approx(2 / 3)
    assert facts.coverage(["a film"], [[("title", "a film"), ("genre", "drama")]]) is None


def test_a_line_that_is_no_facts_is_named(facts_folder, tmp_path):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in documents.SPLITS:
        (folder / f"{split}.jsonl").write_text('{"src": "no facts", "trg": "b"}\n')
    with pytest.raises(DataError, match=r"train.jsonl:1: its source has no name\[value\]"):
        documents.prepare("set", DataSet(form="facts"), tmp_path, 10, tmp_path / "out")


GOOD = b'{"src": "a", "trg": "b"}\n'


@pytest.mark.parametrize("name, content, message", [
    ("test.jsonl", b"", "test.jsonl: is empty"),
    ("train.jsonl", b"\n\n", "train.jsonl: is empty"),
    ("valid.jsonl", GOOD + b'{"src": null, "trg": "b"}\n', "valid.jsonl:2: needs a JSON object with src and trg, both"),
    ("valid.jsonl", b'{"src": "a"}\n', "valid.jsonl:1: needs a JSON object with src and trg, both strings"),
    ("valid.jsonl", b"[]\n", "valid.jsonl: is empty"),
    ("valid.jsonl", GOOD + b"7\n", "valid.jsonl:2: needs a JSON object"),
    ("valid.jsonl", GOOD + b'{"src": \n', "valid.jsonl:2: is not valid JSON"),
    ("train.jsonl", GOOD + b'{"src": "\xff", "trg": "b"}\n', "train.jsonl:2: is not UTF-8"),
    ("train.jsonl.gz", gzip.compress(GOOD * 100)[:-12], "train.jsonl.gz: is damaged: "),
    ("train.jsonl.gz", GOOD, "train.jsonl.gz: is damaged: "),
])
@pytest.mark.parametrize("form", ["text", "facts"])
def test_faulty_documents_are_named(tmp_path, name, content, message, form):
    folder = tmp_path / "set"
    folder.mkdir()
    for split in documents.SPLITS:
        (folder / f"{split}.jsonl").write_bytes(GOOD if form == "text" else GOOD.replace(b'"a"', b'"name[a]"'))
    (folder / name).write_bytes(content if form == "text" else content.replace(b'"a"', b'"name[a]"'))
    with pytest.raises(DataError) as raised:
        documents.prepare("set", DataSet(form=form), tmp_path, 10, tmp_path / "out")
    assert f"{folder}/{message}" in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize("option", ["--out", "--page"])
def test_a_place_where_nothing_can_be_written_is_named_before_anything_runs(tmp_path, monkeypatch, option):
    (tmp_path / "file").write_text("")
    monkeypatch.setattr(ablate, "execute", lambda *_: pytest.fail("it runs"))
    places = {"--out": str(tmp_path / "out"), option: str(tmp_path / "file" / "below")}
    words = ["ablate", str(write(tmp_path, GRID)), *(word for pair in places.items() for word in pair)]
    monkeypatch.setattr(sys, "argv", words)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    with pytest.raises(ConfigError, match="cannot be written: Not a directory") as raised:
        ablate.main()
    assert raised.value.key == option


def test_the_speed_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    lines = [{"kind": "train", "step": step, jobs.CLOCK: step / 2} for step in (4, 8)]

    def trained(job, folder, *_, **__):
        folder.mkdir(parents=True)
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    def interrupted(*_):
        raise KeyboardInterrupt

    grid = read_grid(write(tmp_path, GRID), minutes=1.0)
    (tmp_path / "train.jsonl").write_text("one document")
    job = jobs.Job(next(grid.runs()), tmp_path / "out", {"data.train": str(tmp_path / "train.jsonl")}, None)
    monkeypatch.setattr(jobs.Job, "_train", trained)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("os.replace", interrupted)
        job.measure_speed()
    assert not (job.cell_folder / "speed.json").exists()
    job.measure_speed()
    assert job.steps == 120


def test_numbers_and_names_that_the_source_supports():
    outputs = ["The Aromi has 12 seats.\nIt serves Greek food", "none of it"]
    assert supported(outputs, ["aromi, 12 seats", ""]) == pytest.approx(100 * 2 / 3)  # not Greek; The, It begin lines
    assert supported(["nothing"], ["x"]) is None


def test_bleu_from_counts_is_corpus_bleu():
    outputs = ["the cat sat on the mat today", "a dog ran away", "nothing in common here"]
    references = [["the cat sat on a mat", "a cat sat on the mat"], ["a dog ran away fast"], ["x y z w v"]]
    counts = bleu_counts(outputs, references)
    assert bleu_of(counts.sum(0)) == pytest.approx(corpus_bleu(outputs, references))
    for part in (slice(2), slice(2, None), slice(1, None)):  # the last two without any match of four words
        assert bleu_of(counts[part].sum(0)) == pytest.approx(corpus_bleu(outputs[part], references[part]))
    none = bleu_difference([counts], [counts], 50)
    assert none == (0, 0, 0)
    shuffled = bleu_counts(outputs, references[1:] + references[:1])
    lead = bleu_difference([counts, counts], [shuffled, counts], 200)
    assert lead.mean == pytest.approx((corpus_bleu(outputs, references) - bleu_of(shuffled.sum(0))) / 2)
    assert lead.low < lead.mean < lead.high


def test_time_of_training_is_without_starts_and_interruptions():
    lines = [{"step": 10, "cpu_seconds": 15.0}, {"step": 20, "cpu_seconds": 25.0}, {"step": 30, "cpu_seconds": 8.0},
             {"step": 40, "cpu_seconds": 18.0}]
    assert training_seconds(lines, "cpu_seconds") == pytest.approx(40)


def test_routing_by_position_in_bits():
    even, split = [[[0.5, 0.5]] * 10], [[[1.0, 0.0]] * 5 + [[0.0, 1.0]] * 5]
    targets_only = [[[0.0, 0.0]] * 7 + [[0.5, 0.5]] * 3]
    for share, bits in ((even, 0.0), (split, 1.0), (even + split, 0.5), (targets_only, 0.0)):
        found = expert_use({"expert_share_by_position": share, "expert_variation_by_layer": [0.2] * len(share)})
        assert found == pytest.approx({"expert_variation": 0.2, "position_routing": bits})
    assert expert_use({}) == {}


@pytest.fixture(scope="module", params=["long_doc", "diffuseq", "moe_diffuseq"])
def untrained(request, tmp_path_factory):
    """A model of each recipe with random weights, and samples."""
    from model.diffusion_lm import DiffusionLM
    settings = {**SMALL, **write_corpus(tmp_path_factory.mktemp("corpus")), "data.draws_per_source": 1}
    if request.param == "diffuseq":  # which decides these
        decided = ("model.moe", "model.attention.window")
        settings = {key: value for key, value in settings.items() if not key.startswith(decided)}
    run = load("tiny", request.param, overrides=[f"{key}={value}" for key, value in settings.items()])
    data = prepare(run.data, splits=("train",))
    model = DiffusionLM(replace(run.model, vocab_size=data.vocabulary.size, pad_id=data.vocabulary.pad_id)).eval()
    model.init_weights(0)
    samples = data.samples("train")
    model.prior_count_V.copy_(torch.from_numpy(samples.canvas_counts()))
    return model, samples


@torch.no_grad()
def test_levels_are_where_the_context_free_posterior_knows_so_much(untrained):
    """Against the model's own forward pass, and a posterior that is worked out token by token."""
    model, samples = untrained
    samples.row_tokens = 10**6  # one batch
    found = matched_levels(model, samples, 60, seed=0)
    (batch, _), = evaluation_batches(samples, limit=60)
    plan = model.prepare(batch, device="cpu", dtype=torch.float32)
    reached = [place for place, level in enumerate(found["log_snr"]) if level is not None]
    assert reached
    for place in reached:
        level = found["log_snr"][place]
        draw = evaluation_draw(batch, model.config, torch.zeros(batch.sample_C.numel()), 0)
        alpha, sigma = (torch.sigmoid(torch.tensor(s * level)).sqrt() for s in (1, -1))
        rows_VE, prior_V = model.rows(), model.log_prior()
        hits = []
        for at in plan.loss_of_target_M.tolist():
            token = int(batch.tokens_T[plan.target_N[at]])
            z_E = alpha * rows_VE[token] + sigma * draw.noise_NE[at]
            absorbed = draw.uniform_N[at] < model.config.diffusion.absorbing * sigma
            scores_V = prior_V - (0 if absorbed else (z_E - alpha * rows_VE).square().sum(1) / (2 * sigma ** 2))
            scores_V[model.config.pad_id] = -torch.inf
            hits.append(int(scores_V.argmax()) == token)
        assert np.mean(hits) == pytest.approx(ACCURACIES[place], abs=0.02)
        if model.config.diffusion.loss_over == "text":
            times = torch.linspace(0, 1, 20001)
            time = times[(model.schedule.log_snr(times) - level).abs().argmin()]
            draw = evaluation_draw(batch, model.config, time.expand(batch.sample_C.numel()), 0)
            own = model(batch, plan, draw, 1.0, 1.0, 1.0).cross_entropy_M.mean()
            assert found["cross_entropy"][place] <= own + 1e-3
            if model.config.bayes_skip:  # untrained, it is the context-free posterior: no temperature improves it much
                assert found["cross_entropy"][place] == pytest.approx(float(own), rel=0.1)
                assert found["token_accuracy"][place] == pytest.approx(ACCURACIES[place], abs=0.02)


def row(cell: str, sampler: str, bleu: list[float], **more: object) -> dict:
    return {"cell": cell, "sampler": sampler, "curve": cell, "seeds": list(range(len(bleu))),
            "settings": {"sample.steps": 20}, "values": {"bleu": bleu, "steps": [1000, 1200][:len(bleu)]}, **more}


@pytest.fixture
def results():
    """Made by hand, as results.collect gives them."""
    rows = [row("ours", "20 steps", [20.0, 22.0]),
            row("theirs", "", [10.0], difference={"bleu": [-11.0, -12.5, -9.5], "rougeL": [-3.0, -4.0, 0.5]})]
    return {"title": "A & B", "question": "Which?", "budget": {"minutes": 2.0}, "clock": "cpu_seconds", "columns": [],
            "plots": [{"x": "sample.steps", "y": "bleu", "title": "", "logarithmic": True}],
            "command": "python tools/ablate.py x.toml",
            "machine": {"processor": "CPU", "device": "cpu", "platform": "", "commit": "abc", "packages": {"torch": 2}},
            "sets": [{"name": "e2e", "task": "text", "origin": "", "documents": 7, "rows": rows, "levels": [0.15, 0.3],
                      "trivial": {"copy": {"bleu": 3.0}, "greedy extractive oracle": {"bleu": 90.0}}}]}


def test_the_page_of_results_made_by_hand(results, tmp_path):
    text = page.write(results, tmp_path, "trial").read_text()
    assert "| ours, 20 steps | 21.0 ± 1.4 | 1100 ± 141.4 |" in text
    assert "| theirs | 10.0 | 1000 |" in text and "| *copy* | 3.0 |  |" in text
    assert "| theirs | -11.0 [-12.5, -9.5] | -3.0 [-4.0, +0.5] |" in text and "seed by seed" not in text
    assert "15 %, 30 % of the tokens" in text and "python tools/ablate.py x.toml" in text
    drawing = xml.dom.minidom.parse(str(tmp_path / "trial-e2e-0.svg"))
    titles = [each.firstChild.data for each in drawing.getElementsByTagName("title")]
    assert "ours: 21 at 1.301" in titles and "![BLEU over log10 of sample.steps](trial-e2e-0.svg)" in text


def test_leads_are_given_seed_by_seed(results):
    made, = results["sets"]
    made["rows"][1] |= {"seeds": [0, 1], "difference_by_seed": {"0": {"bleu": [-10, -11, -9]},
                                                                "1": {"bleu": [-12, -13, -11]}}}
    assert page.differences(made).splitlines()[2].endswith("| -10.0 [-11.0, -9.0]; -12.0 [-13.0, -11.0] |")


def test_a_page_gives_the_command_that_repeats_it(tmp_path):
    words = [str(GRIDS[0]), "--data", "/home/me/sets", "--out", "/tmp/x", "--tokens", "20000000", "--sets", "a", "b c"]
    assert command(build_parser().parse_args(words)) == (
        f"python tools/ablate.py benchmarks/grids/{GRIDS[0].name} --data DIR --tokens 20000000 --sets a 'b c'")


def test_several_sets_are_set_side_by_side(results, tmp_path):
    results["plots"] = []
    other = {**results["sets"][0], "name": "qa", "task": "answers", "levels": []}
    other["rows"] = [{**row("ours", "20 steps", []), "values": {"f1": [33.3]}}]
    other["trivial"] = {"copy": {"f1": 50.0}}
    results["sets"].append(other)
    text = page.write(results, tmp_path, "trial").read_text()
    assert "|  | e2e: BLEU | qa: F1 |" in text and "| ours, 20 steps | 21.0 ± 1.4 | 33.3 |" in text
    assert "| *best trivial system* | 3.0 (copy) | 50.0 (copy) |" in text
    xml.dom.minidom.parse(str(tmp_path / "trial-qa-0.svg"))




def test_a_measure_that_no_row_has_is_left_empty(results, tmp_path):
    results |= {"columns": ["cross_entropy", "bleu"], "plots": []}
    results["sets"][0]["levels"] = []
    text = page.write(results, tmp_path, "trial").read_text()
    assert "| theirs |  | 10.0 |" in text and "No cross-entropies" in text and "![" not in text


def test_a_row_at_zero_is_left_out_over_a_logarithm_which_says_so():
    plot = {"x": "model.rate", "y": "bleu", "title": "", "logarithmic": True}
    rows = [row("a", "", [1.0], settings={"model.rate": rate}) for rate in (0.0, 0.1, 1.0)]
    assert "log10 of model.rate, without 0" in plots.curves(plot, rows, {"bleu": "BLEU"}).svg
    assert "without" not in plots.curves(plot, rows[1:], {"bleu": "BLEU"}).svg
