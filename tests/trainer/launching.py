"""Runs `trainer/run.py` for tests: real processes, a small model, a small corpus, exactly as a launcher starts them."""

import json
import os
import random
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# eps: Adam divides a gradient by its own size. Where it is almost zero, a rounding difference between two ways of
# adding up would otherwise become a step of full size, and send a token on the edge to another expert.
SMALL = {
    "data.vocab_size": 330, "data.max_source_tokens": 48, "data.max_target_tokens": 16, "data.row_tokens": 160,
    "data.draws_per_source": 2, "model.embed_dim": 16, "model.width": 32, "model.layers": 2, "model.time_dim": 16,
    "model.attention.heads": 2, "model.attention.window": 8, "model.moe.experts": 4, "model.moe.ffn": 32,
    "optim.warmup_steps": 2, "optim.eps": 1e-6, "train.steps": 20, "train.log_every": 1, "train.eval_every": 0,
    "train.sample_every": 0, "train.save_every": 0, "eval.documents": 4, "sample.documents": 2, "sample.steps": 3,
}


def write_corpus(folder: Path, documents: int = 60) -> dict[str, str]:
    """Small documents of made-up sentences; returns the `data.*` settings that name them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(60)]
    settings = {"data.cache_dir": str(folder / "cache"), "data.test": ""}
    for split, count in (("train", documents), ("valid", 6)):
        path = folder / f"{split}.jsonl"
        records = [{"src": " ".join(rng.choices(words, k=rng.randint(5, 40))),
                    "trg": " ".join(rng.choices(words, k=rng.randint(2, 8)))} for _ in range(count)]
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        settings[f"data.{split}"] = str(path)
    return settings


def ds_config(folder: Path, *, micro: int = 1, accumulation: int = 1, stage: int = 2, **extra) -> Path:
    path = folder / f"ds-{micro}-{accumulation}-{stage}.json"
    path.write_text(json.dumps({"train_micro_batch_size_per_gpu": micro, "gradient_accumulation_steps": accumulation,
                                "gradient_clipping": 0.5, "zero_optimization": {"stage": stage}, **extra}))
    return path


def command_line(ds: Path, run_dir: Path, settings: dict) -> list[str]:
    """Arguments of `trainer/run.py` for a run of the small model."""
    words = ["--ds_config", str(ds), "--run_dir", str(run_dir)]
    for key, value in {**SMALL, **settings}.items():
        words += ["--set", f"{key}={json.dumps(value) if not isinstance(value, str) else value}"]
    return words


def start(world: int, ds: Path, run_dir: Path, settings: dict, *arguments: str) -> list[subprocess.Popen]:
    """One process a rank, with the environment that torchrun would give it."""
    port = str(random.SystemRandom().randint(20000, 32000))
    command = [sys.executable, str(ROOT / "trainer" / "run.py"), *command_line(ds, run_dir, settings), *arguments]
    return [subprocess.Popen(command, cwd=run_dir.parent, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                             env={**os.environ, "RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_RANK": str(rank),
                                  "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu",
                                  "OMP_NUM_THREADS": "1"})
            for rank in range(world)]


def finish(processes: list[subprocess.Popen], expect: int = 0) -> str:
    """Waits for all ranks, checks their exit codes and returns what they printed."""
    outputs = [process.communicate(timeout=600)[0] for process in processes]
    codes = [process.returncode for process in processes]
    assert codes == [expect] * len(codes), f"exit codes {codes}\n" + "\n".join(outputs)
    return "\n".join(outputs)


def lines(run_dir: Path, kind: str = "train") -> list[dict]:
    """The run's metrics of one kind."""
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record for record in records if record["kind"] == kind]
