"""The report's head: what was run, and its most telling numbers."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from tools.reporting.charts import number
from tools.reporting.runs import Generations, Run
from tools.reporting.tables import table

_VERSIONS = ("torch", "deepspeed", "flash_attn", "megablocks")


def tiles(run: Run) -> str:
    """The most telling numbers of a single run, as far as it has them."""
    found = [("step" if run.steps == 1 else "steps", f"{run.steps:,}", _time(run.seconds))]
    if run.parameters is not None:
        found.append(("parameters", number(run.parameters), "in the finished model"))
    if evaluation := run.last_evaluation:
        others = {"shuffled_sources": "wrong source", "context_free": "context-free"}
        beside = ", ".join(f"{title} {evaluation[f'cross_entropy_{name}']:.3f}" for name, title in others.items()
                           if f"cross_entropy_{name}" in evaluation)
        found.append(("held-out nats per token", f"{evaluation['cross_entropy_model']:.3f}", beside))
    if speed := run.curve("tokens_per_s"):
        found.append(("tokens per second", f"{speed[-1][1]:,.0f}", "on all ranks together, at the end"))
    scored = [each for each in run.generations if each.scores and "model" in each.scores]
    if scored:
        found.append(("ROUGE-L", f"{scored[0].scores['model']['rougeL']:.1f}", _baselines(scored[0])))
    return "<div class=tiles>" + "".join(f"<div><span>{escape(name)}</span><b>{escape(value)}</b>"
                                         f"<span>{escape(note)}</span></div>" for name, value, note in found) + "</div>"


def facts(runs: Sequence[Run]) -> str:
    """A table with a column for every run; a row that no run can fill is left out."""
    columns = [_facts(run) for run in runs]
    rows = [(name, *(column[name] for column in columns)) for name in columns[0] if any(c[name] for c in columns)]
    return table("What ran", ("", *(run.name for run in runs)) if len(runs) > 1 else (), rows)


def _facts(run: Run) -> dict[str, str]:
    environment, train = run.environment, run.config.get("train", {})
    packages = environment.get("packages", {})
    zero = run.deepspeed.get("zero_optimization", {}).get("stage", 0) if run.deepspeed else None
    last = {key: curve[-1][1] for key in ("epoch", "memory_gb") if (curve := run.curve(key))}
    evaluation = run.last_evaluation or {}
    return {
        "preset, recipe": ", ".join(filter(None, (run.config.get("preset"), run.config.get("recipe")))),
        "state": _state(run),
        "steps": f"{run.steps:,} of {train['steps']:,}" if "steps" in train else f"{run.steps:,}",
        "passes over the data": f"{last['epoch']:.2f}" if "epoch" in last else "",
        "wall-clock time": _time(run.seconds),
        "cross-entropy": f"{evaluation['cross_entropy_model']:.4f} nats per token" if evaluation else "",
        "parameters": f"{run.parameters:,}" if run.parameters is not None else "",
        "device": environment.get("device", ""),
        "ranks": str(run.topology.get("world", "")),
        "DeepSpeed": "" if zero is None else f"ZeRO stage {zero}, {_precision(run.deepspeed)}",
        "kernels": "; ".join(f"{part}: {choice}" for part, choice in environment.get("kernels", {}).items()),
        "peak memory of the first rank": f"{last['memory_gb']:.2f} GB" if "memory_gb" in last else "",
        "seed": str(train.get("seed", "")),
        "versions": ", ".join(filter(None, [
            f"Python {environment['python']}" if "python" in environment else "",
            *(f"{name} {packages[name]}" for name in _VERSIONS if name in packages)])),
        "platform": environment.get("platform", ""),
        "commit": environment.get("commit", "")[:12],
        "command": run.command,
    }


def _state(run: Run) -> str:
    status, reason = run.status.get("status"), run.status.get("reason")
    if status is None:
        return "still running, or ended by force"
    said = {"done": "finished", "preempted": "stopped on request and saved", "stopped": "stopped by its user and saved"}
    return said.get(status, status) + (f" ({reason})" if reason else "")


def _precision(deepspeed: dict) -> str:
    return next((name for name in ("bf16", "fp16") if deepspeed.get(name, {}).get("enabled")), "fp32")


def _baselines(scored: Generations) -> str:
    return ", ".join(f"{name} {scores['rougeL']:.1f}" for name, scores in scored.scores.items() if name != "model")


def _time(seconds: float) -> str:
    """Seconds in the two greatest units that they fill; empty for none."""
    minutes, hours = seconds / 60, seconds / 3600
    if hours >= 1:
        return f"{int(hours):,} h {int(minutes) % 60} min"
    return f"{int(minutes)} min {int(seconds) % 60} s" if minutes >= 1 else f"{seconds:.0f} s" if seconds else ""
