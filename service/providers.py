"""Execution providers of ONNX Runtime and the options they are given."""

from __future__ import annotations

from dataclasses import dataclass

from service.errors import ProviderError

CPU = "CPUExecutionProvider"


@dataclass(frozen=True)
class Plan:
    """How one model runs.

    `provider`: name as ONNX Runtime spells it. `intra_op_threads`: threads that work on one batch. `executors`: batches
    that run at the same time.
    """

    provider: str
    intra_op_threads: int
    executors: int = 1


def cpu_plan(available: list[str], cpus: int, intra_op_threads: int = 0) -> Plan:
    """The plan for the CPU provider.

    Args:
        available: what ONNX Runtime offers (`onnxruntime.get_available_providers()`).
        cpus: CPUs that the process may use.
        intra_op_threads: set by the operator; 0 takes `cpus`.

    Raises:
        ProviderError: this build of ONNX Runtime has no CPU provider.
    """
    if CPU not in available:
        raise ProviderError(f"this ONNX Runtime has no {CPU}; it offers {', '.join(available) or 'nothing'}")
    return Plan(provider=CPU, intra_op_threads=intra_op_threads or cpus)
