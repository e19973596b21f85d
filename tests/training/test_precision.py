import torch

from training.precision import autocast, fastest, has_bfloat16

CPU = torch.device("cpu")


def test_autocast_computes_in_the_asked_format():
    layer, x = torch.nn.Linear(4, 4), torch.ones(2, 4)
    formats = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    for precision, dtype in formats.items():
        with autocast(precision, CPU):
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
