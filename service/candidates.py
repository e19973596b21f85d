"""What could run a model version here: each provider with each variant and precision that suits it. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from service import providers, resources
from service.artifact import ModelVersion, Variant
from service.errors import ConfigurationError
from service.providers import AUTO, CPU, CUDA, GPU_PROVIDERS, OPENVINO, TENSORRT, Plan

# Variants that a provider has fast kernels for, the likely fastest first; each with the precision to ask for.
# The plain fp32 file is last: it is also the most exact. OpenVINO's bf16 is fast with AMX, and without may be half as
# fast as f32: both are measured.
_SUITABLE: Mapping[str, tuple[tuple[str, str], ...]] = {
    CPU: (("int8", ""), ("fp32", "")),
    OPENVINO: (("int8", ""), ("fp32", "f32"), ("fp32", "bf16")),
    CUDA: (("fp16", ""), ("fp32", "")),
    TENSORRT: (("trt-int8", "int8"), ("fp32", "fp16"), ("fp32", "")),
}


@dataclass(frozen=True)
class Wishes:
    """What the operator asks of a model's engine.

    `providers`: names as in `service.providers.NAMES`, or "auto". `options`: ONNX Runtime's own options by those
    names. `variant`: a variant's name, or "auto". `executors`, `intra_op_threads`: 0 chooses. `max_batch_size`: images.
    `batch_limit_s`: on the CPU the largest batch is cut to take no longer; 0 does not cut. `budget_s`: after so many
    seconds of measuring no further candidate is begun.
    """

    providers: tuple[str, ...] = (AUTO,)
    options: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    allow_fallback: bool = False
    variant: str = AUTO
    executors: int = 0
    intra_op_threads: int = 0
    max_batch_size: int = 32
    batch_limit_s: float = 0.1
    budget_s: float = 10.0


@dataclass(frozen=True)
class Machine:
    """What there is to compute on.

    `cpus`: that this process may use. `cpu_name`, `cpu_flags`: of /proc/cpuinfo. `gpus`: names by device number.
    `versions`: of the libraries that compute.
    """

    cpus: int
    cpu_name: str
    cpu_flags: frozenset[str]
    gpus: tuple[str, ...]
    versions: Mapping[str, str]


@dataclass(frozen=True)
class Candidate:
    """One way to run a model."""

    variant: Variant
    plan: Plan


def enumerate_candidates(
    version: ModelVersion, wishes: Wishes, machine: Machine, missing: Callable[[str], str]
) -> tuple[list[Candidate], dict[str, str]]:
    """The candidates in the order in which to try them, and why each provider that is not among them was left out.

    Args:
        version: the model version.
        wishes: the operator's.
        machine: to run on.
        missing: why a provider cannot be used; empty if it can.

    Raises:
        ProviderError: a provider that was asked for is missing.
        ConfigurationError: the version has no such variant, or no variant that the providers can run.
    """
    usable, left_out = providers.chain(
        wishes.providers, missing, gpus=len(machine.gpus), allow_fallback=wishes.allow_fallback
    )
    variants = _variants(version, wishes.variant)
    found = [
        Candidate(variant, _plan(provider, precision, wishes, machine))
        for provider in usable
        for variant, precision in _for_provider(provider, variants, wishes, machine)
    ]
    if not found:
        names = ", ".join(providers.short_name(provider) for provider in usable)
        raise ConfigurationError(f"{version.path} has no variant that runs on {names}")
    return found, left_out


def _variants(version: ModelVersion, wanted: str) -> tuple[Variant, ...]:
    known = version.manifest.variants
    if wanted == AUTO:
        return known
    chosen = tuple(variant for variant in known if variant.name == wanted)
    if not chosen:
        raise ConfigurationError(
            f"{version.path} has no variant {wanted}; it has {', '.join(variant.name for variant in known)}"
        )
    return chosen


def _for_provider(
    provider: str, variants: Sequence[Variant], wishes: Wishes, machine: Machine
) -> Iterator[tuple[Variant, str]]:
    by_name: dict[str, Variant] = {variant.name: variant for variant in variants}
    suitable = [(name, precision) for name, precision in _SUITABLE[provider] if name in by_name]
    if not suitable and wishes.variant != AUTO:  # pinned: the operator knows why
        suitable = [(wishes.variant, "")]
    for name, precision in suitable:
        if precision != "bf16" or resources.BF16_FLAGS & machine.cpu_flags:
            yield by_name[name], precision


def _plan(provider: str, precision: str, wishes: Wishes, machine: Machine) -> Plan:
    options = wishes.options.get(providers.short_name(provider), {})
    if provider in GPU_PROVIDERS:
        numbers = tuple(range(len(machine.gpus)))
        return Plan(provider, 1, len(numbers), precision, numbers, options)
    plan = providers.cpu_plan(
        machine.cpus,
        provider=provider,
        executors=wishes.executors,
        intra_op_threads=wishes.intra_op_threads,
        precision=precision,
    )
    return replace(plan, options=options)
