"""A Hugging Face folder: loaded and generating without this repository, read back, and damaged."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from model.packing import generation_batch
from model.sampling import sample, token_logits
from tests.tools.clean_room import link_packages, run_alone
from tests.tools.converting import call
from tests.tools.exported import exported_run
from tools import convert_checkpoint
from tools.huggingface.tokenizer import tokenizer_of
from trainer.data.vocabulary import train_vocabulary
from trainer.errors import CheckpointError
from trainer.export import read_model

RECIPES = {"long_doc": {}, "moe_diffuseq": {"data__draws_per_source": 1},
           "diffuseq": {"data__draws_per_source": 1, "model__moe__experts": 1, "model__max_positions": 64}}
SHARD_GB = 5e-5
TEXTS = ["abc bad cafe", "dad fed a bad cab " * 9, ""]
SCRIPT = """
import sys
folders = sys.argv[1:]
import torch
from transformers import AutoModel, AutoTokenizer
for folder in folders:
    model, report = AutoModel.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(report.values()), report
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    asked = torch.load("asked.pt", weights_only=False)
    with torch.no_grad():
        logits = model(asked["noisy"], asked["log_snr"], asked["sources"], asked["absorbed"]).logits
    torch.save({"logits": logits, "tokens": model.draw(asked["sources"], [7, 3], seed=5),
                "ids": tokenizer(asked["texts"], truncation=True)["input_ids"],
                "texts": model.write(asked["texts"], tokenizer, texts_per_batch=2, seed=5)}, folder + ".pt")
held = {name.split(".")[0] for name in sys.modules}
assert not held & {"model", "trainer", "tools", "deepspeed", "sentencepiece"}, held
print("alone")
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {recipe: exported_run(tmp_path_factory.mktemp(recipe), recipe, **settings)
            for recipe, settings in RECIPES.items()}


@pytest.fixture
def convert(monkeypatch, capsys):
    return lambda *arguments, **options: call(monkeypatch, capsys, convert_checkpoint, *arguments, **options)


@pytest.fixture
def exported(runs, convert, tmp_path):
    convert(runs["long_doc"], tmp_path / "exported", "--format", "huggingface", "--shard_gb", SHARD_GB)
    return tmp_path / "exported"


def test_transformers_alone_computes_and_generates_the_same(runs, convert, tmp_path):
    packages = tmp_path / "packages"
    packages.mkdir()
    link_packages(packages, ["torch", "transformers"])
    generator = torch.Generator().manual_seed(2)
    asked = {"noisy": torch.randn(2, 16, 16, generator=generator), "log_snr": -1.5, "texts": TEXTS,
             "sources": [torch.randint(4, 330, (n,), generator=generator).numpy() for n in (9, 20)],
             "absorbed": torch.rand(2, 16, generator=generator) < 0.3}
    torch.save(asked, tmp_path / "asked.pt")
    for recipe, run in runs.items():
        convert(run, tmp_path / recipe, "--format", "huggingface", "--shard_gb", SHARD_GB)
    assert run_alone(packages, SCRIPT, *runs, home=tmp_path) == "alone\n"
    for recipe, run_dir in runs.items():
        found = torch.load(tmp_path / f"{recipe}.pt")
        model, vocabulary, run = read_model(run_dir / "model")
        batch = generation_batch(asked["sources"], canvas_tokens=16, pad_id=3)
        z_NE = asked["noisy"].flatten(0, 1)
        with torch.no_grad():
            logits_NV = token_logits(model, batch, z_NE, asked["absorbed"].flatten(), torch.tensor(-1.5),
                                     torch.zeros_like(z_NE))
        finite = logits_NV.isfinite()
        difference = (found["logits"].flatten(0, 1) - logits_NV)[finite].abs().max()
        assert finite.any() and difference <= 1e-6 * logits_NV[finite].abs().max()

        settings = replace(run.sample.settings(), seed=5)

        def tokens(sources, numbers, model=model, settings=settings):
            batch = generation_batch(sources, canvas_tokens=16, pad_id=3, samples=numbers)
            return sample(model, batch, settings).tokens_CL

        assert torch.equal(found["tokens"], tokens(asked["sources"], [7, 3]))
        longest = run.data.longest_document() - 16
        ids = [[1, *ids[:longest - 2], 2] for ids in vocabulary.encode(TEXTS)]
        assert found["ids"] == ids
        expected = tokens([np.array(each) for each in ids], range(len(ids))).tolist()
        ended = [row[:row.index(2)] if 2 in row else row for row in expected]
        tokenizer = tokenizer_of(vocabulary.path)  # which shows bytes that are no UTF-8 otherwise than sentencepiece
        assert found["texts"] == [tokenizer.decode(row) for row in ended]
        assert len(set(found["texts"])) == len(TEXTS)


def test_the_way_back_is_exact(runs, exported, convert, tmp_path):
    assert len(list(exported.glob("model-*.safetensors"))) > 3
    convert(exported, tmp_path / "model", "--format", "model")
    wanted = load_file(runs["long_doc"] / "model" / "model.safetensors")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    for name in ("config.json", "vocabulary.model"):
        assert (tmp_path / "model" / name).read_bytes() == (runs["long_doc"] / "model" / name).read_bytes()
    model, vocabulary, run = read_model(exported)
    assert all(torch.equal(value, wanted[name]) for name, value in model.state_dict().items())
    assert vocabulary.size == run.model.vocab_size


def test_half_precision_keeps_counts_whole(exported, convert, tmp_path):
    convert(exported, tmp_path / "half", "--format", "huggingface", "--dtype", "bf16")
    half, whole = load_file(tmp_path / "half" / "model.safetensors"), read_model(exported)[0].state_dict()
    assert all(torch.equal(value, whole[name].bfloat16() if whole[name].is_floating_point() else whole[name])
               for name, value in half.items())
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "bfloat16"


def test_the_card_has_the_runs_figures(runs, convert, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(runs["long_doc"], run)
    (run / "config").mkdir()
    (run / "config" / "run.toml").write_text("")
    line = {"kind": "eval", "by_level": {}, "tokens": 9, "cross_entropy_model": 4.425,
            "cross_entropy_context_free": 4.762, "cross_entropy_shuffled_sources": 4.498}
    (run / "metrics.jsonl").write_text("".join(
        json.dumps({**line, "step": step, "cross_entropy_model": value}) + "\n" for step, value in
        ((2, 4.5), (4, 4.425), (6, 1.0))))
    (run / "generations").mkdir()
    (run / "generations" / "test.scores.md").write_text("| system | R1 |\n| --- | ---: |\n| model | 19.3 |\n")
    convert(run, tmp_path / "one", "--format", "huggingface")
    card = (tmp_path / "one" / "README.md").read_text()
    assert "| 4.762 | 4.425 | 4.498 |" in card and "step | 4 of 20 |" in card and "| model | 19.3 |" in card
    assert "| recipe | long_doc (preset tiny) |" in card and "averaged, float32" in card
    convert(tmp_path / "one", tmp_path / "two", "--format", "huggingface")
    assert (tmp_path / "two" / "README.md").read_text() == card.replace('"one"', '"two"').replace("# one", "# two")
    (run / "model" / "config.json").write_text((run / "model" / "config.json").read_text().replace(
        '"step": 4', '"step": 1'))
    convert(run / "model", tmp_path / "other", "--format", "huggingface")
    card = (tmp_path / "other" / "README.md").read_text()
    assert "Validation" not in card  # there was none up to that step


def _shard(folder):
    return sorted(folder.glob("model-*.safetensors"))[1]


def _one_more(folder):
    save_file({**load_file(_shard(folder)), "surplus": torch.zeros(3)}, _shard(folder))


def _twice(folder):
    first = sorted(folder.glob("model-*.safetensors"))[0]
    save_file(load_file(_shard(folder)) | load_file(first), _shard(folder))


@pytest.mark.parametrize("damage, code, message", [
    (lambda folder: _shard(folder).write_bytes(_shard(folder).read_bytes()[:-50]), 84, "cannot be read"),
    (lambda folder: _shard(folder).unlink(), 84, "model-00002-of-"),
    (lambda folder: (folder / "model.safetensors.index.json").write_text("{"), 84, "index.json cannot be read"),
    (_one_more, 84, "1 tensors would be unknown: surplus"),
    (_twice, 84, "holds tensors that another file"),
    (lambda folder: (folder / "vocabulary.model").write_text("none"), 81, "is not a sentencepiece model"),
    (lambda folder: (folder / "config.json").write_text("{}"), 84, "says nothing of a run"),
])
@pytest.mark.parametrize("form", ["model", "huggingface"])
def test_damage_is_one_line_and_leaves_nothing(exported, convert, tmp_path, damage, code, message, form):
    damage(exported)
    room = tmp_path / "room"
    room.mkdir()
    said = convert(exported, room / "to", "--format", form, expect=code)
    assert message in said and len(said.strip().splitlines()) == 1 and not any(room.iterdir())


def test_a_vocabulary_of_another_size_is_refused(exported, convert, tmp_path):
    train_vocabulary(["abcdefgh bad cafe"] * 50, tmp_path / "other.model", 276)
    shutil.copyfile(tmp_path / "other.model", exported / "vocabulary.model")
    with pytest.raises(CheckpointError, match="has 276 pieces, but the model has embeddings for 330"):
        read_model(exported)
    assert "has 276 pieces" in convert(exported, tmp_path / "to", "--format", "huggingface", expect=80)
