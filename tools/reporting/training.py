"""Sections drawn from metrics.jsonl: losses, noise levels, evaluations, experts, optimisation, speed."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from html import escape

import numpy as np

from tools.reporting.charts import COLOURS, Series, heat_map, lines, number, panels, shade_key
from tools.reporting.runs import Run
from tools.reporting.tables import missing, table

_TERMS = {"loss": ("Loss", "loss", "What is minimised: the terms by their weights."),
          "cross_entropy": ("Cross-entropy", "nats", "Of the prediction, per trained token."),
          "mse": ("Squared error", "mse", "Between predicted and true embedding, per trained token."),
          "rounding": ("Rounding", "nats", "Cross-entropy of the true embedding, per trained token."),
          "terminal": ("Signal left at the end", "mse", "Squared length of what is left of an embedding, per trained "
                       "token."),
          "absorbing_norm": ("Absorbing vector", "length", "Its length, before its weight in the loss."),
          "balance": ("Load balance", "balance", "1 where all experts are used equally."),
          "router_z": ("Router z", "z", "Mean square of the log-sum-exp of the router's logits.")}
_SYSTEMS = {"model": "model", "shuffled_sources": "wrong source", "context_free": "context-free"}
_SPEEDS = {"tokens_per_s": ("Tokens per second", "tokens/s"),
           "trained_tokens_per_s": ("Trained tokens per second", "tokens/s"),
           "tflops_per_s": ("Useful arithmetic", "TFLOP/s"), "mfu": ("Share of the peak (MFU)", "share"),
           "memory_gb": ("Peak memory of the first rank", "GB")}
_MOST_LAYERS, _MOST_COLUMNS, _MOST_CELLS, _MOST_STARVED = 12, 60, 12_000, 12


def losses(runs: Sequence[Run]) -> str:
    """Every loss term that a run reports, over steps."""
    drawn = [_over_steps(runs, key, title, y, note) for key, (title, y, note) in _TERMS.items() if _any(runs, key)]
    return _without(runs, "loss", "train.log_every steps") + _figures(drawn)


def noise_levels(runs: Sequence[Run]) -> str:
    """Training's cross-entropy at each noise level, over steps."""
    bins = max((len(line.get("cross_entropy_by_noise", ())) for run in runs for line in run.of_kind("train")),
               default=0)
    if not bins:
        return missing("No cross-entropy by noise level in metrics.jsonl: this version of the trainer writes it")
    names = {tuple(_level_names(run, bins)) for run in runs}
    chosen = names.pop() if len(names) == 1 else _numbered(bins)
    cells = []
    for level, name in enumerate(chosen):
        curves = []
        for place, run in enumerate(runs):
            values = [(line["step"], line["cross_entropy_by_noise"][level]) for line in run.of_kind("train")
                      if "cross_entropy_by_noise" in line]
            points = [(step, value) for step, value in values if value is not None]  # None: no token fell there
            curves.append(Series(run.name, points, place, place // COLOURS))
        cells.append((name, curves))
    return panels("Cross-entropy while training, by noise level", cells, y="nats per token",
                  note="From the cleanest level to the noisiest; every panel is equally many nats high, so that slopes "
                       "compare.")


def _numbered(bins: int) -> tuple[str, ...]:
    ends = {0: ", cleanest", bins - 1: ", noisiest"}
    return tuple(f"level {index + 1}{ends.get(index, '')}" for index in range(bins))


def _level_names(run: Run, bins: int) -> Sequence[str]:
    middles = _level_middles(run, bins)
    return [f"log-SNR {middle:.2f}" for middle in middles] if middles else _numbered(bins)


def _level_middles(run: Run, bins: int) -> list[float]:
    """log-SNR at the middle of each training bin, [] where it is not known. The bins slice the log-SNR's range equally,
    and the evaluation's levels are middles of slices of the same range where log-SNR is linear in time."""
    evaluation = run.last_evaluation
    linear = run.config.get("model", {}).get("diffusion", {}).get("schedule") == "log_snr"
    if not linear or evaluation is None or len(evaluation["log_snr"]) < 2:
        return []
    levels = evaluation["log_snr"]
    slice_ = (levels[0] - levels[-1]) / (len(levels) - 1)
    high, width = levels[0] + slice_ / 2, slice_ * len(levels) / bins
    return [high - (index + 0.5) * width for index in range(bins)]


def evaluation(runs: Sequence[Run]) -> str:
    """Held-out cross-entropy: over steps, and at the last evaluation by noise level."""
    done = [run for run in runs if run.last_evaluation]
    absent = "".join(missing(f"{run.name}: no evaluation yet; the trainer makes one every train.eval_every steps where "
                             "data.valid is set") for run in runs if run not in done)
    if not done:
        return absent
    over_steps, by_level, gains = [], [], []
    for place, run in enumerate(runs):
        if run not in done:
            continue
        last = run.last_evaluation
        for dash, (system, title) in enumerate(_SYSTEMS.items()):
            if system not in last["by_level"]:
                continue
            name = title if len(runs) == 1 else f"{run.name}, {title}"
            colour, dash = (dash, 0) if len(runs) == 1 else (place, dash)
            over_steps.append(Series(name, run.curve(f"cross_entropy_{system}", "eval"), colour, dash))
            values = last["by_level"][system]
            by_level.append(Series(name, list(zip(last["log_snr"], values, strict=True)), colour, dash))
            if system != "context_free":
                gain = [free - value for free, value in zip(last["by_level"]["context_free"], values, strict=True)]
                gains.append(Series(name, list(zip(last["log_snr"], gain, strict=True)), colour, dash))
    level = "log-SNR (from clean to noisy)"
    drawn = [lines("Held-out cross-entropy", over_steps, y="nats per token", marks=True),
             lines("Last evaluation by noise level", by_level, x=level, y="nats per token", marks=True, flip=True),
             lines("What context adds", gains, x=level, y="nats less than context-free", marks=True, flip=True,
                   from_zero=True, key=True, note="The gap between model and wrong source is what the source adds.")]
    return ("<p>Context-free is the best that can be known of a token from its own noisy embedding; wrong source is "
            "the same model with another document's source.</p>" + absent + _figures(drawn)
            + _figures([_level_table(run, len(runs) > 1) for run in done]))


def _level_table(run: Run, named: bool) -> str:
    last = run.last_evaluation
    systems = [system for system in ("context_free", "model", "shuffled_sources") if system in last["by_level"]]
    rows = [(f"{log_snr:.2f}", *(f"{last['by_level'][system][index]:.3f}" for system in systems))
            for index, log_snr in enumerate(last["log_snr"])]
    means = [f"{last[f'cross_entropy_{system}']:.3f}" for system in systems]
    rows.append((f"mean of {last.get('levels_averaged', len(rows))}", *means))
    title = f"Step {last['step']:,}, nats per token" + (f": {run.name}" if named else "")
    return table(title, ("log-SNR", *(_SYSTEMS[system] for system in systems)), rows, numbers=True)


def experts(runs: Sequence[Run]) -> str:
    """How evenly each layer's experts are used."""
    done = [run for run in runs if any("expert_tokens" in line for line in run.of_kind("train"))]
    if not done:
        return missing("No use of experts in metrics.jsonl: the network has none, or an older version of the trainer "
                       "wrote it")
    measures = (("expert_variation_worst", "Variation of the most uneven layer", "std / mean",
                 "Of the experts' shares of the tokens; 0 where all are used equally."),
                ("router_entropy", "Router entropy", "nats per token",
                 "At most the logarithm of the number of experts, where the router has no preference."),
                ("dead_experts", "Dead experts", "experts",
                 "Of all layers; without a single token since the line of metrics before."))
    drawn = [_over_steps(runs, *measure, from_zero=True) for measure in measures if _any(runs, measure[0])]
    key = ("<p class=note>Share of a layer's tokens that each expert gets:</p>"
           + shade_key("none", "an equal share", "twice that or more"))
    return _figures(drawn) + key + "".join(_use(run, len(runs) > 1) for run in done)


def _use(run: Run, named: bool) -> str:
    """Letters: S lines of metrics, L layers, E experts, C columns of a map, B bins."""
    lines_with = [line for line in run.of_kind("train") if "expert_tokens" in line]
    step_S = [line["step"] for line in lines_with]
    tokens_SLE = np.array([line["expert_tokens"] for line in lines_with], dtype=float)
    equal_SLE = tokens_SLE / tokens_SLE.mean(-1, keepdims=True)  # 1 is an equal share
    layers, count = equal_SLE.shape[1:]
    shown = np.unique(np.linspace(0, layers - 1, min(layers, _MOST_LAYERS)).round().astype(int)).tolist()
    columns = max(10, min(_MOST_COLUMNS, _MOST_CELLS // (len(shown) * count)))
    groups = np.array_split(np.arange(len(step_S)), min(columns, len(step_S)))
    last = lines_with[-1]
    by_position_LBE = count * np.array(last["expert_share_by_position"])
    by_position_LBE[~by_position_LBE.any(-1)] = np.nan  # no tokens of this tenth pass the layer: left blank
    by_noise_LBE = count * np.array(last["expert_share_by_noise"])
    tenths, levels = by_position_LBE.shape[1], by_noise_LBE.shape[1]
    percent = [100 * (tenth + 0.5) / tenths for tenth in range(tenths)]
    middles = _level_middles(run, levels) or range(1, levels + 1)
    over_steps, by_bin = [], []
    for layer in shown:
        name = f"{run.name}, layer {layer}" if named else f"Layer {layer}"
        means_EC = np.stack([equal_SLE[group, layer].mean(0) for group in groups], axis=1)
        over_steps.append(_map_of_experts(name, [step_S[group[-1]] for group in groups], means_EC, "step"))
        by_bin += [
            _map_of_experts(f"{name}, by position", percent, by_position_LBE[layer].T, "place in the document, %"),
            _map_of_experts(f"{name}, by noise", middles, by_noise_LBE[layer].T, "noise level, from clean to noisy")]
    return (_figures(over_steps) + _starved(run, named) + _figures(by_bin)
            + _use_table(run.name if named else "", last, equal_SLE[-1]))


def _use_table(name: str, line: dict, equal_LE: np.ndarray) -> str:
    rows = [(str(layer), f"{equal_E.std():.3f}", f"{line['router_entropy_by_layer'][layer]:.2f}",
             str((equal_E == 0).sum()), f"{equal_E.min():.2f}", f"{equal_E.max():.2f}",
             " ".join(f"{share:.1f}" for share in 100 * equal_E / equal_E.size))
            for layer, equal_E in enumerate(equal_LE)]
    columns = ("layer", "variation", "entropy", "dead", "least / equal", "most / equal", "shares in %")
    return table(f"Step {line['step']:,}" + (f", {name}" if name else "") + ": use of experts by layer", columns, rows,
                 numbers=True)


def _map_of_experts(title: str, columns: Sequence[float], equal_EC: np.ndarray, x: str) -> str:
    """equal_EC: shares, 1 being an equal one."""
    return heat_map(title, columns, [(str(expert), row) for expert, row in enumerate(equal_EC.tolist())],
                    lambda share: share / 2, y="expert", x=x)


def _starved(run: Run, named: bool) -> str:
    """The warnings of starving experts that the run gave."""
    told = [(event["step"], *place) for event in run.of_kind("event") if event.get("event") == "experts starve"
            for place in event["layer_and_expert"]]
    if not told:
        return ""
    texts = [f"expert {expert} of layer {layer} (step {step:,})" for step, layer, expert in told[:_MOST_STARVED]]
    if len(told) > len(texts):
        texts.append(f"{len(told) - len(texts)} more")
    return f"<p class=note>Starved{escape(f' in {run.name}') if named else ''}: {', '.join(texts)}.</p>"


def optimisation(runs: Sequence[Run]) -> str:
    drawn = [_over_steps(runs, key, title, y, from_zero=True)
             for key, title, y in (("lr", "Learning rate", "learning rate"),
                                   ("gradient_norm", "Gradient norm before clipping", "norm")) if _any(runs, key)]
    return _figures(drawn)


def speed(runs: Sequence[Run]) -> str:
    keys = [key for key in _SPEEDS if _any(runs, key)]
    drawn = [_over_steps(runs, key, *_SPEEDS[key], from_zero=True) for key in keys]
    rows = [(", ".join(_SPEEDS[key]), *(_median(run.curve(key)) for run in runs)) for key in keys]
    return _figures(drawn) + (table("Medians over the run", ("", *(run.name for run in runs)), rows, numbers=True)
                              if rows else "")


def _median(curve: Sequence[tuple[float, float]]) -> str:
    return number(statistics.median(value for _, value in curve)) if curve else ""


def _over_steps(runs: Sequence[Run], key: str, title: str, y: str, note: str = "", *, from_zero: bool = False) -> str:
    curves = [Series(run.name, run.curve(key), place, place // COLOURS) for place, run in enumerate(runs)]
    return lines(title, curves, y=y, note=note, from_zero=from_zero)


def _any(runs: Sequence[Run], key: str) -> bool:
    return any(run.curve(key) for run in runs)


def _without(runs: Sequence[Run], key: str, when: str) -> str:
    return "".join(missing(f"{run.name}: no training metrics yet; the trainer writes them every {when}")
                   for run in runs if not run.curve(key))


def _figures(drawn: Sequence[str]) -> str:
    return f"<div class=figures>{''.join(drawn)}</div>" if drawn else ""
