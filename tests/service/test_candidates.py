"""What could run a model version, in the order in which it is tried."""

import pytest
from variants import machine, version_with

from service.candidates import Wishes, enumerate_candidates
from service.errors import ConfigurationError, ProviderError
from service.providers import CPU, CUDA, OPENVINO, TENSORRT


def same(model):
    return model


@pytest.fixture(scope="module")
def version(tmp_path_factory):
    variants = {"int8": same, "fp16": same, "trt-int8": same}
    return version_with(tmp_path_factory.mktemp("models"), **variants)


def tried(version, wishes=None, on=None, missing=lambda name: ""):
    candidates, _ = enumerate_candidates(version, wishes or Wishes(), on or machine(), missing)
    return [(c.plan.provider, c.variant.name, c.plan.precision) for c in candidates]


def test_on_a_cpu(version):
    assert tried(version) == [
        (CPU, "int8", ""),
        (CPU, "fp32", ""),
        (OPENVINO, "int8", ""),
        (OPENVINO, "fp32", "f32"),
        (OPENVINO, "fp32", "bf16"),
    ]


def test_bf16_is_left_to_cpus_that_have_it(version):
    assert (OPENVINO, "fp32", "bf16") not in tried(version, on=machine(flags=("avx2",)))


def test_on_gpus(version):
    assert tried(version, on=machine(gpus=("NVIDIA L4",))) == [
        (TENSORRT, "trt-int8", "int8"),
        (TENSORRT, "fp32", "fp16"),
        (TENSORRT, "fp32", ""),
        (CUDA, "fp16", ""),
        (CUDA, "fp32", ""),
    ]


def test_one_executor_for_each_gpu(version):
    candidates, _ = enumerate_candidates(version, Wishes(), machine(gpus=("L4", "L4", "L4")), lambda name: "")
    assert {candidate.plan.gpus for candidate in candidates} == {(0, 1, 2)}
    assert {candidate.plan.executors for candidate in candidates} == {3}


def test_a_pinned_variant_runs_even_where_it_is_unusual(version):
    assert tried(version, Wishes(variant="fp16", providers=("cpu",))) == [(CPU, "fp16", "")]
    assert tried(version, Wishes(variant="fp32", providers=("cpu",))) == [(CPU, "fp32", "")]


def test_a_variant_that_is_not_there(version):
    with pytest.raises(ConfigurationError, match="has no variant bf16; it has fp32, int8, fp16, trt-int8"):
        tried(version, Wishes(variant="bf16"))


def test_a_provider_that_is_not_there(version):
    with pytest.raises(ProviderError, match="cuda: no driver"):
        tried(version, Wishes(providers=("cuda",)), missing=lambda name: "no driver" if name == CUDA else "")


def test_options_reach_their_provider_only(version):
    wishes = Wishes(options={"openvino": {"CACHE_DIR": "/cache"}})
    candidates, _ = enumerate_candidates(version, wishes, machine(), lambda name: "")
    found = {candidate.plan.provider: dict(candidate.plan.options) for candidate in candidates}
    assert found == {CPU: {}, OPENVINO: {"CACHE_DIR": "/cache"}}


def test_threads_and_executors_are_the_operator_s(version):
    wishes = Wishes(providers=("cpu",), executors=1, intra_op_threads=3)
    candidates, _ = enumerate_candidates(version, wishes, machine(cpus=16), lambda name: "")
    assert {(c.plan.executors, c.plan.intra_op_threads) for c in candidates} == {(1, 3)}
