"""What README and docs name exists: files, presets and options of commands."""

import re
import shlex

import pytest

from tests.trainer.launching import ROOT
from trainer.command_line import build_parser
from trainer.config_load import load

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted((ROOT / "data").rglob("README.md"))]
TOP = "benchmarks|data|docs|ds_configs|model|slurm|tests|tools|trainer"
NOT_IN_THE_TREE = {"data/cache", "slurm/site.env"}  # made by a run, by the user


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_named_files_exist(page):
    text = page.read_text()
    named = {match.rstrip("./") for match in re.findall(rf"(?<![\w/.-])((?:{TOP})/[\w./*-]*)", text)} - NOT_IN_THE_TREE
    missing = [name for name in sorted(named) if not list(ROOT.glob(name))]
    links = [target for target in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in target]
    missing += [target for target in links if not (page.parent / target).exists()]
    assert not missing


def commands() -> list[str]:
    """Every trainer/run.py command in README and docs, continuation lines joined, comments cut off."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```\w*\n(.*?)```", page.read_text(), flags=re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                _, separator, rest = line.partition("trainer/run.py")
                if separator and "--" in rest:
                    found.append(rest)
    return found


@pytest.mark.parametrize("command", commands())
def test_training_commands_are_understood(command):
    words = [word for word in shlex.split(command, comments=True) if word != "…"]
    if any(word.startswith("--help") for word in words):
        return
    args = build_parser().parse_args(words)
    load(args.preset, args.recipe, args.config, args.overrides)
    assert (ROOT / args.ds_config).is_file()


@pytest.mark.parametrize("path", sorted((ROOT / "docs" / "examples").glob("*.toml")), ids=lambda path: path.stem)
def test_example_configurations_load_with_the_command_at_their_head(path):
    command = next(line for line in path.read_text().splitlines() if "--config" in line)
    words = shlex.split(command.partition("trainer/run.py")[2] or command.partition("train_8node.sh")[2])
    args = build_parser().parse_args(["--ds_config", "ds_configs/zero2.json", *words])
    assert (ROOT / args.config) == path and (ROOT / args.ds_config).is_file()
    assert load(file=path).preset == "base"


def test_there_are_commands_to_check():
    assert len(commands()) >= 4
