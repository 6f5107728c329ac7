"""A folder in which runs of the small model are made, with faults, by ranks that are forked."""

from pathlib import Path

from tests.trainer.faults import nothing, start_with_fault
from tests.trainer.forked import join
from tests.trainer.launching import command_line, ds_config, write_corpus

WORLD, STEPS = 2, 10
SECONDS = 240


class Workplace:
    """A corpus and a finished run of STEPS steps on WORLD ranks, `whole`, that was saved at its end only."""

    def __init__(self, launcher, folder: Path):
        self.launcher, self.folder = launcher, folder
        self.corpus = write_corpus(folder)
        codes, printed = self.run("whole")
        assert codes == [0] * WORLD, printed

    def start(self, name: str, fault, stage: int = 2, world: int = WORLD, steps: int = STEPS,
              resume: Path | str = "auto", changed: dict | None = None, clipping: float = 0.5,
              init_from: Path | None = None, **settings) -> list:
        """Processes of all ranks of a run, to be started. settings: of the section `train`; changed: of any;
        clipping: of the DeepSpeed JSON."""
        settings = {f"train.{key}": value for key, value in {"steps": steps, **settings}.items()}
        command = command_line(ds_config(self.folder, micro=4 // world, stage=stage, gradient_clipping=clipping),
                               self.folder / name,
                               {**self.corpus, "optim.schedule": "constant", **settings, **(changed or {})})
        command += ["--resume", str(resume)] + (["--init_from", str(init_from)] if init_from else [])
        return start_with_fault(self.launcher, self.folder, command, world, fault)

    def run(self, name: str, fault=nothing, **settings) -> tuple[list[int], str]:
        """Exit codes of all ranks of a run, and what they printed."""
        processes = self.start(name, fault, **settings)
        return join(processes, SECONDS), self.printed(len(processes))

    def printed(self, world: int = WORLD) -> str:
        """What the ranks of the last run printed."""
        return "\n".join((self.folder / f"rank{rank}.txt").read_text() for rank in range(world))

    def weights(self, name: str) -> bytes:
        """The exported model of a finished run."""
        return (self.folder / name / "model" / "model.safetensors").read_bytes()

    def checkpoints(self, name: str) -> list[int]:
        """Steps of the folders of a run's checkpoints."""
        return sorted(int(path.name.removeprefix("step-")) for path in (self.folder / name / "checkpoints").iterdir())
