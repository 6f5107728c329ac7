"""Numbers of shards that fit, settings that do not go with them, and checkpoints of another topology."""

from pathlib import Path

import pytest

from model.errors import ConfigError
from tests.trainer.launching import ds_config
from trainer.config_load import load
from trainer.ds_config import load_ds_config
from trainer.errors import CheckpointError
from trainer.topology import check_same, check_topology, topology


def configurations(tmp_path, shards, experts=12, settings=(), **ds):
    overrides = [f"train.expert_parallel_size={shards}", f"model.moe.experts={experts}", *settings]
    return load(overrides=overrides), load_ds_config(ds_config(tmp_path, **ds))


@pytest.mark.parametrize("shards, world", [(1, 1), (1, 7), (2, 2), (4, 8), (12, 24), (3, 6)])
def test_shards_that_divide_experts_and_ranks_are_taken(tmp_path, shards, world):
    check_topology(*configurations(tmp_path, shards), world)


@pytest.mark.parametrize("shards, world, use", [
    (8, 8, "use 4"), (5, 8, "use 4"), (3, 8, "use 2 or 4"), (2, 1, "use 1"), (2, 9, "use 1 or 3"), (24, 24, "use 12")])
def test_others_are_refused_with_the_nearest(tmp_path, shards, world, use):
    with pytest.raises(ConfigError, match=rf"is {shards}, but must divide model.moe.experts = 12 and the number of "
                                          rf"ranks, {world}: {use}$"):
        check_topology(*configurations(tmp_path, shards), world)


@pytest.mark.parametrize("settings, ds, says", [
    (("model.moe.gated=false",), {}, "train.expert_parallel_size: is 2, but experts without gate .* or "
     "model.moe.gated to true"),
    ((), {"fp16": {"enabled": True}}, "fp16: is not supported .* enable bf16 instead"),
    ((), {"zero_optimization": {"stage": 2, "reduce_scatter": False}}, "reduce_scatter: must be true"),
    ((), {"zero_optimization": {"stage": 2, "contiguous_gradients": False}}, "contiguous_gradients: must be true")])
def test_what_does_not_go_with_shards_is_refused_only_there(tmp_path, settings, ds, says):
    check_topology(*configurations(tmp_path, 1, settings=settings, **ds), 2)
    with pytest.raises(ConfigError, match=says):
        check_topology(*configurations(tmp_path, 2, settings=settings, **ds), 2)


def test_a_checkpoint_of_another_topology_is_refused_with_what_to_do(tmp_path):
    def of(world, shards, micro, stage=2):
        return topology(*configurations(tmp_path, shards, micro=micro, stage=stage), world)

    here = of(4, 2, 1)
    check_same(Path("c"), of(4, 2, 1), here)
    for other, was in ((of(2, 2, 2), "world = 2"), (of(4, 1, 1), "expert_parallel_size = 1"),
                       (of(4, 2, 1, stage=3), "zero_stage = 3")):
        with pytest.raises(CheckpointError, match=rf"^c was saved with {was}, this run has .* or convert it: python "
                           r"tools/convert_checkpoint.py c TO --format checkpoint --world 4 --expert_parallel_size 2 "
                           r"--zero_stage 2$"):
            check_same(Path("c"), other, here)
    with pytest.raises(CheckpointError, match=r"^c was saved with world = 2, rows_per_step = 2, this run has world = "
                       r"4, rows_per_step = 4: choose micro-batch and accumulation so that .* is 2 again"):
        check_same(Path("c"), of(2, 2, 1), here)


@pytest.mark.parametrize("stage, name, value", [(2, "round_robin_gradients", True), (3, "sub_group_size", 2000)])
def test_another_layout_of_zeros_files_is_refused(tmp_path, stage, name, value):
    def of(stage, **zero):
        return topology(*configurations(tmp_path, 1, **{"zero_optimization": {"stage": stage, **zero}}), 2)

    changed = of(stage, **{name: value})
    with pytest.raises(CheckpointError, match=rf"give zero_optimization\.{name} the value again"):
        check_same(Path("c"), of(stage), changed)
    check_same(Path("c"), changed, changed)
    other = 5 - stage  # where it means nothing
    check_same(Path("c"), of(other), of(other, **{name: value}))
    with pytest.raises(CheckpointError, match="or convert it: python"):  # to another stage, layout or not
        check_same(Path("c"), changed, of(other))
