"""Experts divided among ranks against one layer that holds them all, on the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from model.config import MoEConfig
from model.moe.layer import MoELayer
from model.moe.parallel import ExpertGroup, ShardedExperts, part_of_state, rows_to_other_ranks, whole_state
from tests.trainer.forked import join

WIDTH, RANKS, SECONDS = 8, 4, 60
CONFIG = MoEConfig(experts=8, top_k=2, ffn=12, shared_ffn=4)
HELD = CONFIG.experts // RANKS
TOKENS = {"uneven": (9, 4, 14, 5), "one rank has no tokens": (9, 0, 14, 5), "one rank has all tokens": (0, 0, 20, 0),
          "all go to one rank": (6, 7, 3, 5), "none go to one rank": (6, 7, 3, 5)}
"""Case -> tokens of each rank."""


def whole_layer(case: str) -> MoELayer:
    layer = MoELayer(WIDTH, CONFIG).double()
    layer.init_weights(seed=3, layer_index=1)
    with torch.no_grad():
        layer.router.weight.mul_(30)  # far from ties, and unequal counts
        forced = layer.router.weight[:, 0]  # acts on a feature that is 1 in every token
        if case == "all go to one rank":
            forced[2 * HELD:3 * HELD] = 1000.0
        if case == "none go to one rank":
            forced[2 * HELD:3 * HELD] = -1000.0
    return layer


def tokens_of(case: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(x_TD, row_T, weight_TD of the outputs in the objective) of all ranks, a row for each rank."""
    generator = torch.Generator().manual_seed(7)
    total = sum(TOKENS[case])
    x_TD, weight_TD = torch.randn(2, total, WIDTH, generator=generator, dtype=torch.float64)
    x_TD[:, 0] = 1
    return x_TD, torch.arange(RANKS).repeat_interleave(torch.tensor(TOKENS[case])), weight_TD


def differentiate(layer: MoELayer, x_TD: torch.Tensor, row_T: torch.Tensor, weight_TD: torch.Tensor) -> dict:
    x_TD = x_TD.clone().requires_grad_()
    y_TD, aux = layer(x_TD, row_T, RANKS)
    names, parameters = zip(*layer.named_parameters(), strict=True)
    total = (y_TD * weight_TD).sum() + 0.3 * aux.balance_sum + 0.2 * aux.z_sum
    x_grad, *grads = torch.autograd.grad(total, [x_TD, *parameters])
    return {"y": y_TD.detach(), "x": x_grad, "index": aux.expert_index_Tk, **dict(zip(names, grads, strict=True))}


def rank_main(rank: int, folder: Path) -> None:
    """One rank: every case, the results into a file."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    results = {}
    for case, tokens in TOKENS.items():
        group = ExpertGroup(RANKS, rank)
        group.process_group = torch.distributed.group.WORLD
        whole = whole_layer(case)
        layer = MoELayer(WIDTH, CONFIG).double()
        layer.experts = ShardedExperts(CONFIG.experts, WIDTH, CONFIG.ffn, group).double()
        layer.init_weights(seed=3, layer_index=1)
        layer.router.load_state_dict(whole.router.state_dict())
        assert all(torch.equal(part, layer.state_dict()[name])
                   for name, part in part_of_state(layer, whole.state_dict()).items())
        gathered = whole_state(layer, layer.state_dict())
        assert gathered.keys() == whole.state_dict().keys()
        assert all(torch.equal(value, gathered[name]) for name, value in whole.state_dict().items())
        mine = slice(sum(tokens[:rank]), sum(tokens[:rank + 1]))
        results[case] = differentiate(layer, *(tensor[mine] for tensor in tokens_of(case)))
        results[case]["sent_bytes"] = group.sent_bytes
    torch.save(results, folder / f"rank{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def results(launcher, tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    assert join([launcher.Process(target=rank_main, args=(rank, folder)) for rank in range(RANKS)],
                SECONDS) == [0] * RANKS
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(RANKS)]


@pytest.mark.parametrize("case", TOKENS)
def test_outputs_and_gradients_are_those_of_all_experts_in_one_place(results, case):
    wanted = differentiate(whole_layer(case), *tokens_of(case))
    parts = [result[case] for result in results]
    found = {name: torch.cat([part[name] for part in parts]) if name in ("x", "y", "index") or "experts" in name
             else sum(part[name] for part in parts) for name in wanted}
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)
    experts = wanted["index"].unique() // HELD
    if case == "all go to one rank":
        assert experts.unique().tolist() == [2]
    if case == "none go to one rank":
        assert 2 not in experts


@pytest.mark.parametrize("case", TOKENS)
def test_what_is_sent_is_counted_to_the_byte(results, case):
    """Four times a row for every assignment to another rank: tokens, outputs, and the gradients of both. The outputs
    and the tokens' gradients are sent by the rank that holds the expert."""
    holder_of = [result[case]["index"] // HELD for result in results]
    for rank, result in enumerate(results):
        to_others = (holder_of[rank] != rank).sum()
        for_others = sum((holder == rank).sum() for other, holder in enumerate(holder_of) if other != rank)
        counts = (RANKS - 1) * HELD * 8
        assert result[case]["sent_bytes"] == 2 * (to_others + for_others) * WIDTH * 8 + counts
        least = sum(len(set(holders) - {rank}) for holders in holder_of[rank].tolist())
        rows = rows_to_other_ranks(result[case]["index"], CONFIG.experts, ExpertGroup(RANKS, rank))
        assert rows.tolist() == [least, to_others]
