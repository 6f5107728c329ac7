"""Checks a finished run of the `tiny` preset: it uses context, and wrote what it should. Called with its folder."""

import json
import sys
from pathlib import Path


def main(run_dir: Path) -> None:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if line["kind"] == "train"]
    assert steps == sorted(set(steps)), "steps are repeated or out of order"
    last = [line for line in lines if line["kind"] == "eval"][-1]
    model, free = last["cross_entropy_model"], last["cross_entropy_context_free"]
    wrong = last["cross_entropy_shuffled_sources"]
    print(f"cross-entropy {model:.3f}, with wrong sources {wrong:.3f}, context-free posterior {free:.3f}")
    assert model < free, "the model is not below the context-free posterior"
    assert model < wrong, "the model does not use its source"
    peak = max(line["memory_gb"] for line in lines if line["kind"] == "train")
    assert peak < 3, f"{peak:.1f} GB a process"
    for name in ("model/model.safetensors", "generations/test.jsonl", "generations/test.scores.md", "status.json"):
        assert (run_dir / name).stat().st_size > 0, name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
