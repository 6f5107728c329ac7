"""Sections drawn from generations/: scores, samples beside references, and a text as it emerges from noise."""

from __future__ import annotations

import difflib
import json
import shlex
from collections.abc import Sequence
from html import escape

from tools.reporting.charts import Series, bars, lines
from tools.reporting.runs import Generations, Run
from tools.reporting.tables import missing, table
from tools.scoring.columns import COLUMNS

_SAMPLES, _TRACE_ROWS = 3, 10


def scores(runs: Sequence[Run]) -> str:
    """ROUGE of each run's texts beside the trivial baselines, a table and bars for every file of texts."""
    parts = [_ask_for(run, "generate") for run in runs if not run.generations]
    parts += [missing(f"{run.name}: {each.path.name} has no scores yet",
                      f"python tools/evaluate.py {shlex.quote(str(each.path))}")
              for run in runs for each in run.generations if not each.scores]
    for file in _files(runs):
        rows, groups = _systems(runs, file)
        if not rows:
            continue
        keys = [key for key in COLUMNS if any(key in values for _, values, _ in rows)]
        cells = [(name, *(f"{values[key]:.1f}" if isinstance(values.get(key), float) else str(values.get(key, ""))
                          for key in keys)) for name, values, _ in rows]
        parts.append(table(f"Scores of {file}", ("system", *(COLUMNS[key] for key in keys)), cells, numbers=True))
        parts.append(f"<div class=figures>{bars(f'ROUGE of {file}', groups)}</div>")
    return "".join(parts)


def _systems(runs: Sequence[Run], file: str) -> tuple[list[tuple[str, dict, int]], list]:
    """(name, scores, colour) of every model, then of every different baseline; and the same by ROUGE measure."""
    models, baselines = [], {}
    for place, run in enumerate(runs):
        found = _generated(run, file)
        for name, values in (found.scores or {}).items() if found else ():
            if name == "model":
                models.append((run.name if len(runs) > 1 else name, values, place))
            else:
                baselines.setdefault((name, json.dumps(values)), (name, values, len(runs) + len(baselines)))
    rows = models + list(baselines.values())
    return rows, [(f"ROUGE-{key.removeprefix('rouge')}", [(name, values[key], colour) for name, values, colour in rows])
                  for key in ("rouge1", "rouge2", "rougeL")]


def samples(runs: Sequence[Run]) -> str:
    """The first documents' texts beside their references, sources folded."""
    parts = []
    for file in _files(runs):
        found = [(run, each) for run in runs if (each := _generated(run, file)) and each.records]
        for record in found[0][1].records[:_SAMPLES] if found else ():
            texts = [(run.name, other) for run, each in found for other in each.records
                     if other["document"] == record["document"]]
            parts.append(_sample(file, record, texts, named=len(runs) > 1))
    return "".join(parts)


def _sample(file: str, record: dict, texts: Sequence[tuple[str, dict]], named: bool) -> str:
    entries = []
    for run, other in texts:
        remark = "" if other.get("ended", True) else " (fills the canvas without an end)"
        text = escape(other["text"]) or "<em>empty</em>"
        entries.append(f"<dt>{escape(run if named else 'generated')}{remark}</dt><dd>{text}</dd>")
    if record.get("reference"):
        entries.append(f"<dt>reference</dt><dd>{escape(record['reference'])}</dd>")
    source = (f"<details><summary>Source</summary><p tabindex=0>{escape(record['source'])}</p></details>"
              if record.get("source") else "")
    return (f"<article class=sample><h3>{escape(file)}, document {record['document']}</h3><dl>{''.join(entries)}</dl>"
            f"{source}</article>")


def emergence(runs: Sequence[Run]) -> str:
    """What the model would write if it stopped after each denoising step."""
    parts = [_ask_for(run, "trace") for run in runs if run.trace is None]
    curves = []
    for place, run in enumerate(runs):
        if run.trace is None:
            continue
        texts = [text.split() for text in run.trace["texts"]]
        parts.append(_strip(run, texts, named=len(runs) > 1))
        settled = [sum(map(len, _agreeing(words, texts[-1]))) / max(1, len(words), len(texts[-1])) for words in texts]
        curves.append(Series(run.name, [(step, 100 * share) for step, share in enumerate(settled, 1)], place))
    if curves:
        drawn = lines("Words as in the final text", curves, x="denoising step", y="%", from_zero=True, marks=True)
        parts.append(f"<div class=figures>{drawn}</div>")
    return "".join(parts)


def _strip(run: Run, texts: Sequence[list[str]], named: bool) -> str:
    last = len(texts) - 1
    shown = sorted({round(index * last / max(1, _TRACE_ROWS - 1)) for index in range(_TRACE_ROWS)})
    rows = "".join(f"<tr><th scope=row>{index + 1}</th><td class=number>{run.trace['log_snr'][index]:.1f}</td>"
                   f"<td>{_marked(texts[index], texts[-1])}</td></tr>" for index in shown)
    title = f"Document {run.trace['document']}" + (f", {run.name}" if named else "") + ": words already final in bold"
    return (f"<table class=trace><caption>{escape(title)}</caption><thead><tr><th scope=col>step</th>"
            f"<th scope=col class=number>log-SNR</th><th scope=col>most likely text</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>")


def _agreeing(words: list[str], final: list[str]) -> list[range]:
    """Runs of `words` that stand in the final text in the same order."""
    blocks = difflib.SequenceMatcher(None, words, final, autojunk=False).get_matching_blocks()
    return [range(block.a, block.a + block.size) for block in blocks if block.size]


def _marked(words: list[str], final: list[str]) -> str:
    parts, at = [], 0
    for block in _agreeing(words, final):
        parts += [("open", words[at:block.start]), ("settled", words[block.start:block.stop])]
        at = block.stop
    parts.append(("open", words[at:]))
    return " ".join(f"<span class={kind}>{escape(' '.join(some))}</span>" for kind, some in parts if some)


def _files(runs: Sequence[Run]) -> list[str]:
    return sorted({each.path.name for run in runs for each in run.generations})


def _generated(run: Run, file: str) -> Generations | None:
    return next((each for each in run.generations if each.path.name == file), None)


def _ask_for(run: Run, what: str) -> str:
    """How to get texts or a trace: from the finished model, or by finishing it first."""
    name = {"generate": "generated texts", "trace": "record of how a text emerges"}[what]
    if not (run.path / "model").is_dir():
        return missing(f"{run.name}: no {name}, for want of a finished model; start the run again to finish it",
                       run.command)
    option = " --trace" if what == "trace" else ""
    return missing(f"{run.name}: no {name} yet", f"python tools/generate.py {shlex.quote(str(run.path))}{option}")
