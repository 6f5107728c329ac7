"""What the data costs: tokenizing, memory while streaming, and how long training waits for batches.

    python benchmarks/data.py

Three parts, on this machine:

- **tokenizing** the bundled documents with the tiny preset's vocabulary: documents, tokens and megabytes a second;
- **streaming** a synthetic corpus of JSON lines, larger than the memory that it may take: the peak over the process
  tree while it is tokenized into an empty cache and then iterated once, from the memory that the kernel counts as this
  tree's alone or its share (PSS), with mapped files and without;
- **training**: the tiny preset on the bundled documents for a few steps; the share of a step's time in which the loop
  waits for the loader; and how busy the loader's thread is with planning attention.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks.report import Report, parser
from trainer.config_load import load
from trainer.data.config import DataConfig
from trainer.data.corpus import REPOSITORY
from trainer.data.prepare import open_vocabulary, prepare

_ITERATE = """
import sys, json
sys.path.insert(0, sys.argv[1])
from trainer.data.config import DataConfig
from trainer.data.loader import PackedLoader
from trainer.data.prepare import prepare
data = prepare(DataConfig(**json.loads(sys.argv[2])), splits=("train",))
samples = data.samples("train")
loader = PackedLoader(samples, rows_per_micro_batch=4)
rows = loader.rows.locate(0)[2]
tokens = 0
for info, batches in loader.stream():
    tokens += info.tokens
    if (info.step + 1) * loader.rows_per_step >= rows:
        break
print(len(samples), tokens)
"""


def write_corpus(path: Path, megabytes: int) -> None:
    """JSON lines of documents of 200 to 4,000 made-up words and a summary, in all of so many megabytes."""
    random = np.random.default_rng(0)
    words = np.array(["".join(letters) for letters in random.choice(list("etaoinshrdlu"), (5000, 6))])
    written = 0
    with open(path, "w") as file:
        while written < megabytes * 2**20:
            text = " ".join(words[random.zipf(1.3, random.integers(200, 4000)) % 5000])
            written += file.write(json.dumps({"src": text, "trg": text[:300]}) + "\n")


class TreeMemory:
    """Peak memory of a process and its descendants, in MiB: `whole` with mapped files, `anonymous` without."""

    def __init__(self, pid: int):
        self.whole = self.anonymous = 0.0
        self._pid, self._done = pid, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stop(self) -> None:
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.2):
            whole = anonymous = 0
            for pid in [self._pid, *_descendants(self._pid)]:
                try:
                    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()[1:]
                except OSError:  # it has just ended
                    continue
                fields = {name: int(rest.split()[0]) for name, _, rest in (line.partition(":") for line in lines)}
                whole += fields.get("Pss", 0)
                anonymous += fields.get("Pss_Anon", 0)
            self.whole, self.anonymous = max(self.whole, whole / 1024), max(self.anonymous, anonymous / 1024)


def _descendants(pid: int) -> list[int]:
    try:
        children = [int(child) for task in Path(f"/proc/{pid}/task").iterdir()
                    for child in (task / "children").read_text().split()]
    except OSError:
        return []
    return [found for child in children for found in [child, *_descendants(child)]]


def stream(folder: Path, megabytes: int, workers: int, vocabulary: Path) -> dict:
    """Tokenizes and iterates a synthetic corpus in a process of its own."""
    write_corpus(folder / "corpus.jsonl", megabytes)
    config = {"train": str(folder / "corpus.jsonl"), "vocabulary": str(vocabulary), "cache_dir": str(folder / "cache"),
              "workers": workers, "max_source_tokens": 4096, "row_tokens": 8192}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _ITERATE, str(REPOSITORY), json.dumps(config)],
                               stdout=subprocess.PIPE, text=True)
    memory = TreeMemory(process.pid)
    said, _ = process.communicate()
    memory.stop()
    if process.returncode:
        raise SystemExit("streaming failed")
    samples, tokens = map(int, said.split())
    return {"megabytes": megabytes, "documents": samples, "tokens": tokens, "peak_mib": memory.whole,
            "peak_anonymous_mib": memory.anonymous, "seconds": time.perf_counter() - started}


def tokenize(folder: Path, workers: int) -> dict:
    """Tokenizes the bundled training documents."""
    config = replace(load("tiny").data, cache_dir=str(folder / "cache"), workers=workers)
    vocabulary = open_vocabulary(config)
    started = time.perf_counter()
    cache = prepare(replace(config, vocabulary=str(vocabulary.path)), splits=("train",)).caches["train"]
    seconds = time.perf_counter() - started
    tokens = int(cache.source_lengths_N.sum() + cache.target_lengths_N.sum())
    return {"vocabulary": vocabulary.path, "documents_per_s": len(cache) / seconds, "tokens_per_s": tokens / seconds}


def train(folder: Path, steps: int, vocabulary: Path) -> dict:
    """Trains the tiny preset in this process, with the loop's own calls timed. The first three steps are left out."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from trainer import launch, loop
    from trainer.data.loader import PackedLoader
    from trainer.ds_config import load_ds_config
    from trainer.run_folder import RunFolder, on_first_rank
    from trainer.signals import StopRequest
    from trainer.watchdog import Watchdog

    waits: list[float] = []
    ends: list[float] = []
    planning: list[float] = []
    stream_steps = PackedLoader.stream

    def timed_stream(self, *args):
        steps = stream_steps(self, *args)
        while True:
            before = time.perf_counter()
            item = next(steps)
            ends.append(time.perf_counter())
            waits.append(ends[-1] - before)
            yield item

    plan = loop.DiffusionLM.prepare

    def timed_plan(*args, **more):
        before = time.perf_counter()
        planned = plan(*args, **more)
        planning.append(time.perf_counter() - before)
        return planned

    PackedLoader.stream, loop.DiffusionLM.prepare = timed_stream, timed_plan
    config = load("tiny", overrides=[f"train.steps={steps}", "train.eval_every=0", "train.sample_every=0",
                                     "train.save_every=0", f"data.vocabulary={vocabulary}",
                                     f"data.cache_dir={folder / 'cache'}"])
    ds = load_ds_config(REPOSITORY / "ds_configs/cpu_zero2.json")
    ranks = launch.start()
    place = RunFolder(folder / "run", "none", None)
    on_first_rank(ranks, lambda: place.open(config, ds, {}, lambda text: None))
    with place.kept():
        watchdog = Watchdog(place.path, ranks.rank, ranks.world, minutes=0)
        loop.TrainingRun(config, ds, place, ranks, StopRequest(0), watchdog).train()
    launch.stop()
    measured = ends[-1] - ends[2]
    return {"step_ms": measured / (len(ends) - 3) * 1e3, "exposed": sum(waits[3:]) / measured,
            "planning": sum(planning[3:]) / measured}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--megabytes", type=int, default=256, help="size of the synthetic corpus (default: 256)")
    options.add_argument("--workers", type=int, default=DataConfig.workers, help="processes (default: one a core)")
    options.add_argument("--steps", type=int, default=30, help="steps of training (default: 30)")
    args = options.parse_args()
    report = Report("data", __doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found = tokenize(folder, args.workers)
        report.row("documents", f"tokenizing with {args.workers or len(os.sched_getaffinity(0))} processes",
                   found["documents_per_s"], "documents/s")
        report.row("tokens", "the same", found["tokens_per_s"], "tokens/s")
        streamed = stream(folder, args.megabytes, args.workers, found["vocabulary"])
        what = f"streaming {streamed['megabytes']} MiB of JSON lines, {streamed['documents']:,} documents"
        report.row("streaming", what, streamed["seconds"], "s")
        report.row("peak", "its peak memory, of all processes", streamed["peak_mib"], "MiB")
        report.row("peak_anonymous", "its peak memory without mapped files", streamed["peak_anonymous_mib"], "MiB")
        trained = train(folder, args.steps, found["vocabulary"])
        report.row("step", "a step of training", trained["step_ms"], "ms")
        report.row("exposed", "share of it in which the loop waits for the loader", 100 * trained["exposed"], "%")
        report.row("planning", "share of it in which the loader's thread plans attention", 100 * trained["planning"],
                   "%")
    report.write(args.json)


if __name__ == "__main__":
    main()
