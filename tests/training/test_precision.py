import time

import torch

from training.precision import autocast, fastest, has_bfloat16

CPU = torch.device("cpu")


def test_autocast_computes_in_the_asked_format():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for precision, dtype in formats.items():
        with autocast(precision, CPU):
            assert layer(x).dtype == dtype


def busy(seconds):
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_bfloat16_has_to_be_worth_it():
    assert fastest(lambda p: busy(0.004 if p == "bfloat16" else 0.0042), CPU) == "float32"
    expected = "bfloat16" if has_bfloat16(CPU) else "float32"
    assert fastest(lambda p: busy(0.002 if p == "bfloat16" else 0.006), CPU) == expected
