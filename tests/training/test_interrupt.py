import os
import signal

import pytest

from training.interrupt import held_back


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
