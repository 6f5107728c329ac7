"""Use of experts in a line of metrics against plain loops over tokens, and the watch for starving experts."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from model.batch import PackedBatch
from model.diffusion_lm import LossReport
from model.moe.parallel import ExpertGroup
from model.moe.router import MoEAux
from trainer.expert_use import STARVING_LINES, ExpertUse, StarvationWatch, warning
from trainer.metrics import StepMetrics

LAYERS, EXPERTS, BINS, LOW, HIGH = 2, 5, 10, -5.0, 3.0
LENGTHS = (23, 10, 4)
SCHEDULE = SimpleNamespace(low=LOW, high=HIGH)


def micro_batch(seed: int, device: str = "cpu", last: list[int] | None = None) -> tuple[LossReport, PackedBatch]:
    """Made-up choices of experts; expert 4 is never chosen in layer 1. last: the tokens that pass layer 1, if not all;
    those that are trained are among them then."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(LENGTHS)
    document_T = torch.arange(len(LENGTHS)).repeat_interleave(torch.tensor(LENGTHS))
    position_T = torch.cat([torch.arange(length) for length in LENGTHS])
    last_N = torch.arange(tokens) if last is None else torch.tensor(last)
    last_M = torch.randperm(len(last_N), generator=generator)[:12].sort().values
    index_LTk = torch.rand(LAYERS, tokens, EXPERTS, generator=generator)
    index_LTk[1, :, 4] = -1
    aux = [MoEAux(torch.zeros(()), torch.zeros(()), torch.rand((), generator=generator) * tokens,
                  torch.zeros(EXPERTS), index_Tk.topk(2).indices) for index_Tk in (index_LTk[0], index_LTk[1, last_N])]
    empty = torch.zeros(0)
    report = LossReport(torch.rand((), generator=generator), {"cross_entropy": torch.ones(())}, empty,
                        torch.rand(12, generator=generator), LOW + (HIGH - LOW) * torch.rand(12, generator=generator),
                        last_N[last_M], aux, None if last is None else last_N, last_M)
    batch = PackedBatch(tokens_T=empty, document_T=document_T, position_T=position_T, is_target_T=empty,
                        is_given_T=empty, draw_T=empty, in_loss_T=empty, row_T=empty, copy_T=empty,
                        sample_C=empty, draw_C=empty, stratum_C=empty, rows=1, documents=len(LENGTHS), strata=1)
    if device != "cpu":
        report = LossReport(*(torch.utils._pytree.tree_map(lambda value: value.to(device), part) for part in report))
    return report, batch.to(device)


@pytest.fixture
def one_rank():
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("last", [None, [*range(15, 23), *range(30, 37)]])
def test_a_line_of_metrics_counts_every_token_once(one_rank, last):
    metrics = StepMetrics(SCHEDULE, LAYERS, EXPERTS, torch.device("cpu"), None, ExpertGroup(1, 0))
    batches = [micro_batch(seed, last=last) for seed in range(3)]
    for report, batch in batches:
        metrics.add(report, batch, 1, 0)
    tokens = len(batches) * sum(LENGTHS)
    metrics.count(trained_tokens=36, tokens=tokens)
    line = metrics.reduce()

    counts, entropies, passing = Counter(), [0.0] * LAYERS, [tokens, tokens if last is None else 3 * len(last)]
    for report, batch in batches:
        for layer, aux in enumerate(report.experts):
            entropies[layer] += float(aux.entropy_sum) / passing[layer]
            chosen_of = dict(zip(range(sum(LENGTHS)) if layer == 0 or last is None else last,
                                 aux.expert_index_Tk.tolist(), strict=True))
            for token, chosen in chosen_of.items():
                tenth = int(batch.position_T[token]) * 10 // LENGTHS[batch.document_T[token]]
                counts.update((kind, layer, place, expert) for expert in chosen
                              for kind, place in (("tokens", None), ("position", tenth)))
            for token, log_snr in zip(report.token_M.tolist(), report.log_snr_M.tolist(), strict=True):
                level = int((HIGH - log_snr) / (HIGH - LOW) * BINS)
                counts.update(("noise", layer, level, expert) for expert in chosen_of[token])
    for layer in range(LAYERS):
        own = [counts["tokens", layer, None, expert] for expert in range(EXPERTS)]
        assert line["expert_tokens"][layer] == own and sum(own) == 2 * passing[layer]
        mean = sum(own) / EXPERTS
        variation = math.sqrt(sum((count - mean) ** 2 for count in own) / EXPERTS) / mean
        assert line["expert_variation_by_layer"][layer] == pytest.approx(variation, abs=1e-4)
        assert line["router_entropy_by_layer"][layer] == pytest.approx(entropies[layer], abs=1e-4)
        for kind in ("position", "noise"):
            for place in range(BINS):
                here = [counts[kind, layer, place, expert] for expert in range(EXPERTS)]
                shares = [count / max(1, sum(here)) for count in here]
                assert line[f"expert_share_by_{kind}"][layer][place] == pytest.approx(shares, abs=1e-4)
    assert line["dead_experts_by_layer"] == [0, 1] and line["dead_experts"] == 1
    assert line["expert_variation_worst"] == pytest.approx(max(line["expert_variation_by_layer"]), abs=1e-4)
    assert line["router_entropy"] == pytest.approx(sum(entropies) / LAYERS, rel=1e-5)


def test_counts_stay_exact_where_fp32_would_round():
    use = ExpertUse(1, 2, torch.device("cpu"))
    use.by_position_LBE[0, 0] = torch.tensor([2 ** 24 + 1, 2 ** 31 + 1])
    assert use.summary(use.flat())["expert_tokens"] == [[2 ** 24 + 1, 2 ** 31 + 1]]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_gpu_is_never_waited_for():
    metrics = StepMetrics(SCHEDULE, LAYERS, EXPERTS, torch.device("cuda"), None, ExpertGroup(1, 0))
    report, batch = micro_batch(0, "cuda")
    metrics.add(report, batch, 1, 0)
    torch.cuda.set_sync_debug_mode("error")
    try:
        metrics.add(report, batch, 1, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_starving_expert_is_told_once_and_again_after_a_recovery():
    watch = StarvationWatch()
    healthy, poor = [[100, 100, 100]], [[190, 105, 9]]
    assert [watch.notice(poor) for _ in range(STARVING_LINES)] == [[]] * (STARVING_LINES - 1) + [[(0, 2)]]
    assert watch.notice(poor) == []
    assert [watch.notice(healthy) for _ in range(STARVING_LINES)] == [[]] * STARVING_LINES
    told = [watch.notice(poor) for _ in range(STARVING_LINES)]
    assert told == [[]] * (STARVING_LINES - 1) + [[(0, 2)]]


def test_a_tenth_of_an_equal_share_is_enough():
    watch = StarvationWatch()
    assert [watch.notice([[10, 190], [9, 191]]) for _ in range(STARVING_LINES)][-1] == [(1, 0)]


def test_the_warning_names_a_few():
    assert "expert 5 of layer 1 got less than 10% of" in warning([(1, 5)])
    assert "expert 3 of layer 0, 5 more got" in warning([(0, expert) for expert in range(9)])
