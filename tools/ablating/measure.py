"""Measures one trained model of a grid: python tools/ablating/measure.py RUN_FOLDER

Reads `job.json` in the folder, writes `measured/`: levels.json, and for every sampler its texts and NAME.json with
scores. What is there already with the same facts is kept.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import json
import time
from dataclasses import replace

import torch

from model.allocator import keep_freed_memory
from model.diffusion_lm import DiffusionLM
from tools.ablating.documents import Test
from tools.ablating.jobs import LEVELS, MEASURES, measured_with
from tools.ablating.levels import matched_levels
from tools.command import run
from tools.scoring.facts import coverage
from tools.scoring.overlap import bleu_counts
from tools.scoring.support import supported
from tools.scoring.systems import score
from trainer.config import SampleConfig
from trainer.data.files import write_text_whole
from trainer.data.prepare import PreparedData, prepare
from trainer.export import read_model
from trainer.generate import generate
from trainer.metrics import peak_memory_gb

_TOKENS_AT_A_TIME = 4096


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())
    keep_freed_memory()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model, vocabulary, config = read_model(folder / "model", device, "auto")
    data = prepare(replace(config.data, vocabulary=str(vocabulary.path)), splits=("valid", "test"))
    measured = folder / MEASURES
    measured.mkdir(exist_ok=True)
    for sampler in job["samplers"]:
        path, facts = measured / f"{sampler['file']}.json", sampler["facts"]
        if measured_with(path, facts) is None:
            found = _texts(model, data, Test.read(Path(job["test"])), facts, device)
            write_text_whole(path, json.dumps({"facts": facts, **found}))
    if measured_with(measured / LEVELS, job["levels"]) is None:
        model, _, _ = read_model(folder / "model")
        found = matched_levels(model, data.samples("valid", draws=1), job["levels"]["documents"], seed=0)
        write_text_whole(measured / LEVELS, json.dumps({"facts": job["levels"], **found}))


def _texts(model: DiffusionLM, data: PreparedData, test: Test, facts: dict, device: torch.device) -> dict:
    """The texts of one sampler and their scores. facts: `Job.sampler_facts`."""
    how = SampleConfig(**facts["sample"])
    samples = data.samples("test", draws=1)
    sources = [(number, samples.source(number)) for number in range(len(samples))]
    at_a_time = max(1, _TOKENS_AT_A_TIME // int(samples.tokens_S.max()))
    began, began_cpu = time.perf_counter(), time.process_time()
    texts = [record["text"] for record in generate(
        model, data.vocabulary, sources, samples.canvas_tokens, how.settings(), device=device,
        candidates=how.candidates, documents_per_batch=at_a_time)]
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - began_cpu
    return {"texts": texts, "seconds_per_text": seconds / len(texts),
            "cpu_seconds_per_text": cpu_seconds / len(texts), "memory_gb": peak_memory_gb(device),
            **scores(texts, test, facts["task"])}


def scores(texts: list[str], test: Test, task: str) -> dict:
    """values: by name of a column; by_document: what the means among them are of; bleu_counts: for resampling."""
    found = score(texts, test.references, task=task)
    values = dict(found.values)
    if test.asked:
        share = coverage(texts, test.asked)
        values |= {} if share is None else {"slots": 100 * share}
    else:
        share = supported(texts, test.sources)
        values |= {} if share is None else {"supported": share}
    return {"values": values, "by_document": found.by_document,
            "bleu_counts": bleu_counts(texts, test.references).tolist()}


if __name__ == "__main__":
    run(main)
