"""The page from figures made by hand, and which parts are measured again."""

import json
import re
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest

from benchmarks import page, run
from benchmarks.goals import GOALS
from benchmarks.plot import drawing
from benchmarks.report import ROOT, Report, fingerprint, machine, parser
from benchmarks.timing import MOST_WARM_UPS, WARM_UPS, Spread, Times, take_turns

GOAL = next(goal for goal in GOALS if goal.key == "attention.of_dense.2048")  # at least 3.2
MEMORY = next(goal for goal in GOALS if goal.key == "step.memory.16384")  # at most 1.1


def written(folder: Path, part: str, rows: list[tuple]) -> None:
    report = Report(part, "What it is.\n\n    python benchmarks/x.py\n\nHow it is done.")
    for row in rows:
        report.row(*row)
    report.table("Sizes", ["what", "size"], [["a|b", 1234.5], ["c", "–"]])
    report.plot("growth", "Growth", "tokens", "MiB", {"ours": [(512, 1.0), (2048, 4.0)]})
    report.write(folder / f"{part}.json")


def test_page(tmp_path):
    results, made = tmp_path / "results", tmp_path / "docs" / "benchmarks.md"
    plots = tmp_path / "docs" / "benchmarks-plots"
    plots.mkdir(parents=True)
    (plots / "old.svg").write_text("from an earlier run")
    written(results, "attention", [("of_dense.2048", "against dense", Spread(3.0, 2.9, 3.44)), ("other", "more", 7.0)])
    written(results, "step", [("memory.16384", "memory", 1.04)])
    page.write_page(results, made)
    text = made.read_text()
    lines = text.splitlines()
    goal = next(line for line in lines if line.startswith(f"| {GOAL.what} "))
    assert "at least 3.2x | 3x (2.9 to 3.44), **missed**" in goal
    memory = next(line for line in lines if line.startswith(f"| {MEMORY.what} "))
    assert "at most 1.1x | 1.04x |" in memory and "missed" not in memory
    assert sum("not measured: needs a GPU" in line for line in lines) == sum(goal.part == "gpu" for goal in GOALS)
    assert sum("| not measured |" in line for line in lines) == sum(goal.part != "gpu" for goal in GOALS) - 2
    assert "| more | 7x |  |" in lines and "| a\\|b | 1,234 |" in lines
    assert lines.index("## Attention") < lines.index("## Training step")
    assert "How it is done." in text and "python benchmarks/x.py" not in text
    assert machine() in text
    pictures = re.findall(r"\]\((benchmarks-plots/\w+\.svg)\)", text)
    assert pictures and {path.name for path in plots.iterdir()} == {"growth.svg"}
    ElementTree.parse(made.parent / pictures[0])


def test_the_page_in_the_tree_is_what_its_results_give(tmp_path):
    if not page.RESULTS.exists():
        pytest.skip("nothing was measured yet")
    found = {path.stem: json.loads(path.read_text()) for path in page.RESULTS.glob("*.json")}
    assert page.PAGE.read_text() == page.page_text(found, "benchmarks-plots")


def test_a_linear_curve_is_straight_and_names_are_kept():
    svg = ElementTree.fromstring(drawing("A & B", "n", "MiB", {"a<b": [(1, 1), (2, 2), (4, 4)], "other": [(4, 16)]}))
    texts = [node.text for node in svg.iter() if node.text]
    assert "A & B" in texts and "a<b" in texts
    dots = [(float(node.get("cx")), float(node.get("cy"))) for node in svg.iter() if node.tag.endswith("circle")][:3]
    (ax, ay), (bx, by), (cx, cy) = dots
    assert bx - ax == pytest.approx(cx - bx) and by - ay == pytest.approx(cy - by) and cy < ay


def test_every_goal_belongs_to_a_part_and_is_stated_once():
    assert {goal.part for goal in GOALS} <= set(page.TITLES)
    assert len({goal.key for goal in GOALS}) == len(GOALS) == len({goal.what for goal in GOALS})
    assert all((ROOT / "benchmarks" / f"{part}.py").exists() for part in page.TITLES)


def test_measured_again_when_sizes_code_or_machine_changed(tmp_path, monkeypatch):
    file = tmp_path / "moe.json"
    monkeypatch.setattr("sys.argv", ["benchmarks/moe.py"])
    assert not run.is_measured("moe", file)
    written(tmp_path, "moe", [])
    assert run.is_measured("moe", file)
    found = json.loads(file.read_text())
    for changed in ({"code": fingerprint("attention")}, {"machine": "another"},
                    {"command": "python benchmarks/moe.py --repeats 1"}):
        file.write_text(json.dumps({**found, **changed}))
        assert not run.is_measured("moe", file)


def test_every_part_depends_on_code_of_its_own():
    assert len({fingerprint(part) for part in page.TITLES}) == len(page.TITLES)


def test_the_command_on_the_page_leaves_out_where_the_json_went(monkeypatch):
    for words in (["--json", "x.json", "--repeats", "2"], ["--repeats", "2", "--json=x.json"]):
        monkeypatch.setattr("sys.argv", ["/somewhere/benchmarks/moe.py", *words])
        assert Report("moe", "").found["command"] == "python benchmarks/moe.py --repeats 2"


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["run.py", "atention"])
    with pytest.raises(SystemExit):
        run.main()
    assert "there is no part atention; there are attention, moe" in capsys.readouterr().err


def test_turns_warm_up_and_compare_turn_by_turn():
    ticks = iter([0.0, 4.0, 4.0, 6.0, 6.0, 9.0, 9.0, 10.0])
    calls = []
    times = take_turns({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 2, clock=lambda: next(ticks))
    assert len(calls) % 2 == 0 and 2 * (WARM_UPS + 2) <= len(calls) <= 2 * (MOST_WARM_UPS + 2)
    assert "".join(calls) == "ab" * (len(calls) // 2)
    assert times == {"a": [4.0, 3.0], "b": [2.0, 1.0]}
    assert times.ratio("a", "b") == Spread(2.5, 2.0, 3.0)
    assert times.seconds("a").scaled(2) == Spread(7.0, 6.0, 8.0)
    times = Times({"4 layers": [7.0], "2 layers": [4.0]})
    assert times.deeper("4 layers", "2 layers", layers=4, fewer=2, deep=12) == 19.0  # 1 and 1.5 a layer


@pytest.mark.parametrize("busy, turns", [(1, WARM_UPS), (4, 4), (99, MOST_WARM_UPS)])
def test_turns_count_when_the_system_has_little_to_do(monkeypatch, busy, turns):
    """The first `busy` turns spend a tenth of their time in the system."""
    clock = SimpleNamespace(user=0.0, system=0.0, calls=0)

    def step():
        clock.calls += 1
        clock.user, clock.system = clock.user + 9, clock.system + (1 if clock.calls < busy else 0.01)
    monkeypatch.setattr("os.times", lambda: (clock.user, clock.system, 0.0, 0.0, 0.0))
    assert take_turns({"a": step}, 3, clock=lambda: 0.0) == {"a": [0.0] * 3}
    assert clock.calls == turns + 3


def test_every_benchmark_writes_json():
    assert parser("about").parse_args(["--json", "x"]).json == Path("x")
