"""How the run configuration comes together, is checked, described and written out again."""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from model.config import ModelConfig
from model.errors import BackendUnavailable, ConfigError
from trainer import config as run_config
from trainer.command_line import build_parser, parse
from trainer.config import OptimConfig, RunConfig, describe, to_dict, to_toml
from trainer.config_load import from_dict, load
from trainer.ds_config import SHIPPED
from trainer.errors import CheckpointError, DataError, ExitCode, NumericalError, exit_code_of
from trainer.presets import DEFAULT_PRESET, PRESETS, RECIPES


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "run.toml"):
        path = tmp_path / name
        path.write_text(text)
        return path
    return _write


# ---- precedence -------------------------------------------------------------------------------------------


def test_default_preset_and_its_recipe():
    config = load()
    assert (config.preset, config.recipe) == (DEFAULT_PRESET, PRESETS[DEFAULT_PRESET]["recipe"])


def test_preset_below_recipe_below_file_below_set(write):
    file = write("[train]\nsteps = 7\nseed = 3\n[sample]\nsteps = 5\n")
    assert load("tiny").train.steps == PRESETS["tiny"]["train"]["steps"]
    assert load("tiny", "diffuseq").sample.steps == 200
    config = load("tiny", "diffuseq", file, ["train.seed=9"])
    assert (config.train.steps, config.train.seed, config.sample.steps) == (7, 9, 5)
    assert config.sample.clamp is True  # untouched by the file


def test_later_set_wins():
    assert load(overrides=["train.steps=3", "train.steps=4"]).train.steps == 4


@pytest.mark.parametrize("name, text", [("a.toml", 'preset = "base"\nrecipe = "moe_diffuseq"\n'),
                                        ("a.json", '{"preset": "base", "recipe": "moe_diffuseq"}')])
def test_file_may_choose_preset_and_recipe(write, name, text):
    file = write(text, name)
    assert load(file=file) == load("base", "moe_diffuseq") == load("base", "moe_diffuseq", file)
    with pytest.raises(ConfigError, match="leave out one of the two"):
        load("tiny", file=file)


def test_recipe_follows_the_sizes_that_the_command_line_decides():
    config = load("tiny", "diffuseq", overrides=["data.row_tokens=1024", "model.moe.ffn=96"])
    assert config.model.attention.window == 2 * config.model.max_positions == 2 * (320 + 128)
    assert load("base", "diffuseq").model.moe.ffn == 3072
    assert config.model.moe.ffn == 96  # what is said outright stands


@pytest.mark.parametrize("preset", PRESETS)
def test_recipes_differ_only_where_they_say(preset):
    configs = {recipe: load(preset, recipe) for recipe in RECIPES}
    for config in configs.values():
        assert config.train == configs["long_doc"].train and config.optim == configs["long_doc"].optim
    conditioning = {name: c.model.diffusion.conditioning for name, c in configs.items()}
    assert conditioning == {"diffuseq": "joint", "moe_diffuseq": "joint", "long_doc": "cached"}
    assert configs["diffuseq"].model.diffusion.absorbing == 0
    assert configs["diffuseq"].model.moe.experts == 1


def test_base_has_the_papers_shape():
    model = load("base").model
    assert (model.layers, model.width, model.attention.heads, model.embed_dim) == (12, 768, 12, 128)
    assert (model.attention.window, model.moe.experts, model.moe.top_k) == (512, 8, 2)


# ---- strictness -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, value", [
    ("train.steps=12", 12),
    ("optim.lr=1", 1.0),
    ("optim.lr=3e-4", 3e-4),
    ("optim.betas=[0, 0.5]", [0.0, 0.5]),
    ("train.deterministic=true", True),
    ("sample.solver=ancestral", "ancestral"),
    ('sample.solver="ancestral"', "ancestral"),
    ("model.attention.window=64", 64),
    ("model.attention.window=[32, 0]", [32, 0]),
    ("model.attention.dilation=1|1,2", "1|1,2"),
    ("model.attention.dilation=2", "2"),
    ("model.attention.dilation=[1, [1, 2]]", [1, [1, 2]]),
    ("model.diffusion.log_snr_range=[-7, -1]", [-7.0, -1.0]),
    ("data.vocabulary=1.5", "1.5"),
    ("data.train=['a.jsonl', 'b.jsonl']", ["a.jsonl", "b.jsonl"]),
    ("data.train=a b=c.jsonl", "a b=c.jsonl"),
    ("data.valid=", ""),
])
def test_values_on_the_command_line(text, value):
    found = load(overrides=[text])
    for name in text.partition("=")[0].split("."):
        found = getattr(found, name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize("text, key, problem", [
    ("train.steps=ten", "train.steps", "must be an integer, not 'ten'"),
    ("train.steps='10'", "train.steps", "must be an integer, not '10'"),
    ("train.steps=1.0", "train.steps", "must be an integer, not 1.0"),
    ("train.steps=true", "train.steps", "must be an integer, not True"),
    ("train.deterministic=1", "train.deterministic", "must be true or false"),
    ("optim.lr=nan", "optim.lr", "must be a number"),
    ("optim.lr=true", "optim.lr", "must be a number"),
    ("optim.betas=[0.9, 'x']", "optim.betas", "must be a list (a number each)"),
    ("model.attention.window=wide", "model.attention.window", "must be an integer or a list (an integer each)"),
    ("train.step=3", "train.step", "did you mean train.steps?"),
    ("train.lr=1", "train.lr", "did you mean optim.lr?"),
    ("model.atention.window=4", "model.atention", "did you mean model.attention?"),
    ("optimizer.lr=4", "optimizer", "--help_config"),
    ("optim.gradient_clipping=1", "optim.gradient_clipping", "belongs to the DeepSpeed JSON"),
    ("optim.learning_rate=1", "optim.learning_rate", "known there: lr, betas"),
    ("nonsense=1", "nonsense", "--help_config"),
    ("model=4", "model", "is a section"),
    ("train.steps", "--set", "must look like train.steps=100"),
    ("preset=base", "--set", "use --preset"),
    ("train.steps=1\nseed = 2", "train.steps", "must be an integer"),
])
def test_mistake_on_the_command_line(text, key, problem):
    with pytest.raises(ConfigError) as caught:
        load(overrides=[text])
    assert caught.value.key == key
    assert problem in caught.value.problem


@pytest.mark.parametrize("name, text, problem", [
    ("a.toml", "[train\n", "is not TOML"),
    ("a.json", "{", "line 1"),
    ("a.json", "[]", "must hold one JSON object"),
    ("a.yaml", "", "must end in .toml or .json"),
    ("a.toml", "preset = 3\n", "3 is not known; there is tiny, base"),
    ("a.toml", 'recipe = "none"\n', "'none' is not known; there is diffuseq"),
    ("a.toml", "[optimizer]\nlr = 1.0\n", "is not a key of the run configuration"),
])
def test_mistake_in_a_file_names_it(write, name, text, problem):
    with pytest.raises(ConfigError) as caught:
        load(file=write(text, name))
    assert problem in str(caught.value)
    if "is not a key" in problem:
        assert "a.toml" in str(caught.value)


def test_missing_file(tmp_path):
    with pytest.raises(ConfigError, match="cannot read"):
        load(file=tmp_path / "none.toml")


@pytest.mark.parametrize("text, key", [
    ("optim.lr=0", "optim.lr"), ("optim.betas=[0.9]", "optim.betas"), ("optim.betas=[0.9, 1]", "optim.betas"),
    ("optim.ema_decay=1", "optim.ema_decay"), ("optim.min_lr_ratio=2", "optim.min_lr_ratio"),
    ("optim.decay_fraction=0", "optim.decay_fraction"), ("optim.schedule=cosin", "optim.schedule"),
    ("optim.warmup_steps=-1", "optim.warmup_steps"),
    ("train.steps=0", "train.steps"), ("train.seed=-1", "train.seed"), (f"train.seed={2**63}", "train.seed"),
    (f"sample.seed={2**63}", "sample.seed"), (f"optim.lr=1{400 * '0'}", "optim.lr"),
    ("model.attention.rope_base=0", "model.attention.rope_base"), ("model.local_mixing=-3", "model.local_mixing"),
    ("model.moe.balance_weight=-1", "model.moe.balance_weight"), ("model.moe.z_weight=-1", "model.moe.z_weight"),
    ("train.log_every=0", "train.log_every"), ("train.max_minutes=-1", "train.max_minutes"),
    ("eval.noise_levels=0", "eval.noise_levels"), ("sample.solver=dpm", "sample.solver"),
    ("sample.grid=sigma", "sample.grid"), ("sample.guidance=2", "sample.guidance"),
    ("sample.candidates=0", "sample.candidates"),
    ("sample.temperature=0", "sample.temperature"), ("sample.end_temperature=0", "sample.end_temperature"),
    ("sample.steps=0", "sample.steps"),
    ("model.diffusion.conditioning=joint", "data.draws_per_source"), ("model.width=100", "model.attention.heads"),
    ("data.row_tokens=10", "data.row_tokens"),
])
def test_impossible_value(text, key):
    with pytest.raises(ConfigError) as caught:
        load(overrides=[text])
    assert caught.value.key == key


# ---- description and round trip ---------------------------------------------------------------------------


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_written_configuration_resolves_to_itself(write, preset, recipe):
    config = load(preset, recipe, overrides=['data.train=["a \\"quoted\\" ü\\n.jsonl"]', "optim.eps=1e-12"])
    assert load(file=write(to_toml(config))) == config
    assert load(file=write(json.dumps(to_dict(config)), "run.json")) == config
    assert from_dict(json.loads(json.dumps(to_dict(config))), "checkpoint") == config


def test_from_dict_refuses_unknown_keys():
    values = to_dict(load())
    values["train"]["stepz"] = 1
    with pytest.raises(ConfigError, match=r"train\.stepz: .*\(old run\)"):
        from_dict(values, "old run")


def test_describe_has_every_leaf_with_the_text_below_it():
    keys = {key.name: key for key in describe()}

    def leaves(values, prefix=""):
        for name, value in values.items():
            yield from leaves(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]

    assert {name: key.default for name, key in keys.items()} == dict(leaves(to_dict(RunConfig())))
    assert keys["optim.lr"].doc == "The highest learning rate, reached at the end of the warm-up."
    assert keys["model.attention.window"].type == "int | list[int]"
    ours = ("optim.", "train.", "eval.", "sample.", "data.")
    assert [name for name, key in keys.items() if name.startswith(ours) and not key.doc] == []


def test_configuration_is_frozen():
    with pytest.raises(AttributeError):
        load().train.steps = 3
    assert replace(load().model, vocab_size=4096) != ModelConfig()
    assert OptimConfig().betas is not OptimConfig().betas  # no shared list


# ---- command line -----------------------------------------------------------------------------------------


def test_command_line(tmp_path):
    ds = str(SHIPPED / "cpu_zero2.json")
    args, config, ds_config = parse(["--ds_config", ds, "--local_rank=1", "--set", "train.steps=5",
                                     "--set", "train.seed=2", "--recipe", "moe_diffuseq"])
    assert (config.train.steps, config.train.seed, ds_config.zero_stage) == (5, 2, 2)
    assert (str(args.run_dir), args.resume, args.init_from, args.dry_run) == \
        ("runs/tiny-moe_diffuseq", "auto", None, False)
    args, _, _ = parse(["--ds_config", ds, "--run_dir", str(tmp_path), "--resume", "none", "--dry_run"])
    assert (args.run_dir, args.resume, args.dry_run) == (tmp_path, "none", True)


@pytest.mark.parametrize("argv", [[], ["--ds_config", "x", "--preset", "huge"], ["--ds_config", "x", "--ds_conf"]])
def test_refused_command_line_points_to_help(argv):
    with pytest.raises(ConfigError, match=r"^command line: .*--help"):
        build_parser().parse_args(argv)


def test_help_config_prints_every_key(capsys):
    with pytest.raises(SystemExit) as caught:
        build_parser().parse_args(["--help_config"])
    assert caught.value.code == ExitCode.FINISHED
    printed = capsys.readouterr().out
    assert all(f"\n{key.name}: {key.type} = " in "\n" + printed for key in describe())


# ---- exit codes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error, code", [
    (ConfigError("key", "problem"), 80), (BackendUnavailable("key", "problem"), 80), (DataError("x"), 81),
    (NumericalError("x"), 82), (torch.OutOfMemoryError("x"), 83), (MemoryError(), 83), (CheckpointError("x"), 84),
    (torch.distributed.DistBackendError("x"), 91), (KeyError("x"), 1),
    (RuntimeError("[../third_party/gloo/gloo/transport/tcp/pair.cc:534] Connection closed by peer"), 91),
])
def test_exit_codes(error, code):
    assert exit_code_of(error) == code


def test_documentation_lists_every_exit_code_preset_recipe_and_deepspeed_file():
    text = (SHIPPED.parent / "docs" / "configuration.md").read_text()
    listed = [str(int(code)) for code in ExitCode] + [f"`{name}`" for name in [*PRESETS, *RECIPES]]
    listed += [f"`{file.name}`" for file in SHIPPED.glob("*.json")]
    assert [name for name in listed if f"| {name} |" not in text] == []


def test_keys_are_described_by_many_threads_at_once():
    run_config._field_docs.cache_clear()
    with ThreadPoolExecutor(8) as threads:
        found = list(threads.map(lambda _: list(describe()), range(32)))
    assert all(keys == found[0] for keys in found)


def test_exit_code_of_the_hosts_allocator():
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 52)
    assert exit_code_of(caught.value) == ExitCode.OUT_OF_MEMORY
