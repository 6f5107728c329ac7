"""What texts can be generated for, and that they do not depend on how the work is divided."""

import functools
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.tools.converting import call
from tests.tools.exported import exported_run
from tools import convert_checkpoint, generate, prepare_data
from tools.generating.identity import resume
from trainer.export import inference_dtype, read_model

JOINT = {"model__diffusion__conditioning": "joint", "data__draws_per_source": 1, "model__diffusion__infilling": 0.5}

BERT = {"model__moe__experts": 1, "data__draws_per_source": 1}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return {"cached": exported_run(tmp_path_factory.mktemp("cached"), model__diffusion__source_dropout=0.1),
            "joint": exported_run(tmp_path_factory.mktemp("joint"), **JOINT),
            "bert": exported_run(tmp_path_factory.mktemp("bert"), "diffuseq", **BERT)}


@pytest.fixture
def tool(monkeypatch, capsys):
    threads = torch.get_num_threads()
    yield lambda *arguments, module=generate, **options: call(monkeypatch, capsys, module, *arguments, **options)
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)


def read(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def copied(run, folder, **settings):
    """A copy of a run's model, of whose configuration `settings` are changed, with __ for dots."""
    shutil.copytree(run / "model", folder / "model")
    path = folder / "model" / "config.json"
    facts = json.loads(path.read_text())
    for key, value in settings.items():
        *sections, name = key.split("__")
        functools.reduce(dict.__getitem__, sections, facts["run"])[name] = value
    path.write_text(json.dumps(facts))
    return folder


@pytest.mark.parametrize("kind", ["cached", "joint"])
def test_deterministic_texts_depend_on_the_seed_alone(runs, tool, tmp_path, kind):
    tool(runs[kind], tmp_path / "folder", "--format", "huggingface", module=convert_checkpoint)
    more = ["--batch", 3, "--processes", 2] if kind == "cached" else ["--batch", 3]
    found = []
    for number, (model, options) in enumerate([(runs[kind], ["--batch", 1]), (runs[kind], more),
                                               (tmp_path / "folder", ["--batch", 8])]):
        output = tmp_path / f"{number}.jsonl"
        tool(model, "--deterministic", "--candidates", 2, "--output", output, *options)
        found.append(read(output))
    assert found[0] == found[1] == found[2]
    assert [record["document"] for record in found[0]] == list(range(6))
    tool(runs[kind], "--deterministic", "--candidates", 2, "--seed", 1, "--output", tmp_path / "other.jsonl")
    assert all(one["text"] != other["text"] for one, other in
               zip(found[0], read(tmp_path / "other.jsonl"), strict=True))


def test_documents_may_lack_targets(runs, tool, tmp_path):
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"src": "abc bad"}\n{"src": "dad cafe", "trg": "bed"}\n')
    tool(runs["cached"], "--input", asked)
    first, second = read(runs["cached"] / "generations" / "asked.jsonl")
    assert first["source"] == "abc bad" and "reference" not in first and second["reference"] == "bed"
    printed = tool(runs["cached"], "--prompt", "abc bad")
    assert printed == first["text"] + "\n"  # its number is 0 as well
    asked.write_text('{"trg": "bed"}\n')
    assert 'needs fields "src" and "trg"' in tool(runs["cached"], "--input", asked, expect=81)


def test_a_split_of_a_prepared_folder_is_the_one_that_is_asked_for(runs, tool, tmp_path):
    words = []
    for split, source in (("train", "abc abc"), ("valid", "bad bad"), ("test", "dad dad")):
        (tmp_path / f"{split}.jsonl").write_text(json.dumps({"src": source, "trg": "bed"}) + "\n")
        words += [f"--{split}", tmp_path / f"{split}.jsonl"]
    tool("--vocabulary", runs["cached"] / "model" / "vocabulary.model", *words, "--duplicates", "keep", "--workers", 1,
         "--out", tmp_path / "prepared", module=prepare_data)
    prepared = str(tmp_path / "prepared")
    run = copied(runs["cached"], tmp_path / "run", data__valid=prepared, data__test=prepared)
    for split, source in (("valid", "bad bad"), ("test", "dad dad")):
        tool(run, "--split", split)
        assert [record["source"] for record in read(run / "generations" / f"{split}.jsonl")] == [source]


def test_chunks_of_a_text_have_references_of_their_own(runs, tool, tmp_path):
    text = "abc bad dad cafe bed " * 5
    asked = tmp_path / "texts.jsonl"
    asked.write_text(json.dumps({"text": text}) + "\n")
    tool(runs["joint"], "--input", asked, "--output", tmp_path / "out.jsonl")
    records = read(tmp_path / "out.jsonl")
    assert len(records) > 1 and "".join(record["reference"] for record in records) == text


def test_fields_are_those_of_the_training_corpora_or_of_the_command_line(runs, tool, tmp_path):
    papers = {"documents": "papers.jsonl", "source_field": "article", "target_field": "abstract"}
    one = copied(runs["joint"], tmp_path / "one", data__train={"papers": papers})
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"article": "abc bad", "abstract": "dad <gap:3> cafe"}\n')
    for kind in ("--input", "--fill"):
        tool(one, kind, asked, "--output", tmp_path / f"one{kind}.jsonl")
        assert read(tmp_path / f"one{kind}.jsonl")[0]["source"] == "abc bad"
    two = copied(runs["joint"], tmp_path / "two", data__train={"papers": papers, "notes": {"documents": "notes.jsonl"}})
    for kind in ("--input", "--fill"):
        said = tool(two, kind, asked, "--output", tmp_path / f"two{kind}.jsonl", expect=81)
        assert "Name its fields by --source_field and --target_field, or --text_field" in said
        tool(two, kind, asked, "--source_field", "article", "--target_field", "abstract",
             "--output", tmp_path / f"two{kind}.jsonl")
        assert read(tmp_path / f"two{kind}.jsonl")[0]["source"] == "abc bad"


def test_what_was_trained_with_the_kernels_of_gpus_generates_anywhere(runs, tool, tmp_path):
    run = copied(runs["cached"], tmp_path, model__attention__backend="flash_attn", model__moe__backend="grouped_mm")
    assert tool(run, "--prompt", "abc bad") == tool(runs["cached"], "--prompt", "abc bad")


def test_half_precision_is_asked_for_and_keeps_counts_whole(runs, tool, tmp_path):
    half, whole = (read_model(runs["cached"] / "model", dtype=dtype)[0] for dtype in ("bf16", "fp32"))
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert {parameter.dtype for parameter in whole.parameters()} == {torch.float32}
    assert half.prior_count_V.dtype == torch.int64 and torch.equal(half.prior_count_V, whole.prior_count_V)
    arguments = [runs["cached"], "--limit", 2, "--output", tmp_path / "out.jsonl"]
    tool(*arguments, "--dtype", "bf16")
    assert len(read(tmp_path / "out.jsonl")) == 2
    assert "other settings (dtype)" in tool(*arguments, "--dtype", "fp32", expect=80)


def test_precision_by_itself_is_that_of_the_device(monkeypatch):
    assert inference_dtype("auto", "cpu") == "fp32" and inference_dtype("fp32", "cuda") == "fp32"
    for supported, dtype in ((True, "bf16"), (False, "fp32")):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, found=supported: found)
        assert inference_dtype("auto", "cuda") == dtype


def test_gaps_are_filled(runs, tool, tmp_path):
    gapped = tmp_path / "gapped.jsonl"
    gapped.write_text('{"src": "abc bad", "trg": "dad <gap:3> cafe"}\n{"src": "", "trg": "<gap:2>bad<gap:4>"}\n')
    tool(runs["joint"], "--fill", gapped, "--batch", 1)
    records = read(runs["joint"] / "generations" / "gapped.jsonl")
    assert [len(record["fills"]) for record in records] == [1, 2]
    assert records[0]["text"] == f"dad {records[0]['fills'][0]} cafe" and "bad" in records[1]["text"]
    assert records[0]["gapped"] == "dad <gap:3> cafe" and records[0]["source"] == "abc bad"
    texts = tmp_path / "texts.jsonl"
    texts.write_text('{"text": "<gap:5> ends so"}\n')
    tool(runs["joint"], "--fill", texts)
    (record,) = read(runs["joint"] / "generations" / "texts.jsonl")
    assert record["text"] == record["fills"][0] + " ends so" and record["source"] == ""
    for text, message in (("no gap", "document 0 has no gap to fill"), ("<gap:17>", "a target of 17 tokens"),
                          ("<gap:15> d", "was trained with 16")):
        gapped.write_text(json.dumps({"src": "abc", "trg": text}) + "\n")
        assert message in tool(runs["joint"], "--fill", gapped, "--output", tmp_path / "none.jsonl", expect=81)


def test_texts_from_nothing(runs, tool, tmp_path):
    tool(runs["cached"], "--unconditional", 3)
    records = read(runs["cached"] / "generations" / "unconditional.jsonl")
    assert [record["document"] for record in records] == [0, 1, 2] and len({r["text"] for r in records}) == 3
    tool(runs["joint"], "--unconditional", 1, "--texts_only", "--output", tmp_path / "texts.jsonl")
    assert read(tmp_path / "texts.jsonl")[0].keys() == {"document", "text", "ended"}


def test_texts_of_other_weights_or_documents_are_not_continued(runs, tool, tmp_path):
    model = shutil.copytree(runs["cached"] / "model", tmp_path / "model")
    asked = tmp_path / "asked.jsonl"
    asked.write_text('{"src": "abc bad"}\n')
    output = model / "generations" / "asked.jsonl"
    tool(model, "--input", asked)
    whole = output.read_text()
    asked.write_text('{"src": "abc bed"}\n')
    assert "other settings (documents)" in tool(model, "--input", asked, expect=80)
    asked.write_text('{"src": "abc bad"}\n')
    assert "1 texts in" in tool(model, "--input", asked)
    weights = load_file(model / "model.safetensors")
    weights["prior_count_V"][4] += 1  # of the same size
    save_file(weights, model / "model.safetensors")
    assert "other settings (weights)" in tool(model, "--input", asked, expect=80)
    assert output.read_text() == whole


def test_texts_that_were_made_otherwise_are_replaced_where_asked(runs, tool, tmp_path):
    output = tmp_path / "out.jsonl"
    arguments = [runs["cached"], "--limit", 2, "--output", output, "--replace"]
    tool(*arguments, "--seed", 1)
    old = output.read_text()
    made = output.stat().st_mtime_ns
    tool(*arguments, "--seed", 1)
    assert output.stat().st_mtime_ns == made  # of the same settings: left as it is
    tool(*arguments, "--seed", 2)
    anew = output.read_text()
    assert len(read(output)) == 2 and anew != old
    output.with_suffix(".settings.json").write_text("damaged")
    tool(*arguments, "--seed", 2)
    assert output.read_text() == anew


@pytest.mark.parametrize("settings, message", [
    ("", "which says what {output} was made with, is damaged"), ('{"model": ', "is damaged"), ("[1]", "is damaged"),
    (None, "has no out.settings.json beside it"),
    ("without", "does not say with which weights {output} was made: remove it"),
])
def test_texts_of_which_nobody_knows_what_made_them_are_not_continued(runs, tool, tmp_path, settings, message):
    output, made_with = tmp_path / "out.jsonl", tmp_path / "out.settings.json"
    arguments = [runs["cached"], "--limit", 2, "--output", output]
    tool(*arguments)
    if settings is None:
        made_with.unlink()
    elif settings == "without":
        facts = json.loads(made_with.read_text())
        made_with.write_text(json.dumps({name: facts[name] for name in facts.keys() - {"weights", "documents"}}))
    else:
        made_with.write_text(settings)
    before = output.read_text()
    said = tool(*arguments, expect=80)
    assert message.format(output=output) in said and len(said.strip().splitlines()) == 1
    assert output.read_text() == before
    output.unlink()
    tool(*arguments)
    assert output.read_text() == before


def test_what_made_them_is_there_whole_or_not_at_all(tmp_path, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        resume(tmp_path / "out.jsonl", {"model": "here"})
    assert not (tmp_path / "out.settings.json").exists()


def test_a_line_that_is_no_text_is_named(runs, tool, tmp_path):
    arguments = [runs["cached"], "--limit", 2, "--output", tmp_path / "out.jsonl"]
    tool(*arguments)
    (tmp_path / "out.jsonl").write_text('{"document": 0, "text": ""}\n{"docu\n')
    assert "out.jsonl:2: is no text" in tool(*arguments, expect=81)


@pytest.mark.parametrize("kind, arguments, expect, message", [
    ("cached", ["--fill", "{file}"], 80, "model.diffusion.infilling: is 0"),
    ("joint", ["--unconditional", 2], 80, "model.diffusion.source_dropout: is 0"),
    ("joint", ["--guidance", 2], 80, "sample.guidance: is 2.0"),
    ("cached", ["--fill", "{file}", "--candidates", 2], 80, "--candidates: does not apply to --fill"),
    ("cached", ["--batch", 0], 80, "--batch: must be at least 1"),
    ("joint", ["--fill", "{file}", "--trace"], 80, "--trace: does not apply to --fill"),
    ("cached", ["--prompt", "a", "--limit", 2], 80, "--limit: only applies"),
    ("cached", ["--texts_only"], 80, "--texts_only: only applies"),
    ("cached", ["--split", "test", "--text_field", "body"], 80, "--text_field: only applies"),
    ("cached", ["--split", "test", "--prompt", "a"], 80, "not allowed with"),
    ("cached", ["--solver", "diffuseq_v2_compat"], 80, "sample.solver: diffuseq_v2_compat"),
    ("bert", ["--solver", "diffuseq_v2_compat", "--no-clamp", "--trace"], 80, "--trace: does not apply to --solver"),
    ("bert", ["--temperature", 0.5], 80, "sample.temperature: is 0.5"),
])
def test_mistakes_are_one_line(runs, tool, tmp_path, kind, arguments, expect, message):
    (tmp_path / "file.jsonl").write_text('{"src": "a", "trg": "b <gap:2>"}\n')
    arguments = [str(each).format(file=tmp_path / "file.jsonl") for each in arguments]
    said = tool(runs[kind], *arguments, "--output", tmp_path / "out.jsonl", expect=expect)
    assert message in said and len(said.strip().splitlines()) == 1
