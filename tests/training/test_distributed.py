import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from training.distributed import Group, joined

# Trains the same small network in as many processes as there are, and saves the weights.
SCRIPT = """
import atexit
import os
import sys
from pathlib import Path

folder = Path(sys.argv[1])

@atexit.register  # the first is the last to run
def tell_threads():
    names = [task.joinpath("comm").read_text() for task in Path("/proc/self/task").iterdir()]
    folder.joinpath(f"threads{os.environ['RANK']}.txt").write_text("".join(names))

import numpy as np
import torch
from training.batches import Examples, MemorySource
from training.config import Experiment
from training.distributed import joined
from training.evaluate import evaluate, predict
from training.loop import Trainer
from training.models import create
from training.phases import Phase
from training.pixels import Normaliser
from training.step import Stepper

class Quiet:
    def step(self, images, loss): pass
    def epoch(self, history): self.history = history

def train(group):
    torch.manual_seed(0)
    normalise = Normaliser((0.5,), (0.3,))
    stepper = Stepper(create("lenet5", 4, 1), experiment, normalise, class_weights=np.array([1, 2, 1, 0.5], np.float32),
                      device=torch.device("cpu"), group=group)
    train, held = Examples(images, labels, np.arange(60)), Examples(images, labels, np.arange(60, 75))
    source = MemorySource(train, 16, 0, group=group)
    trainer = Trainer(stepper, source, held, normalise, experiment, phases=(Phase("all", 2),), peak=0.05,
                      folder=folder, identity={}, group=group)
    quiet = Quiet()
    trainer.fit(quiet)
    found = evaluate(trainer.evaluated, held, normalise, group=group)
    torch.manual_seed(1)
    norm = torch.nn.Sequential(torch.nn.BatchNorm2d(1), torch.nn.Flatten(), torch.nn.Linear(256, 4))
    norm[0].running_mean += group.rank
    norm[0].num_batches_tracked += group.rank
    normed = {"alone": torch.from_numpy(predict(norm, images, np.arange(60, 75), normalise)),
              "shared": torch.from_numpy(evaluate(norm, held, normalise, group=group).logits),
              "buffers": dict(norm.named_buffers())}
    votes = group.any(group.rank == group.world - 1), group.sum([1.0, float(group.rank)])
    word = group.from_main(lambda: f"said by {group.rank}")
    return {"history": [dict(h) for h in quiet.history], "logits": torch.from_numpy(found.logits),
            "weights": stepper.model.state_dict(), "votes": votes, "word": word,
            "normed": normed}

torch.set_num_threads(1)
random = np.random.default_rng(0)
images = random.integers(0, 256, (75, 16, 16, 1), dtype=np.uint8)
labels = (images.mean((1, 2, 3)) > 127).astype(np.int64) + 2 * (images[:, 0, 0, 0] > 127)
experiment = Experiment.model_validate({
    "loop": {"epochs": 2, "batch_size": 16, "precision": "float32", "accumulate": 2, "label_smoothing": 0.1},
    "optimiser": {"name": "sgd", "learning_rate": 0.05},
})
with joined() as group:
    found = train(group)
torch.save(found, folder / f"rank{group.rank}.pt")
"""


def train_in(processes, folder):
    folder.mkdir()
    script = folder / "script.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{root}:{root / 'protos'}"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    done = subprocess.run(
        [*launcher, str(script), str(folder)], env=environment, capture_output=True, text=True, timeout=110, check=False
    )
    assert done.returncode == 0, done.stderr
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=True)
        | {"threads": folder.joinpath(f"threads{rank}.txt").read_text()}
        for rank in range(processes)
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    return train_in(1, folder / "one")[0], train_in(2, folder / "two")


def test_two_processes_end_with_the_weights_of_one(both):
    alone, together = both
    for name, tensor in alone["weights"].items():
        torch.testing.assert_close(together[0]["weights"][name], tensor, atol=1e-5, rtol=1e-4)
        assert torch.equal(together[0]["weights"][name], together[1]["weights"][name])


def test_both_report_the_loss_and_the_evaluation_of_all_images(both):
    alone, together = both
    for part in together:
        torch.testing.assert_close(part["logits"], alone["logits"], atol=1e-4, rtol=1e-3)
        for mine, theirs in zip(part["history"], alone["history"], strict=True):
            assert mine["train_loss"] == pytest.approx(theirs["train_loss"], rel=1e-4)
            assert mine["val_accuracy"] == theirs["val_accuracy"]


def test_what_is_judged_is_the_model_that_is_kept(both):
    """Each process has BatchNorm statistics of its own; those of the first are saved."""
    first, second = (part["normed"] for part in both[1])
    assert not torch.equal(first["alone"], second["alone"])
    for part in (first, second):
        torch.testing.assert_close(part["shared"], first["alone"])
        assert all(torch.equal(tensor, first["buffers"][name]) for name, tensor in part["buffers"].items())


def test_the_group_agrees(both):
    _, together = both
    for part in together:
        assert part["votes"] == (True, [2.0, 1.0])
        assert part["word"] == "said by 0"


@pytest.mark.parametrize("rank", [0, 1])
def test_no_thread_of_the_group_outlives_python(both, rank):
    """One that does is aborted, and its process with it, if it lets go of a tensor then."""
    threads = both[1][rank]["threads"].split()
    assert threads
    assert not [name for name in threads if "gloo" in name]


def test_alone_everything_is_local():
    with joined() as group:
        assert group == Group(0, 1)
        assert group.from_main(lambda: 5) == 5
        assert group.any(flag=True)
        assert group.sum([1.0]) == [1.0]


@pytest.mark.parametrize(("count", "world"), [(10, 3), (2, 4), (0, 2), (7, 1)])
def test_parts_cover_all_rows_once_and_evenly(count, world):
    parts = [list(range(count))[Group(rank, world).part(count)] for rank in range(world)]
    assert [row for part in parts for row in part] == list(range(count))
    assert max(map(len, parts)) - min(map(len, parts)) <= 1
