"""Expert parallelism under ZeRO: our MoE layer in the form that DeepSpeed recognises.

DeepSpeed 0.19.8 treats parameters as experts (reduced over the ranks that hold the same ones, counted once in the
gradient norm, saved from every rank) only inside an `AutoEPMoELayer` whose `experts` have weights called `w1`, `w2`,
`w3`. Of that class nothing is used but its type and how it finds its process groups: routing, exchange and experts are
those of `model/moe`. Gradients of experts are summed over the ranks that hold them and divided by all ranks, as those
of every other parameter, so that the number of shards changes nothing.
"""

from __future__ import annotations

from deepspeed.checkpoint.autoep_affine import (
    autoep_experts_for_rank,
    autoep_placement_to_affine_map,
    legacy_uniform_autoep_placement_descriptor,
)
from deepspeed.checkpoint.constants import (
    AFFINE_MAP,
    AUTOEP_EXPERT_PLACEMENT,
    AUTOEP_PARAM_EP_RANK,
    AUTOEP_PARAM_LOCAL_EXPERTS,
    AUTOEP_PARAM_LOGICAL_SHAPE,
    DS_AUTOEP_UC_META,
)
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from torch import nn

from model.moe.layer import MoELayer
from model.moe.parallel import ExpertGroup, ShardedExperts


def shard_experts(model: nn.Module, group: ExpertGroup) -> None:
    """Leaves to `model` only the experts that this rank of the group holds. Before its weights are initialised, and
    before DeepSpeed sees it, which creates the process groups."""
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, MoELayer):
                setattr(parent, name, ExpertParallelLayer(layer, group))


class ExpertParallelLayer(MoELayer, AutoEPMoELayer):
    """A `MoELayer` with its routed experts divided among the ranks of a group; router and shared expert stay whole."""

    def __init__(self, layer: MoELayer, group: ExpertGroup):
        nn.Module.__init__(self)  # of neither base: the parts of a finished layer are taken over
        self.router, self.shared = layer.router, layer.shared
        whole = layer.experts
        count, ffn, width = whole.w1.shape
        self.experts = ShardedExperts(count, width, ffn, group, gated=whole.w3 is not None, backend=whole.backend)

        # What DeepSpeed reads of a layer and of its experts' weights.
        self.num_experts, self.num_local_experts = count, self.experts.held
        self.ep_size, self.ep_rank, self.ep_group_name = group.size, group.rank, f"ep_size_{group.size}"
        self.ep_group = self.tp_group = self.folding_group_handles = None
        placement = legacy_uniform_autoep_placement_descriptor(count, self.experts.held, group.size)
        self.expert_placement_descriptor = placement
        for weight in self.experts.parameters():
            weight.allreduce = False
            weight.group_name = weight.ds_zero_partition_group_name = self.ep_group_name
            weight.ds_zero_placement_family = "autoep_expert"
            shape = [count, *weight.shape[1:]]
            setattr(weight, DS_AUTOEP_UC_META, {
                AUTOEP_EXPERT_PLACEMENT: placement,
                AFFINE_MAP: autoep_placement_to_affine_map(placement, shape).to_dict(),
                AUTOEP_PARAM_LOGICAL_SHAPE: shape,
                AUTOEP_PARAM_EP_RANK: group.rank,
                AUTOEP_PARAM_LOCAL_EXPERTS: list(autoep_experts_for_rank(placement, group.rank))})

    def set_deepspeed_parallelism(self, *arguments, **options) -> None:
        """Called by DeepSpeed when it has its process groups."""
        super().set_deepspeed_parallelism(*arguments, **options)
        self.experts.group.process_group = self.ep_group
