"""The choice among variants and providers, with real sessions on the CPU provider."""

import dataclasses

import onnxruntime as ort
import pytest
import structlog
from variants import CLASSES, levels_image, machine, slowed, version_with, wrong

from service import engine, resources, sessions, trial
from service.candidates import Wishes
from service.engine import OrtEngine
from service.errors import ArtifactError, ConfigurationError, OutOfMemoryError, OutOfReachError, ProviderError
from service.providers import CPU, CUDA, OPENVINO, TENSORRT
from service.selection import Selector, this_machine

ON_CPU = Wishes(providers=("cpu",), max_batch_size=8)


def nothing_missing(provider):
    return ""


def same(model):
    return model


def outcomes(table):
    return {(row.variant, row.provider): row.outcome for row in table.rows}


@pytest.fixture
def selector(tmp_path):
    return Selector(machine(), tmp_path / "cache")


@pytest.fixture
def logged():
    with structlog.testing.capture_logs() as lines:
        yield lines


def test_the_fastest_is_chosen(tmp_path, selector):
    version = version_with(tmp_path, fp32=slowed, int8=same)
    engines = selector.build(version, ON_CPU)
    assert {one.variant for one in engines} == {"model.int8.onnx"}
    assert len(engines) == 2
    table, remembered = selector.table(version, ON_CPU)
    assert remembered
    assert outcomes(table) == {("int8", CPU): "chosen", ("fp32", CPU): "slower"}
    assert table.chosen.images_per_second > 2 * table.rows[1].images_per_second


def test_a_cache_that_cannot_be_written_is_told(tmp_path, logged):
    (tmp_path / "cache").write_text("a file is in the way")
    Selector(machine(), tmp_path / "cache").build(version_with(tmp_path, fp32=same), ON_CPU)

    assert [line["cache_dir"] for line in logged if "cannot be kept" in line["event"]] == [str(tmp_path / "cache")]


def test_of_two_that_are_as_fast_the_exact_one_is_chosen(tmp_path, selector):
    # Equal graphs may still differ by noise: what matters is that the order of trying does not decide.
    version = version_with(tmp_path, fp32=same, int8=lambda model: slowed(model, work=4))
    assert selector.table(version, ON_CPU)[0].chosen.variant == "fp32"


def test_the_fastest_is_refused_if_its_answers_are_wrong(tmp_path, selector):
    version = version_with(tmp_path, fp32=slowed, int8=wrong)
    (row, chosen) = selector.table(version, ON_CPU)[0].rows
    assert (row.variant, row.outcome, chosen.outcome) == ("int8", "refused", "chosen")
    assert "the canary's probabilities are off by" in row.note


def test_if_nothing_is_right_nothing_is_served(tmp_path, selector):
    version = version_with(tmp_path, fp32=wrong)
    with pytest.raises(ArtifactError, match=r"cannot be served: fp32 on cpu: .* off by"):
        selector.build(version, ON_CPU)


def test_more_executors_than_cpus_do_not_make_a_model_look_faster(tmp_path, selector):
    version = version_with(tmp_path, fp32=slowed)
    cpus = resources.cpu_count()
    fitting, crowded = (
        selector.table(version, Wishes(providers=("cpu",), executors=count, intra_op_threads=1))[0].chosen
        for count in (cpus, 4 * cpus)
    )
    assert crowded.executors == 4 * fitting.executors
    assert crowded.images_per_second < 2 * fitting.images_per_second


@pytest.fixture
def speeds(monkeypatch):
    """Images per second by precision, for candidates that only exist here; those without are refused."""
    known = {}

    def run(version, candidate, *_):
        if candidate.plan.precision not in known:
            return trial.row(candidate, outcome="refused", note="far off"), None
        speed = known[candidate.plan.precision]
        return trial.row(candidate, outcome="slower", images_per_second=speed), trial.Passed("a loaded model", [])

    monkeypatch.setattr(trial, "run", run)
    return known


def by_precision(selector, version, provider):
    table = selector.table(version, Wishes(providers=(provider,)), refresh=True)[0]
    return [(row.precision, row.outcome) for row in table.rows]


def test_tensorrt_compiles_a_file_in_one_precision_unless_that_is_refused(tmp_path, speeds):
    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", nothing_missing)
    version = version_with(tmp_path)
    speeds.update({"fp16": 200.0, "": 100.0})
    assert by_precision(selector, version, "tensorrt") == [("fp16", "chosen"), ("", "skipped")]
    del speeds["fp16"]
    assert by_precision(selector, version, "tensorrt") == [("fp16", "refused"), ("", "chosen")]


@pytest.mark.parametrize(("bf16", "outcomes"), [(50.0, ("chosen", "slower")), (200.0, ("slower", "chosen"))])
def test_bf16_has_to_be_faster(tmp_path, speeds, bf16, outcomes):
    selector = Selector(machine(), tmp_path / "cache", nothing_missing)
    speeds.update({"f32": 100.0, "bf16": bf16})
    found = by_precision(selector, version_with(tmp_path), "openvino")
    assert found == list(zip(("f32", "bf16"), outcomes, strict=True))


def test_the_engines_are_warm(tmp_path, selector):
    for one in selector.build(version_with(tmp_path), ON_CPU):
        assert set(one.measured_s) == set(one.buckets)


def test_a_variant_can_be_pinned(tmp_path, selector):
    version = version_with(tmp_path, fp32=slowed, int8=same)
    wishes = Wishes(providers=("cpu",), variant="fp32", max_batch_size=2)
    assert {one.variant for one in selector.build(version, wishes)} == {"model.onnx"}
    with pytest.raises(ConfigurationError, match="has no variant fp16"):
        selector.build(version, Wishes(variant="fp16"))


def test_batches_on_a_cpu_are_cut_to_the_time_they_may_take(tmp_path, selector):
    version = version_with(tmp_path, fp32=slowed)
    free = selector.table(version, Wishes(providers=("cpu",), max_batch_size=8, batch_limit_s=0))[0]
    image_s = free.chosen.executors / free.chosen.images_per_second
    limited = selector.table(version, Wishes(providers=("cpu",), max_batch_size=8, batch_limit_s=3.5 * image_s))[0]
    assert free.largest_batch == 8
    assert 1 <= limited.largest_batch < 8
    assert selector.table(version, Wishes(providers=("cpu",), batch_limit_s=1e-9))[0].largest_batch == 1


# --- what is remembered


def test_the_next_start_does_not_measure_again(tmp_path, selector, logged):
    version = version_with(tmp_path, int8=same)
    selector.build(version, ON_CPU)
    again = Selector(machine(), tmp_path / "cache").build(version, ON_CPU)
    told = [line["remembered"] for line in logged if line["event"] == "plan"]
    assert told == [False, True]
    outputs = again[0].infer([levels_image([0, 255], version.manifest.input)])
    assert outputs.probabilities.argmax(axis=1).tolist() == [0, CLASSES - 1]


def test_another_machine_measures_for_itself(tmp_path, selector):
    version = version_with(tmp_path)
    selector.table(version, ON_CPU)
    assert not Selector(machine(cpus=1), tmp_path / "cache").table(version, ON_CPU)[1]


def test_refresh_measures_again(tmp_path, selector):
    version = version_with(tmp_path)
    selector.table(version, ON_CPU)
    assert not selector.table(version, ON_CPU, refresh=True)[1]


def test_a_directory_that_cannot_be_written_only_costs_the_measuring(tmp_path):
    (tmp_path / "file").write_text("in the way")
    selector = Selector(machine(), tmp_path / "file")
    version = version_with(tmp_path)
    assert selector.build(version, ON_CPU)
    assert not selector.table(version, ON_CPU)[1]


def test_a_plan_that_does_not_work_any_more_is_replaced(tmp_path, selector, logged):
    version = version_with(tmp_path)
    table = selector.table(version, ON_CPU)[0]
    (file,) = (tmp_path / "cache" / "plans").iterdir()
    elsewhere = table.chosen.model_copy(update={"provider": OPENVINO})
    file.write_text(table.model_copy(update={"rows": (elsewhere,)}).model_dump_json())
    assert selector.build(version, ON_CPU)[0].provider == CPU
    assert [line for line in logged if line["event"].startswith("a remembered plan does not work any more")]
    assert selector.table(version, ON_CPU)[0].chosen.provider == CPU


@pytest.fixture
def scarce(monkeypatch):
    """File names of which there is no descriptor to open them."""
    names, session = set(), ort.InferenceSession

    def opened(path, *args, **options):
        if path.name in names:
            raise RuntimeError(f"[ONNXRuntimeError] : 1 : FAIL : Load model from {path} failed:system error number 24")
        return session(path, *args, **options)

    monkeypatch.setattr(ort, "InferenceSession", opened)
    return names


def test_a_choice_that_was_made_while_something_was_short_is_not_remembered(tmp_path, selector, scarce):
    version = version_with(tmp_path, fp32=slowed, int8=same)
    scarce.add("model.int8.onnx")
    table, _ = selector.table(version, ON_CPU)
    assert outcomes(table) == {("int8", CPU): "failed", ("fp32", CPU): "chosen"}
    assert "system error number 24" in table.rows[0].note
    scarce.clear()

    table, remembered = selector.table(version, ON_CPU)
    assert (table.chosen.variant, remembered) == ("int8", False)


@pytest.mark.parametrize("remembered", [False, True])
def test_where_nothing_can_be_tried_for_a_passing_reason_that_is_said(tmp_path, selector, scarce, remembered):
    version = version_with(tmp_path, fp32=slowed, int8=same)
    if remembered:
        selector.table(version, ON_CPU)
    scarce.update({"model.int8.onnx", "model.onnx"})
    with pytest.raises(OutOfReachError, match="system error number 24"):
        selector.build(version, ON_CPU)
    scarce.clear()

    assert selector.build(version, ON_CPU)[0].variant == "model.int8.onnx"
    assert selector.table(version, ON_CPU)[1]


# --- what is asked for


def test_a_provider_asked_for_and_missing_fails(tmp_path, selector):
    with pytest.raises(ProviderError, match="cuda: the NVIDIA driver shows no GPU"):
        selector.build(version_with(tmp_path), Wishes(providers=("cuda", "cpu")))


def test_a_provider_that_fails_to_load_the_model_fails_the_start(tmp_path):
    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", nothing_missing)
    with pytest.raises(ProviderError, match=r"cannot run as asked \(fp32 on cuda: .*CUDAExecutionProvider"):
        selector.build(version_with(tmp_path), Wishes(providers=("cuda",), max_batch_size=2))


def test_a_gpu_that_does_not_work_fails_the_start_even_with_auto(tmp_path):
    def missing(provider):
        return "no TensorRT" if provider == TENSORRT else ""

    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", missing)
    with pytest.raises(ProviderError, match="cannot run as asked"):
        selector.build(version_with(tmp_path), Wishes(max_batch_size=2))


def test_with_fallback_the_cpu_serves_and_it_is_told(tmp_path, logged):
    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", nothing_missing)
    wishes = Wishes(providers=("cuda",), allow_fallback=True, max_batch_size=2)
    assert selector.build(version_with(tmp_path), wishes)[0].provider == CPU
    assert [line for line in logged if line["event"] == "falling back to the CPU" and line["log_level"] == "warning"]


def test_what_is_left_out_by_fallback_is_told(tmp_path, selector, logged):
    version = version_with(tmp_path)
    wishes = Wishes(providers=("cuda",), allow_fallback=True, max_batch_size=2)
    assert selector.build(version, wishes)[0].provider == CPU
    (line,) = [line for line in logged if line["event"] == "provider left out"]
    assert (line["provider"], line["log_level"]) == ("cuda", "warning")


# --- openvino, where it is not worth it


def test_openvino_is_not_even_asked_about_for_a_model_that_takes_no_time(tmp_path):
    asked = []

    def missing(provider):
        asked.append(provider)
        return ""

    selector = Selector(machine(openvino="1.8.1"), tmp_path / "cache", missing)
    table = selector.table(version_with(tmp_path), Wishes(max_batch_size=8))[0]
    skipped = [row for row in table.rows if row.provider == OPENVINO]
    assert skipped
    assert all(row.outcome == "skipped" and "nothing to gain" in row.note for row in skipped)
    assert OPENVINO not in asked


def test_the_budget_ends_the_trying_but_not_before_something_works(tmp_path, selector):
    version = version_with(tmp_path, int8=same)
    wishes = Wishes(providers=("cpu",), max_batch_size=8, budget_s=0)
    assert [row.outcome for row in selector.table(version, wishes)[0].rows] == ["chosen", "skipped"]


def test_a_larger_budget_tries_what_the_smaller_one_left_out(tmp_path, selector):
    version = version_with(tmp_path, int8=same)
    wishes = Wishes(providers=("cpu",), max_batch_size=8, budget_s=0)
    selector.table(version, wishes)
    assert selector.table(version, wishes)[1]  # remembered
    table, remembered = selector.table(version, dataclasses.replace(wishes, budget_s=60))
    assert not remembered
    assert {row.outcome for row in table.rows} == {"chosen", "slower"}
    assert selector.table(version, dataclasses.replace(wishes, budget_s=90))[1]


def test_this_machine_is_described():
    here = this_machine()
    assert here.cpus >= 1
    assert here.versions["onnxruntime"]
    assert sessions.missing(CPU) == ""


def test_executors_that_cannot_be_warmed_up_are_let_go(tmp_path, selector, monkeypatch):
    """On a GPU each holds page-locked memory, which nothing else gives back."""
    version, built, closed = version_with(tmp_path, fp32=same), [], []

    def fail(engines):
        built.extend(engines)
        for one in engines:
            monkeypatch.setattr(one, "close", lambda one=one: closed.append(one))
        raise OutOfMemoryError("no room for the largest batch")

    monkeypatch.setattr(engine, "warm_up", fail)
    with pytest.raises(OutOfMemoryError):
        selector.build(version, ON_CPU)

    assert len(built) == 2
    assert closed == built


def test_one_gpu_provider_that_fails_does_not_keep_auto_from_the_other(tmp_path, monkeypatch):
    def run(version, candidate, *_):
        if candidate.plan.provider == TENSORRT:
            return trial.row(candidate, outcome="failed", note="no kernel"), None
        return trial.row(candidate, outcome="slower", images_per_second=100.0), trial.Passed("a loaded model", [])

    monkeypatch.setattr(trial, "run", run)
    selector = Selector(machine(gpus=("NVIDIA L4",)), tmp_path / "cache", nothing_missing)
    table, _ = selector.table(version_with(tmp_path), Wishes())

    assert table.chosen.provider == CUDA


def test_what_was_tried_and_is_wrong_gives_its_memory_back(tmp_path, monkeypatch, selector):
    closed, close = [], OrtEngine.close
    monkeypatch.setattr(OrtEngine, "close", lambda one: closed.append(one) or close(one))
    monkeypatch.setattr(trial, "images_per_second", pytest.fail)
    monkeypatch.setattr(trial, "_canary_difference", failing)
    with pytest.raises(ArtifactError):
        selector.table(version_with(tmp_path), ON_CPU)
    assert closed


def failing(*_):
    raise ArtifactError("wrong")
