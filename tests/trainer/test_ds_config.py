"""Every shipped DeepSpeed JSON is accepted, by us and by DeepSpeed; every mistake is one clear error."""

import json
from pathlib import Path

import pytest
import torch

from model.errors import ConfigError
from trainer.config import describe
from trainer.config_load import load
from trainer.ds_config import FORBIDDEN, KEYS, SHIPPED, load_ds_config
from trainer.presets import PRESETS, RECIPES

SHIPPED_FILES = sorted(SHIPPED.glob("*.json"))
MINIMUM = {"train_micro_batch_size_per_gpu": 2, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


@pytest.fixture
def write(tmp_path):
    def _write(values: dict | str) -> Path:
        path = tmp_path / "ds.json"
        path.write_text(values if isinstance(values, str) else json.dumps(values))
        return path
    return _write


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: path.stem)
def test_shipped_file_is_complete_and_deepspeed_reads_it_as_we_do(path):
    from deepspeed.runtime.config import DeepSpeedConfig

    ds = load_ds_config(path)
    assert ds.notices == ()  # a shipped file needs nothing filled in
    device = "cpu" if path.stem.startswith("cpu") else "cuda"
    theirs = DeepSpeedConfig(ds.for_engine(1, device))
    assert theirs.train_batch_size == ds.rows_per_step(1)
    assert theirs.train_micro_batch_size_per_gpu == ds.micro_batch
    assert theirs.gradient_accumulation_steps == ds.accumulation
    assert theirs.zero_optimization_stage == ds.zero_stage
    assert theirs.gradient_clipping == ds.clipping
    assert theirs.bfloat16_config.enabled == (ds.precision == "bf16")
    offload = theirs.zero_config.offload_optimizer
    assert (offload is not None and offload.device == "cpu") == ds.offload_optimizer


@pytest.mark.parametrize("path", SHIPPED_FILES, ids=lambda path: path.stem)
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_shipped_file_goes_with_every_preset_and_recipe(path, preset, recipe):
    ds, run = load_ds_config(path), load(preset, recipe)
    assert ds.rows_per_step(8) == 8 * ds.micro_batch * ds.accumulation
    assert (run.preset, run.recipe) == (preset, recipe)


def test_supported_keys_exist_in_deepspeed():
    from deepspeed.comm.config import CommsLoggerConfig
    from deepspeed.profiling.config import DeepSpeedFlopsProfilerConfig
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.precision_config import DeepSpeedBF16Config, DeepSpeedFP16Config
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
    from deepspeed.runtime.zero.offload_config import DeepSpeedZeroOffloadOptimizerConfig

    def names(model):
        return {f.alias or name for name, f in model.model_fields.items()}

    assert set(KEYS["zero_optimization"]) <= names(DeepSpeedZeroConfig)
    assert set(KEYS["zero_optimization"]["offload_optimizer"]) <= names(DeepSpeedZeroOffloadOptimizerConfig)
    assert set(KEYS["bf16"]) <= names(DeepSpeedBF16Config)
    assert set(KEYS["fp16"]) <= names(DeepSpeedFP16Config)
    assert set(KEYS["flops_profiler"]) <= set(vars(DeepSpeedFlopsProfilerConfig({})))
    assert set(KEYS["comms_logger"]) == names(CommsLoggerConfig)
    switches = {"wall_clock_breakdown": True, "memory_breakdown": True}
    theirs = DeepSpeedConfig({**MINIMUM, **switches, "communication_data_type": "bf16"})
    assert {key: getattr(theirs, key) for key in switches} == switches
    assert theirs.communication_data_type == torch.bfloat16
    checked = {"zero_optimization", "bf16", "fp16", "flops_profiler", "comms_logger", "communication_data_type",
               "gradient_accumulation_steps", *MINIMUM, *switches}
    assert set(KEYS) == checked  # a new key needs its own line here


def test_every_value_has_one_owner():
    ours = {key.name.rpartition(".")[2] for key in describe()} - {"activation_checkpointing", "seed"}
    assert not ours & (set(KEYS) | set(FORBIDDEN))
    # The two that bear DeepSpeed's name are refused in the JSON, with our key in the message.
    assert "train.activation_checkpointing" in FORBIDDEN["activation_checkpointing"]
    assert "train.seed" in FORBIDDEN["seed"]
    assert not set(KEYS) & set(FORBIDDEN)


def test_forbidden_messages_name_existing_keys():
    known = [key.name for key in describe()]
    for message in FORBIDDEN.values():
        for word in message.replace(",", " ").split():
            if word.startswith(("optim.", "train.", "model.")):
                assert any(key == word or key.startswith(f"{word}.") for key in known), word


@pytest.mark.parametrize("change, key, problem", [
    ({"zero_optimizaton": {"stage": 2}}, "zero_optimizaton", "did you mean zero_optimization?"),
    ({"zero_optimization": {"stge": 2}}, "zero_optimization.stge", "did you mean zero_optimization.stage?"),
    ({"bf16": {"enable": True}}, "bf16.enable", "did you mean bf16.enabled?"),
    ({"bfloat16": {"enabled": True}}, "bfloat16", '"bf16": {"enabled": true}'),
    ({"optimizer": {"type": "AdamW"}}, "optimizer", "optim.lr"),
    ({"train_batch_size": 8}, "train_batch_size", "derived"),
    ({"scheduler": {}}, "scheduler", "optim.schedule"),
    ({"gradient_clipping": "auto"}, "gradient_clipping", '"auto"'),
    ({"bf16": {"enabled": "auto"}}, "bf16.enabled", '"auto"'),
    ({"bf16": {"enabled": 1}}, "bf16.enabled", "must be of type bool"),
    ({"bf16": True}, "bf16", "must be an object"),
    ({"train_micro_batch_size_per_gpu": True}, "train_micro_batch_size_per_gpu", "must be of type int, not true"),
    ({"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu", "positive"),
    ({"gradient_accumulation_steps": 0}, "gradient_accumulation_steps", "must be positive"),
    ({"gradient_clipping": -1}, "gradient_clipping", "must be 0 or positive"),
    ({"gradient_clipping": "1"}, "gradient_clipping", "must be a number"),
    ({"zero_optimization": {"stage": 4}}, "zero_optimization.stage", "must be 1, 2 or 3"),
    ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "fp16", "keep bf16"),
    ({"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}},
     "zero_optimization.offload_optimizer", "ds_configs/zero2_offload.json"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}},
     "zero_optimization.offload_optimizer.device", "must be none or cpu"),
    ({"zero_optimization": {"reduce_bucket_size": 0}}, "zero_optimization.reduce_bucket_size", "at least 1, not 0"),
    ({"zero_optimization": {"sub_group_size": -1}}, "zero_optimization.sub_group_size", "at least 1, not -1"),
    ({"zero_optimization": {"stage3_max_live_parameters": 1.5}}, "zero_optimization.stage3_max_live_parameters",
     "a whole number of at least 0, not 1.5"),
    ({"zero_optimization": {"allgather_bucket_size": True}}, "zero_optimization.allgather_bucket_size", "not true"),
    ('{"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"sub_group_size": Infinity}}',
     "zero_optimization.sub_group_size", "at least 1, not Infinity"),
    ({"fp16": {"initial_scale_power": -1}}, "fp16.initial_scale_power", "at least 0"),
    ({"fp16": {"loss_scale": -1}}, "fp16.loss_scale", "must be 0 or positive"),
    ({"communication_data_type": "float"}, "communication_data_type", "must be fp32, bf16 or fp16"),
])
def test_mistake_names_key_and_remedy(write, change, key, problem):
    path = write(change if isinstance(change, str) else {**MINIMUM, **change})
    with pytest.raises(ConfigError) as caught:
        load_ds_config(path)
    assert caught.value.key == key
    assert problem in caught.value.problem and str(path) in caught.value.problem


@pytest.mark.parametrize("text, problem", [
    ('{\n  "bf16": {},\n}', "line 3, column 1"),
    ("[1]", "must hold one JSON object, not list"),
    ('{"bf16": {}, "bf16": {}}', "given twice"),
])
def test_not_a_json_object(write, text, problem):
    with pytest.raises(ConfigError, match=problem):
        load_ds_config(write(text))


def test_missing_file_lists_the_shipped_ones(tmp_path):
    with pytest.raises(ConfigError, match=r"shipped: ds_configs/cpu_zero2\.json"):
        load_ds_config(tmp_path / "none.json")


def test_what_is_filled_in_is_said(write):
    ds = load_ds_config(write({"train_micro_batch_size_per_gpu": 2, "bf16": {"enabled": True}}))
    assert (ds.zero_stage, ds.clipping, ds.accumulation, ds.precision) == (1, 1.0, 1, "bf16")
    assert [notice.split()[0] for notice in ds.notices] == ["zero_optimization.stage", "gradient_clipping"]
    engine = ds.for_engine(4, "cuda")
    assert engine["zero_optimization"]["stage"] == 1 and engine["gradient_clipping"] == 1.0
    assert engine["train_batch_size"] == 8


def test_engine_dictionary_is_a_fresh_copy(write):
    ds = load_ds_config(write(MINIMUM))
    ds.for_engine(1, "cpu")["zero_optimization"]["stage"] = 3
    assert ds.for_engine(1, "cpu")["zero_optimization"]["stage"] == 1


@pytest.mark.parametrize("change, key", [
    ({"fp16": {"enabled": True}}, "fp16"),
    ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}},
     "zero_optimization.offload_optimizer")])
def test_refused_on_a_cpu_only(write, change, key):
    ds = load_ds_config(write({**MINIMUM, **change}))
    assert ds.for_engine(2, "cuda")["train_batch_size"] == 4
    with pytest.raises(ConfigError) as caught:
        ds.for_engine(2, "cpu")
    assert caught.value.key == key
