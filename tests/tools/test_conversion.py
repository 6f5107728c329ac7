"""Conversions and what they refuse, on the checkpoint of one short run and on models that were never trained."""

import json
import shutil
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.config import MoEConfig
from model.diffuseq_import import import_weights
from model.diffusion_lm import DiffusionLM
from tests.model.small import batch_of, small_config, small_model
from tests.tools.converting import Runs, assert_same_state, call
from tests.trainer.launching import ROOT
from tools import convert_checkpoint, inspect_checkpoint
from tools.conversion.convert import open_source
from tools.conversion.mapping import Rule, check
from trainer import checkpoint
from trainer.config_load import load
from trainer.errors import CheckpointError
from trainer.export import read_model, write_model
from trainer.randomness import training_draw

DIFFUSEQ = ROOT / "tests" / "data" / "diffuseq"


@pytest.fixture(scope="module")
def trained(launcher, tmp_path_factory):
    """The folder of a finished run of three steps on one rank."""
    return Runs(launcher, tmp_path_factory.mktemp("conversion")).run("run", 1, 1, 2, 3)


@pytest.fixture
def tool(monkeypatch, capsys):
    return lambda *arguments, **options: call(monkeypatch, capsys, *arguments, **options)


def convert(tool, *arguments, **options):
    return tool(convert_checkpoint, *arguments, **options)


def test_a_checkpoint_becomes_the_model_that_its_run_exported(trained, tool, tmp_path):
    said = convert(tool, trained, tmp_path / "model", "--format", "model")
    assert "averaged weights of step 3" in said
    wanted = load_file(trained / "model" / "model.safetensors")
    found = load_file(tmp_path / "model" / "model.safetensors")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    _, vocabulary, run = read_model(tmp_path / "model")
    _, _, trained_as = read_model(trained / "model")
    assert run.model == trained_as.model and vocabulary.size == run.model.vocab_size
    convert(tool, tmp_path / "model", tmp_path / "again.safetensors", "--format", "safetensors", "--dtype", "bf16")
    half = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(half[name], value.bfloat16() if value.is_floating_point() else value)
               for name, value in wanted.items())


def test_trained_weights_are_other_than_their_average(trained, tool, tmp_path):
    convert(tool, trained, tmp_path / "a", "--format", "safetensors", "--weights", "trained")
    convert(tool, trained, tmp_path / "b", "--format", "safetensors", "--weights", "average")
    one, other = load_file(tmp_path / "a"), load_file(tmp_path / "b")
    states = torch.load(next((trained / "checkpoints").glob("step-*/engine/mp_rank_00_model_states.pt")),
                        weights_only=False)["module"]
    assert all(torch.equal(states[name], value) for name, value in one.items())
    assert not torch.equal(one["head.weight"], other["head.weight"])


@pytest.mark.parametrize("weights", ["trained", "average"])
def test_there_and_back_through_a_hugging_face_folder_is_exact(trained, tool, tmp_path, weights):
    convert(tool, trained, tmp_path / "folder", "--format", "huggingface", "--weights", weights, "--shard_gb", 1e-5)
    convert(tool, tmp_path / "folder", tmp_path / "back", "--format", "safetensors")
    convert(tool, trained, tmp_path / "direct", "--format", "safetensors", "--weights", weights)
    found, wanted = load_file(tmp_path / "back"), load_file(tmp_path / "direct")
    assert found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


CHAIN = [(2, 2, 3), (4, 4, 1), (4, 2, 2), (8, 2, 3), (2, 1, 1), (4, 1, 3), (1, 1, 2)]


def test_other_topologies_and_back_are_exact(trained, tool, tmp_path):
    first, here = open_source(trained), trained
    for number, (world, shards, stage) in enumerate(CHAIN):
        target = tmp_path / str(number)
        said = convert(tool, here, target, "--format", "checkpoint", "--world", world, "--expert_parallel_size", shards,
                       "--zero_stage", stage)
        assert f"train_micro_batch_size_per_gpu = {8 // world}" in said
        assert_same_state(first, open_source(target))
        here = target
    convert(tool, here, tmp_path / "universal", "--format", "universal")
    assert_same_state(first, open_source(tmp_path / "universal"))
    convert(tool, tmp_path / "universal", tmp_path / "back", "--format", "checkpoint", "--zero_stage", 2)
    assert_same_files(next((trained / "checkpoints").glob("step-*")), tmp_path / "back")
    assert "same tensors" in tool(inspect_checkpoint, trained, "--diff", tmp_path / "universal")


def assert_same_files(native, made):
    """A converted checkpoint has the files that a run wrote, and they hold the same."""
    files = sorted(path.relative_to(native) for path in native.rglob("*.pt"))
    assert files == sorted(path.relative_to(made) for path in made.rglob("*.pt"))
    for name in files:
        one, other = (torch.load(folder / name, weights_only=False) for folder in (native, made))
        stage = checkpoint.check(native)["topology"]["zero_stage"]
        if stage == 3 and "random" in one:  # ZeRO-3's filling at the end of each parameter is not set
            continue
        assert_same(one, other, str(name), filled=stage == 3)


def assert_same(one, other, where, filled=False):
    if isinstance(one, torch.Tensor):
        assert one.shape == other.shape and one.dtype == other.dtype, where
        assert (filled and "fp32_flat" in where) or torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}/{key}", filled)
    elif type(one) in (list, tuple):
        assert len(one) == len(other), where
        for index, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}/{index}", filled)
    elif hasattr(one, "cur_scale"):
        assert vars(one) == vars(other), where
    else:
        assert one == other, where


@pytest.mark.parametrize("top_k, noise", [(1, 0.0), (2, 0.0), (2, 0.1)])
def test_an_upcycled_model_starts_as_the_dense_one(trained, tool, tmp_path, top_k, noise):
    run = read_model(trained / "model")[2]
    small = replace(small_config(), vocab_size=run.model.vocab_size)
    run = replace(run, model=replace(small, moe=MoEConfig(experts=1, top_k=1, ffn=24)))
    dense = small_model(run.model)
    write_model(tmp_path / "dense", run, dense.state_dict(), trained / "model" / "vocabulary.model", {"step": 0})
    convert(tool, tmp_path / "dense", tmp_path / "mixture", "--format", "model", "--upcycle", 8, "--top_k", top_k,
            "--noise", noise)
    mixture, _, changed = read_model(tmp_path / "mixture")
    assert (changed.model.moe.experts, changed.model.moe.top_k) == (8, top_k)
    batch = batch_of([0, 1, 2])
    draw = training_draw(batch, run.model, seed=0, step=0)
    reports = [model(batch, model.prepare(batch, device="cpu", dtype=torch.float32), draw, 1.0, 1.0, 1.0)
               for model in (dense.eval(), mixture)]
    one, other = (report.cross_entropy_M for report in reports)
    assert (float((one - other).abs().max()) <= 1e-6 * float(one.abs().max())) == (noise == 0)
    share_E = reports[1].experts[0].counts_E / reports[1].experts[0].counts_E.sum()
    assert share_E.max() < 0.5  # tokens are spread over the experts


@pytest.mark.parametrize("version, table", [("v1", "live"), ("v2", "averaged")])
def test_the_originals_checkpoints(tool, tmp_path, version, table):
    path = next((DIFFUSEQ / f"checkpoint_{version}").glob("ema_*.pt"))
    with pytest.warns(UserWarning, match=f"tables differ by up to .*; the {table} one is taken"):
        said = convert(tool, path, tmp_path / "one", "--format", "safetensors", "--embeddings", table)
    assert f"averaged weights of step {int(path.stem.rpartition('_')[2])}" in said
    with pytest.warns(UserWarning, match="tables differ"):
        config = open_source(path).run.model
        wanted = import_weights(config, torch.load(path), table)
    found = load_file(tmp_path / "one")
    assert wanted.keys() == found.keys() and all(torch.equal(wanted[name], found[name]) for name in wanted)
    DiffusionLM(config).load_state_dict(found)


@pytest.mark.filterwarnings("ignore:.*tables differ")
@pytest.mark.parametrize("change, message", [
    (lambda state: state | {"surplus": torch.zeros(2)}, "1 tensors would be not used: surplus"),
    (lambda state: {key: value for key, value in state.items() if key != "LayerNorm.bias"}, "unknown: LayerNorm.bias"),
    (lambda state: {"state": state}, "must hold tensors by name"),
])
def test_another_checkpoint_than_the_originals_is_refused(tool, tmp_path, change, message):
    shutil.copytree(DIFFUSEQ / "checkpoint_v1", tmp_path / "original")
    path = next((tmp_path / "original").glob("ema_*.pt"))
    torch.save(change(torch.load(path)), path)
    said = convert(tool, path, tmp_path / "room" / "to", "--format", "safetensors", expect=84)
    assert message in said and not any((tmp_path / "room").iterdir())


def test_rules_use_and_make_everything_exactly_once():
    check([Rule("a", ("x",)), Rule("b", ("y", "z"), torch.cat)], ["x", "y", "z"], ["a", "b"])
    for rules, problem in (([Rule("a", ("x",))], "not used: y"), ([Rule("a", ("x", "y"))], "not made: b"),
                           ([Rule("a", ("x",)), Rule("b", ("x", "y"))], "used more than once: x"),
                           ([Rule("a", ("x",)), Rule("b", ("y",)), Rule("c", ())], "unknown: c"),
                           ([Rule("a", ("x",)), Rule("b", ("y",)), Rule("a", ())], "made more than once: a")):
        with pytest.raises(CheckpointError, match=problem):
            check(rules, ["x", "y"], ["a", "b"])


def _truncate(folder):
    path = next(folder.glob("engine/zero_pp_rank_0*"))
    path.write_bytes(path.read_bytes()[:-100])


def _unknown_key(folder):
    path = folder / "model.safetensors"
    save_file({**load_file(path), "surplus": torch.zeros(3)}, path)


@pytest.mark.parametrize("damage, form, expect, message", [
    (_truncate, "checkpoint", 84, "bytes were written"),
    (_truncate, "huggingface", 84, "bytes were written"),
    (lambda folder: (folder / "rank00000.pt").unlink(), "huggingface", 84, "rank00000.pt: "),
    (lambda folder: (folder / "rank00000.pt").unlink(), "universal", 84, "rank00000.pt: "),
    (lambda folder: (folder / "manifest.json").write_text("{"), "model", 84, "no readable manifest.json"),
    (lambda folder: (folder / "config" / "run.toml").unlink(), "model", 84, "is of an unknown run"),
    (_unknown_key, "safetensors", 84, "1 tensors would be unknown: surplus"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "model", 84, "cannot be read"),
])
def test_damage_is_one_line_and_leaves_nothing(trained, tool, tmp_path, damage, form, expect, message):
    room = tmp_path / "room"
    room.mkdir()
    if form == "safetensors" or "model.safetensors" in str(damage.__code__.co_consts):
        shutil.copytree(trained / "model", tmp_path / "from")
    else:
        shutil.copytree(next((trained / "checkpoints").glob("step-*")), tmp_path / "from")
        shutil.copytree(trained / "config", tmp_path / "from" / "config")
    damage(tmp_path / "from")
    said = convert(tool, tmp_path / "from", room / "to", "--format", form, expect=expect)
    assert message in said and len(said.strip().splitlines()) == 1 and not any(room.iterdir())


@pytest.mark.parametrize("arguments, message", [
    (("{run}", "{here}", "--format", "model"), "TO: {here} exists"),
    (("{run}", "{here}", "--format", "huggingface"), "TO: {here} exists"),
    (("{run}", "{to}", "--format", "huggingface", "--vocabulary", "{other}"), "--vocabulary: {other} has 276 pieces"),
    (("{run}", "{to}", "--format", "huggingface", "--shard_gb", "0"), "--shard_gb: must be positive"),
    (("{run}", "{to}", "--format", "model", "--shard_gb", "1"), "--shard_gb: only applies to --format huggingface"),
    (("{run}", "{to}", "--format", "model", "--world", "2"), "--world: only applies to --format checkpoint"),
    (("{run}", "{to}", "--format", "safetensors", "--top_k", "2"), "--top_k: only applies to --format model"),
    (("{run}", "{to}", "--format", "model", "--noise", "0.1"), "--noise: only applies to --upcycle"),
    (("{run}", "{to}", "--format", "model", "--upcycle", "4"), "--upcycle: needs a dense model"),
    (("{run}", "{to}", "--format", "checkpoint", "--world", "3"), "--world: is 3, but must divide the 8 rows"),
    (("{run}", "{to}", "--format", "checkpoint", "--world", "4", "--expert_parallel_size", "3"),
     "train.expert_parallel_size: is 3, but must divide"),
    (("{run}/model", "{to}", "--format", "universal"), "--format: universal needs a training state"),
    (("{run}/model", "{to}", "--format", "model", "--weights", "trained"), "--weights: only applies to training"),
    (("{run}", "{to}", "--format", "model", "--vocabulary", "{other}"), "--vocabulary: {other} has 276 pieces, but"),
    (("{run}", "{to}", "--format", "model", "--embeddings", "live"), "--embeddings: only applies to the original"),
    (("{run}", "{to}"), "command line: the following arguments are required: --format"),
])
def test_mistakes_are_one_line_and_leave_nothing(trained, tool, tmp_path, arguments, message):
    here, other, room = tmp_path / "here", tmp_path / "other.model", tmp_path / "room"
    here.mkdir(), room.mkdir()
    (here / "mine").write_text("kept")
    if "{other}" in arguments:
        from trainer.data.vocabulary import train_vocabulary
        train_vocabulary(["abcdefgh bad cafe"] * 50, other, 276)
    names = {"run": trained, "here": here, "to": room / "to", "other": other}
    said = convert(tool, *[part.format(**names) for part in arguments], expect=80)
    assert message.format(**names) in said and len(said.strip().splitlines()) == 1
    assert not any(room.iterdir()) and (here / "mine").read_text() == "kept"


def test_inspection(trained, tool, tmp_path):
    said = tool(inspect_checkpoint, trained, "--tensors")
    assert "step 3" in said and "saved by 1 ranks" in said and "8 rows a step, 3 updates" in said
    assert "exp_avg_sq embedding [330, 16]" in " ".join(said.split())
    shutil.copytree(trained / "model", tmp_path / "model")
    said = tool(inspect_checkpoint, trained / "model", "--diff", tmp_path / "model")
    assert "the same tensors" in said
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["head.bias"][3] += 0.5
    save_file(weights, path)
    said = tool(inspect_checkpoint, trained / "model", "--diff", tmp_path / "model", expect=3)
    assert said.strip() == "fp32 of head.bias: differ by up to 0.5"
    weights["head.bias"][0] = float("nan")
    save_file(weights, path)
    assert "NaN or infinity in 1 tensors: fp32 of head.bias" in tool(inspect_checkpoint, tmp_path / "model", expect=82)
    (tmp_path / "model" / "model.safetensors").unlink()
    assert "is no run, checkpoint" in tool(inspect_checkpoint, tmp_path / "model", expect=84)


def test_help_teaches_from_any_directory():
    for name in ("convert_checkpoint", "inspect_checkpoint", "generate", "evaluate", "prepare_data"):
        done = subprocess.run([sys.executable, str(ROOT / "tools" / f"{name}.py"), "--help"], cwd="/", text=True,
                              capture_output=True, timeout=120)
        assert done.returncode == 0 and "Exit codes" in done.stdout


def test_the_configuration_travels(trained, tool, tmp_path):
    convert(tool, trained, tmp_path / "alone", "--format", "checkpoint", "--world", 2)
    run = load(file=tmp_path / "alone" / "config" / "run.toml")
    assert run.train.expert_parallel_size == 1 and run.model.vocab_size == 330
    convert(tool, tmp_path / "alone", tmp_path / "model", "--format", "model")
    facts = json.loads((tmp_path / "model" / "config.json").read_text())
    assert facts["step"] == 3 and facts["weights"] == "averaged"
