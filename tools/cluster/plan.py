"""What a job will train, checked once on its first node before anything else is started.

    python tools/cluster/plan.py PLAN.json --ranks 64 --gpus 8 --nodes node1,node2 --port 12345 --seconds 60 -- \\
        ARGUMENTS OF trainer/run.py

Prints the dry run, and writes into PLAN.json what every node is to be compared with (`node_probe.py`, `rank_probe.py`,
`judge.py`). A mistake in the configuration is one line and its documented exit code.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
from dataclasses import asdict, replace

import torch

from model.diffusion_lm import DiffusionLM
from tools.command import run as run_tool
from trainer.command_line import parse
from trainer.dry_run import describe_run
from trainer.parser import Parser
from trainer.topology import check_topology

_BYTES_A_PARAMETER = 16
"""Of a checkpoint: the weight, Adam's two moments and the averaged weight, in fp32."""


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("plan", type=Path, help="file to write")
    parser.add_argument("--ranks", type=int, required=True, help="ranks of the whole job")
    parser.add_argument("--gpus", type=int, required=True, help="GPUs that the job was given on every node")
    parser.add_argument("--nodes", required=True, help="names of the nodes, the one that leads first")
    parser.add_argument("--port", type=int, required=True, help="port for the probes, free on every node")
    parser.add_argument("--seconds", type=float, required=True, help="longest that a probe may wait for another node")
    parser.add_argument("arguments", nargs="+", help="the training's own")
    args = parser.parse_args()
    training, run, ds = parse(args.arguments)
    check_topology(run, ds, world=args.ranks)
    print(describe_run(run, ds, world=args.ranks))
    with torch.device("meta"):
        network = DiffusionLM(replace(run.model, vocab_size=run.model.vocab_size or run.data.vocab_size))
    parameters = sum(parameter.numel() for parameter in network.parameters())
    args.plan.write_text(json.dumps({
        "nodes": args.nodes.split(","), "ranks": args.ranks, "gpus": args.gpus, "port": args.port,
        "seconds": args.seconds, "run_dir": str(training.run_dir.absolute()), "data": asdict(run.data),
        "disk_bytes": 2 * _BYTES_A_PARAMETER * parameters}, indent=1) + "\n")


if __name__ == "__main__":
    run_tool(main)
