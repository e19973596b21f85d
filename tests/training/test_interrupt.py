import os
import signal

import pytest

from training.interrupt import InterruptedRunError, held_back, stoppable


def test_the_first_sigterm_only_raises_a_flag():
    before = signal.getsignal(signal.SIGTERM)
    with held_back() as interruption:
        assert not interruption.requested
        os.kill(os.getpid(), signal.SIGTERM)
        assert interruption.requested
        assert interruption.signal == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


def test_the_second_ctrl_c_is_not_held_back():
    with held_back() as interruption:
        os.kill(os.getpid(), signal.SIGINT)
        assert interruption.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def stopped_by(number, folder, cleaned):
    with stoppable("last.pt") as run:
        run.folder = folder
        try:
            os.kill(os.getpid(), number)
        finally:
            cleaned.append(True)


@pytest.fixture
def in_the_foreground():
    """Shells let jobs in the background ignore Ctrl-C, and a test run may be one."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_the_foreground")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_outside_of_the_loop_a_signal_cleans_up_and_tells_where_to_go_on(tmp_path, number):
    before, cleaned = signal.getsignal(signal.SIGTERM), []
    (tmp_path / "last.pt").write_bytes(b"")
    with pytest.raises(InterruptedRunError) as stopped:
        stopped_by(number, tmp_path, cleaned)
    assert cleaned
    assert (stopped.value.signal, stopped.value.folder) == (number, tmp_path)
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.parametrize("begun", [True, False])
def test_without_a_checkpoint_there_is_nothing_to_go_on_with(tmp_path, begun):
    with pytest.raises(InterruptedRunError) as stopped:
        stopped_by(signal.SIGTERM, tmp_path if begun else None, [])
    assert stopped.value.folder is None


def test_one_of_several_processes_can_be_ended_at_once(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    before = signal.getsignal(signal.SIGTERM)
    with stoppable("last.pt"):
        assert signal.getsignal(signal.SIGTERM) is before
