"""Make one HTML file that shows what a run learned, or that sets several runs side by side.

    python tools/report.py runs/tiny
    python tools/report.py runs/a runs/b --out comparison.html

The file needs no network and no other file. A part that a run cannot fill yet is left out, with one line that says
which command makes it.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import argparse
from collections.abc import Sequence
from html import escape

from model.errors import ConfigError
from tools.command import run
from tools.reporting import facts, texts, training
from tools.reporting.runs import Run, read_runs
from trainer.parser import Parser

_SECTIONS = (("Evaluation", training.evaluation), ("A text emerges", texts.emergence), ("Samples", texts.samples),
             ("Scores", texts.scores), ("Losses", training.losses), ("Noise levels", training.noise_levels),
             ("Experts", training.experts), ("Optimisation", training.optimisation), ("Speed", training.speed))
_STYLE = Path(__file__).with_name("reporting") / "page.css"


def build_parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default for a single run: report.html in its folder")
    return parser


def page(runs: Sequence[Run]) -> str:
    """The whole HTML document. A section without content is left out."""
    title = " · ".join(each.name for each in runs)
    bodies = [(name, section(runs)) for name, section in _SECTIONS]
    bodies = [(name, name.lower().replace(" ", "-"), body) for name, body in bodies if body]
    links = "".join(f'<a href="#{anchor}">{name}</a>' for name, anchor, _ in bodies)
    content = "".join(f"<section id={anchor}><h2>{name}</h2>{body}</section>" for name, anchor, body in bodies)
    return (f"<!doctype html><html lang=en><head><meta charset=utf-8><title>{escape(title)}</title>"
            '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
            f"<style>{_STYLE.read_text(encoding='utf-8')}</style></head><body><main><h1>{escape(title)}</h1>"
            f"{facts.tiles(runs[0]) if len(runs) == 1 else ''}<nav aria-label=Sections>{links}</nav>"
            f"{facts.facts(runs)}{content}</main></body></html>\n")


def main() -> None:
    args = build_parser().parse_args()
    if args.out is None and len(args.runs) > 1:
        raise ConfigError("--out", "is needed for a report on several runs")
    html = page(read_runs(args.runs))
    out = args.out or args.runs[0] / "report.html"
    try:
        out.write_text(html, encoding="utf-8", errors="replace")
    except OSError as error:
        raise ConfigError("--out", f"{out} cannot be written: {error.strerror}") from error
    print(f"report in {out}")


if __name__ == "__main__":
    run(main)
