"""The plugin provider: for real where the plugin is installed and the CPU is of the make that it serves."""

import os
import subprocess
import sys

import numpy as np
import onnxruntime as ort
import pytest
from toys import environment, grey_outputs
from variants import CLASSES, levels_image, machine, slowed, version_with

from service import engine, openvino, providers, sessions
from service.candidates import Wishes
from service.errors import ProviderError
from service.providers import OPENVINO, Plan
from service.selection import Selector


@pytest.fixture
def installed():
    """Skips where the plugin is not installed, or fails where everything is promised to be there."""
    if not openvino.version():
        reason = "the extra `openvino` is not installed"
        if os.environ.get("CONVOY_REQUIRE_TOOLS") == "1":
            pytest.fail(reason)
        pytest.skip(reason)


@pytest.fixture
def device(installed):
    """The plugin's CPU; no installation can put one into a machine of another make."""
    try:
        return openvino.device()
    except ProviderError as error:
        pytest.skip(str(error))


@pytest.fixture
def version(tmp_path):
    return version_with(tmp_path, fp32=slowed)


def test_it_registers_once_for_the_process(installed):
    openvino.register()
    openvino.register()
    cpus = [found for found in ort.get_ep_devices() if found.ep_name == OPENVINO and found.device.type.name == "CPU"]
    assert len(cpus) <= 1


def test_a_machine_of_another_make_is_told_which(installed):
    with pytest.raises(ProviderError, match=r"offers no NPU here: .* of the make \w+; choose another provider"):
        openvino.device("NPU")


def test_without_the_extra_it_says_what_to_install():
    code = (
        "import sys; sys.modules['onnxruntime_ep_openvino'] = None\n"
        "from service import sessions; print(sessions.missing('OpenVINOExecutionProvider'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, timeout=60
    )
    assert "pip install '.[openvino]'" in done.stdout


def test_streams_answer_at_the_same_time_and_right(device, version):
    engines = engine.build(version, providers.cpu_plan(2, provider=OPENVINO, precision="f32"), 4)
    assert [one.provider for one in engines] == [OPENVINO] * 3
    engine.warm_up(engines)
    levels = [0, 100, 200]
    for one in engines:
        found = one.infer([levels_image(levels, version.manifest.input)]).probabilities
        np.testing.assert_allclose(found, grey_outputs(levels, CLASSES)[1], atol=1e-4)


def test_it_says_which_nodes_it_took(device, version):
    loaded = sessions.load(version, "model.onnx", providers.cpu_plan(1, provider=OPENVINO), (1,))
    assert loaded.nodes[OPENVINO] > 0


def test_an_option_that_openvino_does_not_know_is_its_refusal(device, version):
    with pytest.raises(ProviderError, match="NONSENSE"):
        engine.build(version, Plan(OPENVINO, 1, options={"NONSENSE": "1"}), 1)


def test_it_takes_part_in_the_choice_of_a_model_that_takes_time(device, tmp_path):
    version = version_with(tmp_path, fp32=lambda model: slowed(model, work=400))
    table = Selector(machine(openvino="1.8.1"), tmp_path / "cache").table(version, Wishes(max_batch_size=4))[0]
    tried = {(row.provider, row.precision): row.outcome for row in table.rows}
    assert set(tried.values()) <= {"chosen", "slower", "skipped", "refused"}
    assert tried[OPENVINO, "f32"] != "skipped"
    assert tried[OPENVINO, "bf16"] != "skipped"
