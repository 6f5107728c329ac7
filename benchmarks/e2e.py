"""How well the default recipe writes after four minutes on two cores: restaurant facts to a sentence.

    python benchmarks/e2e.py FOLDER [--run_dir runs/e2e] [--set key=value ...]

FOLDER holds train, valid and test.jsonl.gz of the cleaned E2E data set (github.com/tuetschek/e2e-cleaning, CC BY-SA
4.0) as {"src": "name[Aromi], food[Chinese]", "trg": sentence}. Texts are lower-cased and their punctuation is set
apart. The preset `short` is trained by two processes, one thread each, and one sentence is written for every distinct
set of facts in test.

BLEU: sacrebleu's corpus BLEU against all references of the same facts. slots: share of the names, places, foods, types
and areas of the facts that stand word for word in the sentence. Beside the model stand two systems that do not learn:
a random training sentence, and the sentence of the training facts that share most with the facts asked for. Prints the
CPU time of the training as well: on a machine that does other things it says more than the clock.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import resource
import shlex
import subprocess
import sys
import time
from collections import defaultdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.report import fingerprint
from model.packing import source_segment
from tools.scoring.facts import Facts, coverage, facts, nearest, source_text, words
from tools.scoring.overlap import corpus_bleu
from trainer.export import read_model
from trainer.generate import generate

ROOT = Path(__file__).resolve().parents[1]
SPLITS = ("train", "valid", "test")
DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "gradient_clipping": 1.0, "zero_optimization": {"stage": 1}}


def read(path: Path) -> list[tuple[Facts, str]]:
    """(facts, sentence) of every line."""
    with gzip.open(path, "rt") as file:
        return [(facts(record["src"]), words(record["trg"])) for record in map(json.loads, file)]


def train(folder: Path, run_dir: Path, overrides: list[str]) -> tuple[float, float]:
    """Trains the preset on the prepared files. Returns (seconds of the clock, seconds of CPU time)."""
    (run_dir / "ds.json").write_text(json.dumps(DS_CONFIG))
    settings = [*(f"data.{split}={folder / split}.jsonl" for split in SPLITS), f"data.cache_dir={folder / 'cache'}",
                *overrides]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
               str(ROOT / "trainer" / "run.py"), "--ds_config", str(run_dir / "ds.json"), "--preset", "short",
               "--run_dir", str(run_dir), *(word for text in settings for word in ("--set", text))]
    print(shlex.join(command), flush=True)
    began = time.perf_counter()
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"})
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.perf_counter() - began, used.ru_utime + used.ru_stime


def score(outputs: list[str], asked: list[Facts], references: list[list[str]]) -> dict[str, float]:
    return {"BLEU": corpus_bleu(outputs, references, tokenize="none"), "slots": coverage(outputs, asked),
            "distinct": len(set(outputs)) / len(outputs)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--run_dir", type=Path, default=Path("runs/e2e"))
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="as in trainer/run.py")
    args = parser.parse_args()
    data = {split: read(args.folder / f"{split}.jsonl.gz") for split in SPLITS}
    run_dir = args.run_dir.resolve() / fingerprint("e2e")  # a run of other code is not gone on with
    prepared = run_dir / "data"
    prepared.mkdir(parents=True, exist_ok=True)
    for split, pairs in data.items():
        (prepared / f"{split}.jsonl").write_text("".join(
            json.dumps({"src": source_text(facts_of), "trg": sentence}) + "\n" for facts_of, sentence in pairs))
    seconds, cpu_seconds = train(prepared, run_dir, args.set)

    grouped: dict[tuple, list[str]] = defaultdict(list)
    for pairs, sentence in data["test"]:
        grouped[tuple(pairs)].append(sentence)
    asked, references = [list(pairs) for pairs in grouped], list(grouped.values())
    model, vocabulary, run = read_model(run_dir / "model")
    sources = [source_segment(ids, run.data.max_source_tokens, vocabulary.bos_id, vocabulary.eos_id)
               for ids in vocabulary.encode([source_text(pairs) for pairs in asked])]
    records = generate(model, vocabulary, list(enumerate(sources)), run.data.max_target_tokens,
                       run.sample.settings(), device=torch.device("cpu"), candidates=run.sample.candidates,
                       documents_per_batch=32)
    outputs = [record["text"] for record in records]

    rng = random.Random(0)
    systems = {"model": outputs, "random training sentence": [rng.choice(data["train"])[1] for _ in asked],
               "nearest training facts' sentence": nearest(asked, data["train"]),
               "first reference": [each[0] for each in references]}
    print(f"{len(asked)} sets of facts; training took {seconds:.0f} s, {cpu_seconds:.0f} s of CPU time")
    print(f"{'':34}{'BLEU':>7}{'slots':>7}{'distinct':>10}")
    for name, texts in systems.items():
        result = score(texts, asked, references)
        print(f"{name:34}{result['BLEU']:7.1f}{result['slots']:7.2f}{result['distinct']:10.2f}")
    for pairs, output in list(zip(asked, outputs, strict=True))[:5]:
        print(f"\n{source_text(pairs)}\n  {output}")


if __name__ == "__main__":
    main()
