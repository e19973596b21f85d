import pytest
import torch

from service import resources
from training import precision
from training.precision import autocast, fastest, has_bfloat16

CPU = torch.device("cpu")


def test_autocast_computes_in_the_asked_format():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for kind, dtype in formats.items():
        with autocast(kind, CPU):
            assert layer(x).dtype == dtype


def choice(seconds):
    """What is chosen when passes take these times; the very first of each takes much longer."""
    now, seen = [0.0], set()

    def run(precision):
        now[0] += seconds[precision] + (0 if precision in seen else 100.0)
        seen.add(precision)

    return fastest(run, CPU, clock=lambda: now[0])


def test_bfloat16_has_to_be_worth_it():
    assert choice({"float32": 1.1, "bfloat16": 1.0}) == "float32"
    assert choice({"float32": 1.0, "bfloat16": 3.0}) == "float32"
    assert choice({"float32": 1.3, "bfloat16": 1.0}) == ("bfloat16" if has_bfloat16(CPU) else "float32")


@pytest.mark.parametrize(
    ("flags", "has"),
    [
        ({"fpu", "avx512f", "avx512_vnni"}, False),
        ({"fpu", "avx512_bf16", "avx"}, True),
        ({"amx_bf16"}, True),
        ((), False),
    ],
)
def test_the_cpu_says_whether_it_has_bfloat16(monkeypatch, flags, has):
    monkeypatch.setattr(resources, "cpu_model", lambda: ("a CPU", frozenset(flags)))
    assert precision.has_bfloat16(torch.device("cpu")) is has


def test_what_is_chosen_where_the_hardware_has_bfloat16(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    assert choice({"float32": 1.3, "bfloat16": 1.0}) == "bfloat16"
    assert choice({"float32": 1.1, "bfloat16": 1.0}) == "float32"


def test_the_first_pass_of_each_does_not_count(monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda device: True)
    now, passes = [0.0], {"float32": 0, "bfloat16": 0}

    def run(kind):  # the very first pass looks fast, as a cached one may; those that count say otherwise
        passes[kind] += 1
        now[0] += 0.1 if passes[kind] == 1 and kind == "bfloat16" else 1.0

    assert precision.fastest(run, CPU, clock=lambda: now[0]) == "float32"
