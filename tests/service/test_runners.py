"""Runners on real sessions. The one for GPUs runs here with its buffers in the CPU's memory: the same calls."""

import numpy as np
import pytest
from toys import grey_outputs
from variants import CLASSES, levels_image, version_with

from service import providers, sessions
from service.runners import CudaRunner, HostRunner

BUCKETS = (1, 2, 4)


@pytest.fixture
def version(tmp_path):
    return version_with(tmp_path)


@pytest.fixture
def session(version):
    return sessions.load(version, "model.onnx", providers.cpu_plan(1), BUCKETS).sessions[0]


def cuda_runner(session, version, *, graphs):
    shape = version.manifest.input.shape
    return CudaRunner(session, 0, BUCKETS, shape, CLASSES, graphs=graphs, memory="cpu")


def check(runner, version, levels):
    runner.pixels[: len(levels)] = levels_image(levels, version.manifest.input)
    outputs = runner.run(len(levels))
    logits, probabilities = grey_outputs(levels, CLASSES)
    np.testing.assert_allclose(outputs.logits, logits, atol=1e-4)
    np.testing.assert_allclose(outputs.probabilities, probabilities, atol=1e-5)


@pytest.mark.parametrize("levels", [[0], [9, 200], [255, 3, 77, 130]])
def test_host(session, version, levels):
    runner = HostRunner(session, BUCKETS[-1], version.manifest.input.shape)
    check(runner, version, [1] * 4)
    check(runner, version, levels)


@pytest.mark.parametrize("graphs", [True, False])
def test_every_bucket_has_buffers_of_its_own_that_are_filled_anew(session, version, graphs):
    runner = cuda_runner(session, version, graphs=graphs)
    for levels in ([255, 3, 77, 130], [9, 200], [0], [40, 50, 60, 70], [128], [1, 254]):
        check(runner, version, levels)


def test_a_closed_runner_holds_nothing(session, version):
    runner = cuda_runner(session, version, graphs=False)
    runner.close()
    with pytest.raises(KeyError):
        runner.run(1)
