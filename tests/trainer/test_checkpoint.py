"""Checkpoints: whole or not there, whatever the disk, the user or a SIGKILL does meanwhile."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import signal
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch

from tests.trainer.faults import PHASES, AtBeat, FullDisk, KillWhileSaving, SlowDisk
from tests.trainer.launching import lines
from tests.trainer.workplace import STEPS, WORLD, Workplace
from trainer import checkpoint
from trainer.checkpoint_folder import by_step, completed
from trainer.errors import CheckpointError
from trainer.metrics import MetricsLog
from trainer.snapshot import HostCopies


@pytest.fixture(scope="module")
def place(launcher, tmp_path_factory):
    return Workplace(launcher, tmp_path_factory.mktemp("checkpoints"))


def test_a_users_copies_do_not_count(tmp_path):
    for name in ("step-00000002", "step-123456789", "step-00000002.bak", "step-00000010-good", "step-x", "other"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "step-00000002" / "manifest.json").touch()
    (tmp_path / "checkpoints" / "step-00000002.bak" / "manifest.json").touch()
    assert list(by_step(tmp_path)) == [2, 123456789]
    assert list(completed(tmp_path)) == [2]
    assert by_step(tmp_path / "none") == {}


def test_copies_outlive_training_and_reuse_their_memory():
    weights, shared = torch.arange(6.0), torch.ones(3)
    state = {"module": OrderedDict(a=weights.view(2, 3), b=weights[1:4]), "list": [shared, (shared, "text")],
             "scaler": SimpleNamespace(scale=2.0)}
    copies = HostCopies()
    first = copies.take("file", state)
    weights.zero_()
    state["scaler"].scale = 1.0
    assert first["module"]["a"].tolist() == [[0, 1, 2], [3, 4, 5]] and first["module"]["b"].tolist() == [1, 2, 3]
    assert type(first["module"]) is OrderedDict and first["scaler"].scale == 2.0
    assert first["list"][0] is first["list"][1][0] and first["list"][1][1] == "text"
    places = [first["module"]["a"].data_ptr(), first["module"]["b"].data_ptr()]
    state["list"] = torch.zeros(7)
    second = copies.take("file", state)
    assert [second["module"][name].data_ptr() for name in "ab"] == places and second["list"].shape == (7,)
    assert second["module"]["a"].sum() == 0


def test_copies_are_taken_to_reserved_memory():
    weights = torch.arange(6.0)
    copies = HostCopies()
    copies.reserve({"file": {"weights": weights}})
    (reserved,) = copies.join()["file"]
    copy = copies.take("file", {"weights": weights})["weights"]
    assert copy.data_ptr() == reserved.data_ptr() != weights.data_ptr() and torch.equal(copy, weights)


def test_copies_are_taken_though_nothing_could_be_reserved():
    copies = HostCopies()
    copies.reserve({"file": [torch.empty(3), torch.empty(1, device="meta").expand(2**60)]})  # more than there is
    assert copies.join() == {}
    assert copies.take("file", [torch.ones(3)])[0].sum() == 3


def test_every_damage_is_noticed(place, tmp_path):
    """Each file of a checkpoint, its manifest included: cut short, emptied, gone, and with one bit turned anywhere."""
    whole = place.folder / "whole" / "checkpoints" / f"step-{STEPS:08d}"
    checkpoint.check(whole)
    rng = random.Random(0)
    files = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert len(files) == 1 + 2 * WORLD + 1  # manifest, ZeRO's shard and the averages of each rank, the model
    for number, (name, damage) in enumerate(itertools.product(files, ("cut", "empty", "gone", *range(6)))):
        folder = tmp_path / str(number)
        shutil.copytree(whole, folder)
        content = bytearray((folder / name).read_bytes())
        if damage == "gone":
            (folder / name).unlink()
        elif isinstance(damage, str):
            (folder / name).write_bytes(content[:len(content) // 2 if damage == "cut" else 0])
        else:
            content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
            (folder / name).write_bytes(content)
        with pytest.raises(CheckpointError):
            checkpoint.check(folder)
        shutil.rmtree(folder)


def test_a_full_disk_costs_one_checkpoint(place):
    codes, printed = place.run("full", FullDisk(rank=1, steps=(6,)), save_every=3, keep_last=1)
    assert codes == [0, 0], printed
    assert "warning: no checkpoint of step 6: rank 1: No space left on device. The checkpoints before" in printed
    events = [(line["step"], line["event"]) for line in lines(place.folder / "full", "event")]
    assert [each for each in events if "saved" in each[1]] == [
        (3, "saved"), (6, "not saved"), (9, "saved"), (10, "saved")]
    assert place.checkpoints("full") == [10]  # nothing is left of the one that failed
    assert place.weights("full") == place.weights("whole")


@pytest.mark.slow
def test_no_room_at_the_end_is_an_error(place):
    codes, printed = place.run("full at the end", FullDisk(rank=0, steps=(STEPS,)), save_every=4)
    assert codes == [84, 84], printed
    assert "cannot be written: rank 0: No space left on device. Make room and start again" in printed
    assert place.checkpoints("full at the end") == [4, 8]
    codes, printed = place.run("full at the end", save_every=4)
    assert codes == [0, 0] and "step-00000008" in printed
    assert place.weights("full at the end") == place.weights("whole")


def test_training_goes_on_while_a_checkpoint_is_written(place):
    """What is saved is the state at its step, though the weights have moved on before it is written."""
    codes, printed = place.run("slow", SlowDisk(2.0), save_every=5, keep_last=0)
    assert codes == [0, 0], printed
    records = [json.loads(line) for line in (place.folder / "slow" / "metrics.jsonl").read_text().splitlines()]
    order = [(record["step"], record.get("event", record["kind"])) for record in records]
    assert order.index((5, "saving")) < order.index((6, "train")) < order.index((5, "saved"))
    shutil.rmtree(place.folder / "slow" / "checkpoints" / f"step-{STEPS:08d}")
    codes, printed = place.run("slow", save_every=5, keep_last=0)
    assert codes == [0, 0] and "step-00000005" in printed
    assert place.weights("slow") == place.weights("whole")


def test_a_continuation_removes_the_checkpoints_it_passed_over(place):
    place.run("branch", save_every=2, keep_last=0)
    assert place.checkpoints("branch") == [2, 4, 6, 8, 10]
    for step in (8, 10):
        (place.folder / "branch" / "checkpoints" / f"step-{step:08d}" / "manifest.json").write_text("{}")
    codes, printed = place.run("branch", save_every=2, keep_last=0, steps=7)
    assert codes == [0, 0] and "the next save removes step-00000010, step-00000008" in printed
    assert place.checkpoints("branch") == [2, 4, 6, 7]


@pytest.fixture(scope="module")
def halves(place):
    """Checkpoints of every second step of a run as long as the others."""
    codes, printed = place.run("halves", save_every=2, keep_last=0)
    assert codes == [0, 0], printed
    return place.folder / "halves" / "checkpoints"


def stop_at(step, phase="train"):
    return AtBeat(rank=1, phase=phase, step=step, signal=signal.SIGUSR1)


def resumed_from(printed) -> str:
    (line,) = {line for line in printed.splitlines() if line.startswith("resumed from ")}
    return line.removeprefix("resumed from ")


def test_the_same_resume_goes_on_with_what_was_saved_since(place, halves):
    """Whatever queues a job again repeats its command; only another checkpoint, or no record, begins anew."""
    origin, moved = halves / "step-00000004", place.folder / "moved"
    for fault in (stop_at(0, "resume"), stop_at(7)):  # stopped before the first step, and later
        codes, printed = place.run("moved", fault, resume=origin)
        assert codes == [0, 0] and resumed_from(printed) == str(origin), printed
    assert place.checkpoints("moved") == [7]
    codes, printed = place.run("moved", resume=origin)
    assert codes == [0, 0] and resumed_from(printed) == str(moved / "checkpoints" / "step-00000007"), printed
    assert printed.count(f"this run began with {origin} and goes on with what it saved since; to begin with that "
                         f"again, delete {moved / 'config' / 'origin.json'}") == 1
    assert place.weights("moved") == place.weights("whole")
    (moved / "config" / "origin.json").unlink()
    codes, printed = place.run("moved", stop_at(6), resume=origin)
    assert codes == [0, 0] and resumed_from(printed) == str(origin) and place.checkpoints("moved") == [6]
    codes, printed = place.run("moved", stop_at(3), resume=halves / "step-00000002")
    assert codes == [0, 0] and resumed_from(printed) == str(halves / "step-00000002")


def test_going_back_in_a_run_is_not_undone_by_a_stop(place, halves):
    """Until it has saved, the new continuation finds only checkpoints of the one that it has left; later it needs
    the one it began with no more."""
    shutil.copytree(halves.parent, place.folder / "back")
    back = place.folder / "back" / "checkpoints"
    origin = back / "step-00000004"
    for fault in (stop_at(0, "resume"), stop_at(7)):
        codes, printed = place.run("back", fault, save_every=2, keep_last=1, resume=origin)
        assert codes == [0, 0] and resumed_from(printed) == str(origin), printed
    assert place.checkpoints("back") == [7]
    codes, printed = place.run("back", save_every=2, keep_last=1, resume=origin)
    assert codes == [0, 0] and resumed_from(printed) == str(back / "step-00000007"), printed
    assert place.weights("back") == place.weights("whole")


def test_another_model_is_refused_with_the_keys_that_differ(place, halves):
    origin = halves / "step-00000004"
    codes, printed = place.run("wider", resume=origin, changed={"model.width": 64, "model.attention.window": 4})
    assert codes == [84, 84] and "Traceback" not in printed
    assert printed.count(f"error: {origin} holds the weights of another model (model.width was 32, is 64; "
                         "model.attention.window was 8, is 4): start it as it was saved") == 1


def test_the_optimizers_settings_are_the_configurations_not_the_checkpoints(place, halves):
    origin = halves / "step-00000004"
    for name, changes in (("as saved", {}), ("decay", {"changed": {"optim.weight_decay": 10.0}}),
                          ("betas", {"changed": {"optim.betas": [0, 0]}}), ("clipping", {"clipping": 1e-3})):
        codes, printed = place.run(name, resume=origin, **changes)
        assert codes == [0, 0], printed
        assert (place.weights(name) == place.weights("whole")) == (name == "as saved")


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_an_average_that_a_checkpoint_lacks_begins_with_its_weights(place, stage):
    """And one that is not kept any more is left."""
    name, averaged = f"last {stage}", f"averaged {stage}"
    place.run(f"averages {stage}", stage=stage, steps=3)
    origin = place.folder / f"averages {stage}" / "checkpoints" / "step-00000003"
    codes, printed = place.run(name, stage=stage, steps=5, resume=origin, changed={"optim.ema_decay": 0.0})
    assert codes == [0, 0] and "begins anew" not in printed, printed
    origin = place.folder / name / "checkpoints" / "step-00000005"
    codes, printed = place.run(averaged, stage=stage, steps=5, resume=origin)
    assert codes == [0, 0], printed
    assert printed.count(f"{origin} holds no average of the weights: it begins anew, with the weights") == 1
    assert place.weights(averaged) == place.weights(name)


def test_a_sampling_of_times_that_a_checkpoint_lacks_begins_anew(place, halves):
    key, origin = "model.diffusion.time_sampling", halves / "step-00000004"
    for name, changed in (("adaptive", {key: "adaptive"}),
                          ("loss_second_moment", {key: "loss_second_moment", "model.diffusion.steps": 4,
                                                   "model.diffusion.schedule": "sqrt"})):
        codes, printed = place.run(name, steps=6, resume=origin, changed=changed)
        assert codes == [0, 0], printed
        assert f"{origin} has not learnt which times to draw by {key} = {name!r}: that begins anew" in printed
        assert f"resuming with {key} = {name!r} (was " in printed
        origin = place.folder / name / "checkpoints" / "step-00000006"


def test_checkpoints_that_say_nothing_of_their_model_are_resumed(place, halves):
    folder = place.folder / "earlier version"
    shutil.copytree(halves / "step-00000004", folder)
    manifest = checkpoint.check(folder)
    (folder / "manifest.json").unlink()
    checkpoint.seal(folder, {name: manifest[name] for name in ("step", "topology", "guard", "rows_done")})
    codes, printed = place.run("later version", resume=folder)
    assert codes == [0, 0] and resumed_from(printed) == str(folder), printed
    assert place.weights("later version") == place.weights("whole")


def test_a_run_that_has_saved_needs_the_model_it_began_with_no_more(place):
    origin = place.folder / "origin"
    shutil.copytree(place.folder / "whole" / "model", origin)
    codes, printed = place.run("tuned", stop_at(3), init_from=origin)
    assert codes == [0, 0] and place.checkpoints("tuned") == [3], printed
    shutil.rmtree(origin)
    codes, printed = place.run("tuned", steps=4, init_from=origin)
    assert codes == [0, 0] and resumed_from(printed).endswith("step-00000003"), printed
    codes, printed = place.run("anew", init_from=origin)
    assert codes == [84, 84] and "origin/model.safetensors cannot be read" in printed


def test_a_vocabulary_that_other_documents_have_changed_is_refused(place):
    """One trained on the documents has the same size and other ids after some are added; the kept one still fits."""
    run, documents = place.folder / "grown", place.folder / "grown.jsonl"
    shutil.copy(place.corpus["data.train"], documents)
    data = {"data.train": str(documents)}
    codes, printed = place.run("grown", steps=3, changed=data)
    assert codes == [0, 0], printed
    kept = run / "config" / "vocabulary.model"
    before = kept.read_bytes()
    with documents.open("a") as file:
        file.write(json.dumps({"src": "zyxw vuts " * 20, "trg": "zyxw"}) + "\n")
    codes, printed = place.run("grown", steps=5, changed=data)
    assert codes == [84, 84] and kept.read_bytes() == before
    origin = run / "checkpoints" / "step-00000003"
    assert printed.count(f"error: {origin} was trained with another vocabulary than ") == 1
    assert printed.count(f"whose ids mean other tokens: set data.vocabulary = {kept}\n") == 1
    codes, printed = place.run("begun", init_from=run, changed=data)
    assert codes == [84, 84]
    assert printed.count(f"error: {run / 'model'} was trained with another vocabulary than ") == 1
    codes, printed = place.run("grown", steps=5, changed={**data, "data.vocabulary": str(kept)})
    assert codes == [0, 0] and resumed_from(printed).endswith("step-00000003"), printed
    assert kept.read_bytes() == before


def kill_again_and_again(place, name, kills, steps):
    """Starts `name` over and over, killed in each phase `kills` times, then lets it finish."""
    run_dir, rng = place.folder / name, random.Random(1)
    plan = [phase for phase in PHASES for _ in range(kills)]
    rng.shuffle(plan)
    reached = 0
    for phase in plan:
        fault = KillWhileSaving(phase, number=rng.randrange(2), rank=rng.randrange(WORLD) if phase in PHASES[:2] else 0,
                                everyone=rng.random() < 0.5, late=rng.random() < 0.5, run_dir=run_dir)
        codes, printed = place.run(name, fault, save_every=1, keep_last=2, steps=steps)
        assert -9 in codes, (fault, codes, printed)
        if reached:
            assert "resumed from" in printed, (fault, printed)
        whole = []
        for folder in (run_dir / "checkpoints").glob("step-*"):
            with contextlib.suppress(CheckpointError):  # one that was being removed
                whole.append(checkpoint.check(folder)["step"])
        if whole:
            assert max(whole) >= reached
            reached = max(whole)
    assert 0 < reached < steps
    codes, printed = place.run(name, save_every=1, keep_last=2, steps=steps)
    assert codes == [0] * WORLD and "resumed from" in printed
    assert len(place.checkpoints(name)) == 2


def test_killed_once_in_every_phase_of_a_save(place):
    kill_again_and_again(place, "killed", kills=1, steps=STEPS)
    assert place.weights("killed") == place.weights("whole")


@pytest.mark.slow
def test_killed_many_times_in_every_phase_of_a_save(place):
    steps = 120  # more than are done between the kills
    codes, printed = place.run("long", steps=steps)
    assert codes == [0, 0], printed
    kill_again_and_again(place, "killed often", kills=8, steps=steps)
    assert place.weights("killed often") == place.weights("long")


@pytest.mark.slow
@pytest.mark.parametrize("world, stage", [(1, 2), (2, 1), (2, 3), (4, 1), (4, 2), (4, 3)])
def test_resumed_at_every_kind_of_boundary(place, world, stage):
    """Stopped before and after evaluation and samples, in the middle and at the end of an epoch: the same bits."""
    interludes = {"eval_every": 4, "sample_every": 6, "log_every": 1, "keep_last": 0}
    name = f"unbroken {world} {stage}"
    codes, printed = place.run(name, stage=stage, world=world, steps=12, **interludes)
    assert codes == [0] * world, printed
    broken = f"broken {world} {stage}"
    for steps in (1, 3, 4, 6, 11, 12):
        codes, printed = place.run(broken, stage=stage, world=world, steps=steps, **interludes)
        assert codes == [0] * world, printed
        assert steps == 1 or "resumed from" in printed
    assert place.weights(broken) == place.weights(name)
    same = ("loss", "cross_entropy", "gradient_norm", "epoch")
    for one, other in zip(lines(place.folder / name), lines(place.folder / broken), strict=True):
        assert [one[key] for key in same] == [other[key] for key in same], one["step"]
    sample = "samples/step-00000006.jsonl"
    assert (place.folder / name / sample).read_text() == (place.folder / broken / sample).read_text()
    one, other = (checkpoint.check(place.folder / each / "checkpoints" / "step-00000012") for each in (name, broken))
    assert one["guard"] == other["guard"] and len(one["guard"]["losses"]) == 12


def test_a_full_disk_delays_metrics(tmp_path, monkeypatch):
    write, room = os.write, [10]

    def limited(file, data):
        if room[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        taken = write(file, data[:room[0]])
        room[0] -= taken
        return taken

    log = MetricsLog(tmp_path, 0, active=True)
    monkeypatch.setattr(os, "write", limited)
    log.write("event", 1, {"event": "first"})
    assert (tmp_path / "metrics.jsonl").stat().st_size == 10
    room[0] = 10_000
    log.write("event", 2, {"event": "second"})
    log.close()
    assert [line["event"] for line in lines(tmp_path, "event")] == ["first", "second"]
