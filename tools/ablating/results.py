"""From the measures in the runs' folders to one dictionary, which tables and plots are made of.

    {title, question, budget, clock, command, columns, plots, machine,
     sets: [{name, task, origin, documents, trivial: {system: values}, levels, rows}]}

A set's `levels` are those of `levels.ACCURACIES` that all of its models reach: MATCHED values are means over these.

A row is a cell with a sampler: `cell`, `sampler`, `curve`, `settings` (its resolved configuration, dotted keys),
`seeds`, `values` {name of a column: one value a seed}, and, but for the first row of a set, `difference` {measure:
[mean, low, high]}: its lead over the first row, documents resampled in pairs, means over the seeds that both have; and
`difference_by_seed` {seed: the same of this seed alone}.
"""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

import numpy as np
import torch

from tools.ablating.documents import Test
from tools.ablating.grid import Grid, Sampler
from tools.ablating.jobs import CLOCK, Job, train_lines, training_seconds
from tools.ablating.levels import ACCURACIES, MATCHED
from tools.ablating.measure import scores
from tools.reporting.runs import read_run
from tools.scoring.bootstrap import RESAMPLES, Interval, drawn_sets
from tools.scoring.overlap import bleu_of
from trainer.config import describe
from trainer.hardware import processor


@dataclass(frozen=True)
class _Measured:
    """One model's texts of one sampler."""

    values: dict[str, float]
    by_document: dict[str, list[float]]
    bleu_counts: np.ndarray
    settings: dict[str, object]


def collect(grid: Grid, jobs: Sequence[Job], command: str) -> dict:
    """Of jobs that are done; sets without one are left out."""
    sets = []
    for name, data in grid.data.items():
        mine = [job for job in jobs if job.run.data_name == name]
        if not mine:
            continue
        test = Test.read(mine[0].test)
        trivial = {system: scores(texts, test, data.task)["values"] for system, texts in test.trivial.items()}
        levels = _common_levels(mine)
        sets.append({"name": name, "task": data.task, "origin": data.origin, "documents": len(test.sources),
                     "trivial": trivial, "levels": [ACCURACIES[place] for place in levels],
                     "rows": _rows(grid, mine, levels)})
    budget = {"minutes": grid.minutes} if grid.minutes else {"tokens": grid.tokens}
    return {"title": grid.title, "question": grid.question, "budget": budget, "clock": CLOCK, "command": command,
            "columns": grid.columns, "plots": [vars(plot) for plot in grid.plots], "machine": _machine(jobs),
            "sets": sets}


def _common_levels(jobs: Sequence[Job]) -> list[int]:
    """Places in ACCURACIES of the levels that all models reach; means over others would not compare."""
    found = [job.levels() for job in jobs]
    return [place for place in range(len(ACCURACIES)) if all(each["log_snr"][place] is not None for each in found)]


def _rows(grid: Grid, jobs: Sequence[Job], levels: Sequence[int]) -> list[dict]:
    rows: list[dict] = []
    first: dict[int, _Measured] = {}
    for cell in grid.cells:
        of_cell = [job for job in jobs if job.run.cell is cell]
        for sampler in grid.samplers:
            found = {job.run.seed: measured for job in of_cell
                     if (measured := _measured(job, sampler, levels)) is not None}
            if not found:
                continue
            curves = [cell.name if cell.curve is None else cell.curve,
                      sampler.name if sampler.curve is None else sampler.curve]
            each = list(found.values())
            row = {"cell": cell.name, "sampler": sampler.name, "curve": ", ".join(filter(None, curves)),
                   "settings": each[0].settings, "seeds": list(found),
                   "values": {name: [one.values.get(name) for one in each] for name in each[0].values}}
            if first:
                row["difference"] = _differences(found, first)
                row["difference_by_seed"] = {seed: _differences({seed: one}, first) for seed, one in found.items()}
            else:
                first = found
            rows.append(row)
    return rows


def _measured(job: Job, sampler: Sampler, at: Sequence[int]) -> _Measured | None:
    if sampler not in job.run.samplers or (found := job.measures(sampler)) is None:
        return None
    at_levels, run, lines = job.levels(), read_run(job.folder, ""), train_lines(job.folder)
    matched = {name: fmean(at_levels[name][place] for place in at) for name in MATCHED} if at else {}
    trained = {"minutes": training_seconds(lines, CLOCK) / 60, "steps": run.steps, "parameters": run.parameters,
               "tokens": sum(line["tokens"] for line in lines), "memory_gb": lines[-1]["memory_gb"],
               "generating_gb": found["memory_gb"], **expert_use(lines[-1]),
               "seconds_per_text": found["cpu_seconds_per_text" if CLOCK == "cpu_seconds" else "seconds_per_text"]}
    settings = {key.name: key.default for key in describe(job.run.config()) if key.name not in job.data}
    settings |= {f"sample.{name}": value for name, value in found["facts"]["sample"].items()}
    return _Measured({**found["values"], **matched, **trained}, found["by_document"], np.array(found["bleu_counts"]),
                     settings)


def expert_use(line: dict) -> dict[str, float]:
    """From a run's last line of metrics, means over layers; nothing for a run without experts.

    expert_variation: deviation / mean of the tokens of a layer's experts. position_routing: bits that the tenth of its
    document in which a token lies tells of the expert that it is sent to (mutual information, tenths counted alike).
    """
    if "expert_share_by_position" not in line:
        return {}
    bits_L = []
    for share_BE in np.array(line["expert_share_by_position"]):
        share_BE = share_BE[share_BE.any(1)]  # tenths of which tokens pass the layer: not all, if it is the last
        bits_L.append(_bits(share_BE.mean(0)) - _bits(share_BE).mean())
    return {"expert_variation": fmean(line["expert_variation_by_layer"]), "position_routing": float(fmean(bits_L))}


def _bits(share: np.ndarray) -> np.ndarray:
    """Entropy over the last dimension."""
    return -(share * np.log2(np.maximum(share, 1e-12))).sum(-1)


def _differences(these: dict[int, _Measured], those: dict[int, _Measured]) -> dict[str, list[float]]:
    """These over those, for BLEU and all measures that are means over documents, over the seeds that both have."""
    seeds = [seed for seed in these if seed in those]
    if not seeds:
        return {}
    found = {"bleu": bleu_difference([these[seed].bleu_counts for seed in seeds],
                                     [those[seed].bleu_counts for seed in seeds])}
    for name in these[seeds[0]].by_document:
        lead_SD = np.array([np.subtract(these[seed].by_document[name], those[seed].by_document[name])
                            for seed in seeds])
        found[name] = _interval(lead_SD.mean(), [lead_SD[:, drawn_D].mean()
                                                 for drawn_RD in drawn_sets(lead_SD.shape[1]) for drawn_D in drawn_RD])
    return {name: list(each) for name, each in found.items()}


def bleu_difference(these: Sequence[np.ndarray], those: Sequence[np.ndarray], resamples: int = RESAMPLES) -> Interval:
    """Of corpus BLEU, with the counts [D, 10] of the same documents by each seed's model; mean over seeds."""
    def bleu(counts: Sequence[np.ndarray], drawn_D: np.ndarray | slice) -> float:
        return fmean(bleu_of(each[drawn_D].sum(0)) for each in counts)

    everything = slice(None)
    leads = [bleu(these, drawn_D) - bleu(those, drawn_D)
             for drawn_RD in drawn_sets(len(these[0]), resamples) for drawn_D in drawn_RD]
    return _interval(bleu(these, everything) - bleu(those, everything), leads)


def _interval(value: float, resampled: Sequence[float]) -> Interval:
    low, high = np.percentile(resampled, (2.5, 97.5))
    return Interval(float(value), float(low), float(high))


def _machine(jobs: Sequence[Job]) -> dict:
    """Where and with what the first run that is there was trained."""
    environment = next((found for job in jobs if (found := read_environment(job.folder))), {})
    packages = environment.get("packages", {})
    return {"processor": processor(), "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
            "platform": platform.platform(), "commit": environment.get("commit", ""),
            "packages": {name: packages[name] for name in ("torch", "deepspeed") if name in packages}}


def read_environment(folder: Path) -> dict:
    path = folder / "config" / "environment.json"
    return json.loads(path.read_text()) if path.exists() else {}
