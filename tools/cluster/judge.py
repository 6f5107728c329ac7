"""Which nodes cannot take part, and why, from what the probes printed.

    python tools/cluster/judge.py --bad FILE nodes|ranks PLAN.json LOG ...

Each LOG holds what one node's `node_probe.py`, or one rank's `rank_probe.py`, printed. One line for each bad node on
standard output, their names into FILE, and exit code 92; 0 where all is well. What is wrong on most nodes is no node's
fault: then FILE stays empty and the exit code is that of the mistake.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import argparse
import json
from collections import Counter
from statistics import median

from tools.command import run
from trainer.errors import ExitCode
from trainer.parser import Parser

STAGES = ("device", "store", "group", "all_reduce", "all_to_all")
"""Of `rank_probe.py`, in its order."""
CLOCK_SECONDS = 5.0
"""Greatest difference of clocks: more, and times of files and logs no longer tell what came first."""
_EVERYWHERE = {"data": ExitCode.DATA, "run folder": ExitCode.CHECKPOINT, "disk space": ExitCode.CHECKPOINT}
"""Kinds of problems that, found on most nodes, are the user's to mend: the exit code that the trainer has for them."""


def judge_nodes(plan: dict, reports: list[dict]) -> dict[str, list[tuple[str, str]]]:
    """Node -> (kind, problem) of those that are not as they should be, from the lines of `node_probe.py`."""
    nodes = plan["nodes"]
    found: dict[str, list[tuple[str, str]]] = {node: [] for node in nodes}
    by_node = {report["node"]: report for report in reports}
    for node, report in by_node.items():
        found[node] += [tuple(problem) for problem in report["problems"]]
    for node in set(nodes) - by_node.keys():
        found[node].append(("silent", "did not answer: down, hung, or it does not see this folder or its Python"))
    for name in sorted({name for report in reports for name in report["facts"]}):
        values = {node: report["facts"].get(name, "none") for node, report in by_node.items()}
        (usual, count), *others = Counter(values.values()).most_common()
        if others and count > others[0][1]:
            for node, value in values.items():
                if value != usual:
                    found[node].append(("version", f"{name} is {value}, on the other nodes {usual}"))
        elif others:
            found[nodes[-1]].append(("version", f"{name} differs: {'; '.join(f'{n} {v}' for n, v in values.items())}"))
    for node, report in by_node.items():
        offset = median(report["clock_offset"].values()) if report["clock_offset"] else 0.0
        if abs(offset) > CLOCK_SECONDS:
            found[node].append(("clock", f"its clock is {abs(offset):.0f} s {'behind' if offset > 0 else 'ahead'}"))
    _blame_for_ways(by_node, {node for node in nodes if found[node]}, found)
    return {node: problems for node, problems in found.items() if problems}


def _blame_for_ways(by_node: dict[str, dict], known: set[str], found: dict[str, list[tuple[str, str]]]) -> None:
    """A way between two nodes that fails belongs to the node most of whose ways fail, one node after the other."""
    ways = {(report["node"], other): why for report in by_node.values() for other, why in report["unreached"].items()}
    ways |= {(other, report["node"]): "was not heard" for report in by_node.values() for other in report["unheard"]
             if (other, report["node"]) not in ways}
    ways = {way: why for way, why in ways.items() if not known & set(way)}
    while ways:
        counts = Counter(node for way in ways for node in way)
        worst = max(counts, key=lambda node: (counts[node], node))
        own = {way: why for way, why in ways.items() if worst in way}
        (start, end), why = next(iter(own.items()))
        found[worst].append(("network", f"{len(own)} of its ways to other nodes fail, such as {start} to {end}: {why}"))
        ways = {way: why for way, why in ways.items() if worst not in way}


def judge_ranks(plan: dict, reports: list[dict]) -> dict[str, list[tuple[str, str]]]:
    """Node -> problems of those whose ranks fell behind the others, from the lines of `rank_probe.py`."""
    passed: dict[str, Counter[int]] = {node: Counter() for node in plan["nodes"]}  # node -> rank -> stages
    errors: dict[str, str] = {}
    for report in reports:
        if "passed" in report:
            passed[report["node"]][report["rank"]] = STAGES.index(report["passed"]) + 1
        else:
            errors.setdefault(report["node"], f"rank {report['rank']}: {report['error']}")
    ranks = plan["ranks"] // len(plan["nodes"])
    came = {node: min(stages.values()) if len(stages) == ranks else 0 for node, stages in passed.items()}
    if min(came.values()) == len(STAGES):
        return {}
    behind = [node for node, stage in came.items() if stage < max(came.values())] or plan["nodes"]
    return {node: [("collectives", f"does not come through {STAGES[came[node]]}"
                    + (f" ({errors[node]})" if node in errors else ""))] for node in behind}


def main() -> None:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("probe", choices=("nodes", "ranks"))
    parser.add_argument("plan", type=Path)
    parser.add_argument("logs", type=Path, nargs="*")
    parser.add_argument("--bad", type=Path, required=True, help="file for the names of the bad nodes")
    args = parser.parse_args()
    plan = json.loads(args.plan.read_text())
    lines = (line for log in args.logs for line in log.read_text(errors="replace").splitlines())
    reports = [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]
    found = (judge_nodes if args.probe == "nodes" else judge_ranks)(plan, reports)
    for node, problems in found.items():
        print(f"{node}: {'; '.join(text for _, text in problems)}")
    if not found:
        args.bad.write_text("")
        sys.exit(ExitCode.FINISHED)
    kinds = Counter(kind for problems in found.values() for kind, _ in problems)
    common = kinds.most_common(1)[0][0]
    everywhere = len(found) > max(1, len(plan["nodes"]) // 2) or (len(found) == len(plan["nodes"])
                                                                   and common in _EVERYWHERE)
    args.bad.write_text("" if everywhere else ",".join(found))
    sys.exit(_EVERYWHERE.get(common, ExitCode.NODES) if everywhere else ExitCode.NODES)


if __name__ == "__main__":
    run(main)
