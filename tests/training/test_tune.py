"""Real studies on real digits; the space and its files are tested in test_search_space.py."""

import contextlib
import csv
import functools
import importlib.util
import io
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import optuna
import pytest
from click.testing import CliRunner
from optuna.trial import TrialState
from rich.console import Console

from service.errors import ConfigurationError, TrainingError
from training.cli import train
from training.config import load_experiment
from training.display import Display
from training.study import Heartbeat, SharedStudy, storage_url
from training.tune import Tuning, tune
from training.tune_cli import tune as tune_command
from training.tune_config import TuneConfig

ROOT = Path(__file__).parents[2]
QUICK = {
    "name": "digits", "input.size": 16, "loop.precision": "float32", "loop.threads": 1, "loop.epochs": 2,
    "data.validation": 0.2,
}  # fmt: skip
SPACE = {
    "optimiser.learning_rate": {"low": 0.001, "high": 0.02, "log": True},
    "loop.batch_size": {"choices": [16, 32, 64]},
    "model.options.dropout": {"low": 0, "high": 0.5},
}
FLAGS = ["--image-size", "16", "--precision", "float32", "--threads", "1", "--validation", "0.2"]


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}:{ROOT / 'protos'}", "OMP_NUM_THREADS": "1"}


def job(folder, digits, *, settings=None, storage=None, **search):
    search.setdefault("space", SPACE)
    return Tuning(
        experiment=load_experiment(None, {**QUICK, **(settings or {})}),
        config=TuneConfig.model_validate({"pruner": {"name": "none"}, **search}),
        source=digits,
        runs=folder / "runs",
        storage=storage or f"sqlite:///{folder / 'study.db'}",
        study="digits",
        output=folder / "best.yaml",
        heartbeat=Heartbeat(interval_s=1, grace_s=2),
    )


@pytest.fixture
def display():
    with open(os.devnull, "w") as sink:  # noqa: PTH123
        yield Display(Console(file=sink))


def trials_of(storage):
    with contextlib.ExitStack() as stack:
        stored = optuna.storages.RDBStorage(storage_url(storage).render_as_string(hide_password=False))
        stack.callback(stored.engine.dispose)
        return optuna.load_study(study_name="digits", storage=stored).get_trials()


@pytest.fixture(scope="module")
def finished(digit_folder, tmp_path_factory):
    """A study of seven trials around a learning rate that is far too low."""
    folder = tmp_path_factory.mktemp("finished")
    arguments = [
        str(digit_folder), "--runs", str(folder / "runs"), "--trials", "7", "--epochs", "3",
        "--learning-rate", "0.00001", *FLAGS,
    ]  # fmt: skip
    done = CliRunner().invoke(tune_command, arguments, catch_exceptions=False)
    assert done.exit_code == 0
    return folder / "runs" / "digits", done.output, arguments


def test_tuning_beats_a_bad_default_and_says_what_to_type_next(finished):
    folder, output, _ = finished
    trials = trials_of(f"sqlite:///{folder / 'tuning.db'}")
    assert trials[0].params["optimiser.learning_rate"] == 0.00001
    best = max(t.value for t in trials if t.state == TrialState.COMPLETE)
    assert best > trials[0].value + 0.2
    assert re.search(r"Best: trial [1-6], validation accuracy", output)
    assert f"--config {folder / 'tuning' / 'digits.yaml'}" in output
    assert not list((folder / "tuning").glob("*/trial-*"))


def test_training_the_written_file_reaches_the_figure_of_the_trial(finished, digit_folder, tmp_path):
    folder, _, _ = finished
    arguments = ["--config", str(folder / "tuning" / "digits.yaml"), "--repository", str(tmp_path / "m")]
    done = CliRunner().invoke(train, [str(digit_folder), *arguments, "--runs", str(tmp_path)], catch_exceptions=False)
    assert done.exit_code == 0
    epochs = re.findall(r"validation ([\d.]+)%", done.output)
    found = re.search(r"validation accuracy ([\d.]+)%", (folder / "tuning" / "digits.yaml").read_text())
    assert found[1] == max(epochs, key=float)


def test_the_page_holds_all_plots_and_every_trial(finished):
    folder, _, _ = finished
    page = (folder / "tuning" / "digits.html").read_text()
    for title in ("History", "Slices", "Parallel coordinates"):
        assert f"<h2>{title}</h2>" in page
    assert page.count("data:image/svg+xml;base64,") >= 3
    assert len(re.findall(r"<tr[ >]", page)) == 8
    assert "http" not in re.sub(r"base64,[^\"]*", "", page)


def test_a_finished_study_is_shown_again_and_goes_on_with_more_trials(finished):
    folder, output, arguments = finished
    storage = f"sqlite:///{folder / 'tuning.db'}"
    again = CliRunner().invoke(tune_command, arguments, catch_exceptions=False)
    assert re.search(r"Best: .*", again.output)[0] == re.search(r"Best: .*", output)[0]
    assert len(trials_of(storage)) == 7
    more = [*arguments, "--trials", "8"]
    assert CliRunner().invoke(tune_command, more, catch_exceptions=False).exit_code == 0
    assert [t.number for t in trials_of(storage)] == list(range(8))


def test_the_result_does_not_take_the_place_of_its_own_page(digit_folder, tmp_path):
    arguments = [str(digit_folder), "--runs", str(tmp_path), "--output", str(tmp_path / "best.html"), *FLAGS]
    with pytest.raises(ConfigurationError, match=r"--output .*best\.html takes the experiment file"):
        CliRunner().invoke(tune_command, arguments, catch_exceptions=False)


def test_an_interrupted_study_draws_what_an_uninterrupted_one_draws(digit_folder, tmp_path, display):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    tune(job(whole, digit_folder, trials=4), display)
    for trials in (2, 4):
        tune(job(parts, digit_folder, trials=trials), display)
    first, second = (trials_of(f"sqlite:///{folder / 'study.db'}") for folder in (whole, parts))
    assert [t.params for t in first] == [t.params for t in second]
    assert [t.intermediate_values for t in first] == [t.intermediate_values for t in second]
    assert {t.user_attrs["seed"] for t in first} == {0}
    assert (whole / "best.yaml").read_text().replace("whole", "") == (parts / "best.yaml").read_text().replace(
        "parts", ""
    )


def test_test_images_do_not_matter(digit_folder, tmp_path, display):
    rows = sorted(path.relative_to(digit_folder) for path in digit_folder.glob("*/*.png"))
    parts = ["test" if n % 5 == 0 else "val" if n % 5 == 1 else "train" for n in range(len(rows))]
    values = []
    for name, wrong in (("right", False), ("wrong", True)):
        table = tmp_path / f"{name}.csv"
        with table.open("w", newline="") as stream:
            lines = csv.writer(stream)
            lines.writerow(("path", "label", "split"))
            for row, part in zip(rows, parts, strict=True):
                label = "7" if wrong and part == "test" else row.parent.name
                lines.writerow((digit_folder / row, label, part))
        tune(job(tmp_path / name, table, trials=2), display)
        trials = trials_of(f"sqlite:///{tmp_path / name / 'study.db'}")
        values.append([t.intermediate_values for t in trials])
    assert values[0] == values[1]


def test_images_are_read_once_for_all_trials(digit_folder, tmp_path):
    with (tmp_path / "said").open("w+") as stream:
        tune(job(tmp_path, digit_folder, trials=3), Display(Console(file=stream, width=200)))
        stream.seek(0)
        said = stream.read()
    assert said.count("of the test part are not used") == 1
    assert said.count("trial ") == 3


def test_poor_trials_are_pruned_and_the_first_ones_are_not(digit_folder, tmp_path, display):
    rates = {"optimiser.learning_rate": {"choices": [0.004, 1e-7, 2e-7, 3e-7]}}
    pruner = {"name": "median", "startup_trials": 1, "warmup_epochs": 1}
    settings = {"loop.epochs": 4, "loop.stuck_epochs": 0}
    tune(job(tmp_path, digit_folder, settings=settings, space=rates, trials=5, pruner=pruner), display)
    trials = trials_of(f"sqlite:///{tmp_path / 'study.db'}")
    assert trials[0].state == TrialState.COMPLETE
    pruned = [t for t in trials if t.state == TrialState.PRUNED]
    assert pruned
    assert all(1 < len(t.intermediate_values) < 4 for t in pruned)


def test_a_failing_trial_is_marked_and_the_study_goes_on(digit_folder, tmp_path, display):
    space = {"optimiser.learning_rate": {"choices": [0.004, 1e30]}}
    outcome = tune(job(tmp_path, digit_folder, space=space, trials=4), display)
    trials = trials_of(f"sqlite:///{tmp_path / 'study.db'}")
    failed = [t for t in trials if t.state == TrialState.FAIL]
    assert len(trials) == 4
    assert failed
    assert all("the loss became" in t.user_attrs["error"] for t in failed)
    assert outcome.tuned == {"optimiser.learning_rate": 0.004}


def test_a_trial_that_fails_before_it_trains_is_told_with_its_reason(digit_folder, tmp_path):
    space = {"model.name": {"choices": ["lenet5", "alexnet"]}, "loop.batch_size": {"choices": [16, 32, 64]}}
    with (tmp_path / "said").open("w+") as stream:
        tune(job(tmp_path, digit_folder, space=space, trials=4), Display(Console(file=stream, width=200)))
        stream.seek(0)
        said = [line for line in stream if line.startswith("trial ")]
    trials = trials_of(f"sqlite:///{tmp_path / 'study.db'}")
    assert [line.split(":")[0] for line in said] == [f"trial {number}" for number in range(4)]
    assert any(trial.state == TrialState.FAIL for trial in trials)
    for line, trial in zip(said, trials, strict=True):
        assert ("too small for alexnet" in line) == (trial.params["model.name"] == "alexnet")


def test_without_any_good_trial_it_says_why(digit_folder, tmp_path, display):
    space = {"optimiser.learning_rate": {"choices": [1e29, 1e30]}}
    with pytest.raises(TrainingError, match="none of 2 trials finished; the last failed with: the loss became"):
        tune(job(tmp_path, digit_folder, space=space, trials=2), display)


def test_a_study_of_other_data_or_settings_is_refused(digit_folder, tmp_path, display):
    tune(job(tmp_path, digit_folder, trials=1), display)
    with pytest.raises(ConfigurationError, match=r"begun with another experiment\.loop\.epochs, and"):
        tune(job(tmp_path, digit_folder, trials=2, settings={"loop.epochs": 3}), display)
    space = {**SPACE, "model.options.dropout": {"low": 0, "high": 0.6}}
    with pytest.raises(ConfigurationError, match=r"another space\.model\.options\.dropout\.high"):
        tune(job(tmp_path, digit_folder, trials=2, space=space), display)
    fewer = shutil.copytree(digit_folder, tmp_path / "fewer")
    next((fewer / "3").iterdir()).unlink()
    with pytest.raises(ConfigurationError, match="another data"):
        tune(job(tmp_path, fewer, trials=2), display)


def test_without_validation_images_there_is_nothing_to_tune_by(digit_folder, tmp_path, display):
    with pytest.raises(ConfigurationError, match="--validation"):
        tune(job(tmp_path, digit_folder, settings={"data.validation": 0}), display)


def test_time_over_puts_the_trial_back(digit_folder, tmp_path, display):
    outcome = tune(job(tmp_path, digit_folder, trials=2, timeout_s=0.001), display)
    assert (outcome.best, outcome.left, outcome.signal) == (None, 2, None)


def cli(arguments, **options):
    code = "import os; from training.tune_cli import tune; tune()"
    return subprocess.Popen(
        [sys.executable, "-u", "-W", "error", "-c", code, *map(str, arguments)],
        env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options,
    )  # fmt: skip


def repeats_are_equal(trials):
    """Cut-off trials were repeated with the same values; three have run to an end."""
    repeated = {n: t for t in trials for n in t.system_attrs.get("convoy_stopped", ())}
    assert {t.number for t in trials if t.state == TrialState.FAIL} == set(repeated)
    assert all(trials[n].params.items() <= t.params.items() for n, t in repeated.items())
    assert sum(t.state in {TrialState.COMPLETE, TrialState.PRUNED} for t in trials) == 3
    return len(repeated)


def test_sigterm_puts_the_running_trial_back_and_the_same_command_finishes(digit_folder, tmp_path):
    storage = f"sqlite:///{tmp_path / 's.db'}"
    arguments = [digit_folder, "--runs", tmp_path, "--storage", storage, "--trials", 3, "--epochs", 2, *FLAGS]
    with cli(arguments) as process:
        for line in process.stdout:
            if line.startswith("trial 0"):
                process.send_signal(signal.SIGTERM)
                break
        rest = process.stdout.read()
        assert process.wait(60) == 75, rest
    assert "the same command goes on" in rest
    assert "Best: trial 0" in rest
    done = CliRunner().invoke(tune_command, list(map(str, arguments)), catch_exceptions=False)
    assert done.exit_code == 0
    repeats_are_equal(trials_of(storage))


class SignalAfter(io.StringIO):
    """A console's file that raises Ctrl-C's signal when a text is first written."""

    def __init__(self, text):
        super().__init__()
        self.text = text

    def write(self, text):
        if self.text and self.text in text:
            self.text = None
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_ctrl_c_in_the_middle_of_a_trial_repeats_it(digit_folder, tmp_path, display):
    terminal = Display(Console(file=SignalAfter("1/2  "), force_terminal=True, width=150))
    stopped = tune(job(tmp_path, digit_folder, trials=3), terminal)
    assert (stopped.signal, stopped.left, stopped.elsewhere, stopped.best) == (signal.SIGINT, 3, 0, None)
    outcome = tune(job(tmp_path, digit_folder, trials=3), display)
    assert (outcome.signal, outcome.left) == (None, 0)
    trials = trials_of(f"sqlite:///{tmp_path / 'study.db'}")
    assert repeats_are_equal(trials) == 1
    tune(job(tmp_path / "whole", digit_folder, trials=3), display)
    undisturbed = trials_of(f"sqlite:///{tmp_path / 'whole' / 'study.db'}")
    assert [t.params for t in trials if t.state != TrialState.FAIL] == [t.params for t in undisturbed]


KILLED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from test_tune import job
from training.display import console_of_process
from training.tune import tune
settings = {{"loop.epochs": 400, "loop.stuck_epochs": 0}}
tune(job(Path({folder!r}), Path({digits!r}), settings=settings, trials=2), console_of_process())
"""


def test_a_trial_whose_worker_was_killed_is_repeated(digit_folder, tmp_path, display):
    code = KILLED.format(tests=str(Path(__file__).parent), folder=str(tmp_path), digits=str(digit_folder))
    settings = {"loop.epochs": 400, "loop.stuck_epochs": 0}
    with subprocess.Popen([sys.executable, "-u", "-c", code], env=environment()) as process:
        folder = tmp_path / "runs" / "digits" / "tuning" / "digits"
        wait_for(lambda: any(folder.glob("trial-0-*/last.pt")))
        process.kill()
    killed = trials_of(f"sqlite:///{tmp_path / 'study.db'}")[0]
    assert killed.state == TrialState.RUNNING

    def repeated():
        again = job(tmp_path, digit_folder, settings=settings, trials=1, timeout_s=0.5)
        return tune(again, display).elsewhere == 0

    wait_for(repeated)
    trials = trials_of(f"sqlite:///{tmp_path / 'study.db'}")
    assert trials[0].state == TrialState.FAIL
    assert trials[1].params == killed.params
    assert trials[1].system_attrs["retry_history"] == [0]


@pytest.mark.filterwarnings("ignore:Heartbeat of storage is supposed to be used with Study.optimize")
@pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
def test_a_trial_is_begun_again_twice_for_dead_workers_however_often_it_was_stopped(tmp_path):
    url = storage_url(f"sqlite:///{tmp_path / 's.db'}")
    shared = SharedStudy(url, "s", direction="maximize", pruner=optuna.pruners.NopPruner(), heartbeat=Heartbeat(1, 2))

    def begun():
        with shared.claiming():
            if not shared.remaining(1):
                return None
            trial = shared.study.ask()
            trial.suggest_float("x", 0, 1)
            return trial

    for _ in range(3):
        number = begun().number
        shared.study.tell(number, state=TrialState.FAIL)
        shared.put_back(number)
    storage = optuna.storages.RDBStorage(f"sqlite:///{tmp_path / 's.db'}", heartbeat_interval=1)
    ids = functools.partial(
        storage.get_trial_id_from_study_id_trial_number, storage.get_study_id_from_name(shared.study.study_name)
    )

    def running(number):
        with shared.claiming():  # which looks for dead workers
            return shared.study.trials[number].state == TrialState.RUNNING

    deaths = 0
    while (trial := begun()) is not None:
        storage.record_heartbeat(ids(trial.number))  # the last sign of its worker
        deaths += 1
        wait_for(lambda number=trial.number: not running(number))
    shared.close()
    assert deaths == 3


def wait_for(condition, seconds=60):
    """Until it holds; the conditions here take their own time."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline


@pytest.fixture(scope="module")
def postgres():
    """URL of a private PostgreSQL server, reached by a Unix socket alone."""
    programs = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda path: int(path.parent.name))
    found = str(programs[-1]) if programs else str(Path(shutil.which("initdb") or "/nowhere/initdb").parent)
    if not Path(found, "initdb").exists() or importlib.util.find_spec("psycopg") is None:
        reason = "needs a PostgreSQL server (Debian: postgresql) and psycopg"
        (pytest.fail if os.environ.get("CONVOY_REQUIRE_TOOLS") == "1" else pytest.skip)(reason)
    folder = tempfile.mkdtemp(prefix="convoy-pg-")  # the path of a Unix socket has to be short
    user = []
    if os.geteuid() == 0:  # the server refuses to run as root
        shutil.chown(folder, "postgres")
        user = ["runuser", "-u", "postgres", "--"]

    def call(program, *arguments):
        subprocess.run([*user, f"{found}/{program}", *arguments], check=True, stdout=subprocess.DEVNULL, cwd="/")

    data, log = f"{folder}/data", f"{folder}/log"
    call("initdb", "-D", data, "-U", "convoy", "-A", "trust", "--no-sync")
    settings = f"-c listen_addresses='' -c unix_socket_directories={folder} -c fsync=off"
    call("pg_ctl", "-D", data, "-w", "-l", log, "-o", settings, "start")
    try:
        yield f"postgresql://convoy@/postgres?host={folder}"
    finally:
        call("pg_ctl", "-D", data, "-m", "immediate", "-w", "stop")
        shutil.rmtree(folder)


def share_between_two(digit_folder, folder, storage):
    """One worker begins, another one joins it with the same command; eight trials in all."""
    space = folder / "space.yaml"
    space.write_text("space: {optimiser.learning_rate: {low: 0.001, high: 0.02, log: true}}")
    arguments = [digit_folder, "--runs", folder, "--storage", storage, "--trials", 8, "--epochs", 5, *FLAGS]
    arguments += ["--space", space]
    with cli(arguments) as process:
        first = next(line for line in process.stdout if line.startswith("trial "))
        joined = CliRunner().invoke(tune_command, list(map(str, arguments)), catch_exceptions=False)
        rest = process.communicate(timeout=100)[0]
    assert (process.returncode, joined.exit_code) == (0, 0), rest
    numbers = [re.findall(r"^trial (\d+):", said, re.MULTILINE) for said in (first + rest, joined.output)]
    assert all(numbers)
    assert sorted(map(int, itertools.chain(*numbers))) == list(range(8))
    trials = trials_of(storage)
    assert [t.number for t in trials] == list(range(8))
    assert all(t.state in {TrialState.COMPLETE, TrialState.PRUNED} for t in trials)
    assert len({tuple(t.params.items()) for t in trials}) == 8
    assert len({t.user_attrs["worker"] for t in trials}) == 2


def test_two_workers_share_the_trials_of_an_sqlite_study_exactly(digit_folder, tmp_path):
    share_between_two(digit_folder, tmp_path, f"sqlite:///{tmp_path / 's.db'}")


def test_two_workers_share_the_trials_of_a_postgresql_study_exactly(digit_folder, tmp_path, postgres):
    share_between_two(digit_folder, tmp_path, postgres)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("study.db", "is no storage URL"),
        ("sqlite://", "cannot hold a study"),
        ("mysql://me:secret@host/db", r"mysql://me:\*\*\*@host/db cannot hold a study"),
        ("postgresql://me:secret@127.0.0.1:1/db", r"me:\*\*\*@127.0.0.1:1/db cannot be used: .*[Cc]onnection"),
        ("sqlite:////proc/nowhere/s.db", "cannot be made"),
    ],
)
def test_storages_that_cannot_be_used(digit_folder, tmp_path, display, url, message):
    with pytest.raises(ConfigurationError, match=message):
        tune(job(tmp_path, digit_folder, storage=url), display)


@pytest.mark.parametrize(("objective", "direction"), [("loss", "MINIMIZE"), ("accuracy", "MAXIMIZE")])
def test_a_study_goes_the_way_of_its_objective(digit_folder, tmp_path, objective, direction):
    """And the experiment itself is its first trial."""
    tune(
        job(tmp_path, digit_folder, settings={"loop.epochs": 1}, trials=1, objective=objective),
        Display(Console(file=io.StringIO())),
    )
    study = optuna.load_study(study_name="digits", storage=f"sqlite:///{tmp_path / 'study.db'}")
    assert study.direction.name == direction
    (trial,) = study.get_trials()
    assert trial.params["loop.batch_size"] == 64
    assert trial.params["optimiser.learning_rate"] == 4e-3
