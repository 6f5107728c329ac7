"""What a run measured of its model, for the model card."""

from __future__ import annotations

import json
from pathlib import Path

from tools.reporting.runs import read_run
from trainer.checkpoint_folder import FOLDER
from trainer.export import model_folder

EVALUATED = {"context_free": "context-free", "model": "model", "shuffled_sources": "wrong source"}
"""What cross-entropies are of, in metrics.jsonl and in words."""


def figures_of(source: Path, step: int | None) -> dict:
    """`evaluation`: the newest one up to `step`; `scores`: of generated texts, tables by data set, if they are of the
    model of that step. Empty for a source that is no run's and keeps none itself."""
    run_dir = _run_folder(source)
    if run_dir is None:
        config = source / "config.json"
        return json.loads(config.read_text()).get("figures", {}) if config.is_file() else {}
    evaluations = [line for line in read_run(run_dir, run_dir.name).of_kind("eval")
                   if "by_level" in line and line["step"] <= (step or 0)]
    figures = {}
    if evaluations:
        last = evaluations[-1]
        figures["evaluation"] = {"step": last["step"], "tokens": last["tokens"], **{
            name: last[f"cross_entropy_{name}"] for name in EVALUATED if f"cross_entropy_{name}" in last}}
    finished = model_folder(run_dir) / "config.json"
    scores = sorted((run_dir / "generations").glob("*.scores.md"))
    if scores and finished.is_file() and json.loads(finished.read_text()).get("step") == step:
        figures["scores"] = {path.name.removesuffix(".scores.md"): path.read_text() for path in scores}
    return figures


def _run_folder(source: Path) -> Path | None:
    """The run that a source lies in: itself, or the one whose model or checkpoint it is."""
    source = source.absolute()
    around = {"model": source.parent}.get(source.name, source)
    if source.parent.name == FOLDER:
        around = source.parent.parent
    return around if (around / "config" / "run.toml").is_file() and (around / "metrics.jsonl").is_file() else None
