"""Execution providers: which to use, with which options, threads and batch sizes. Pure: knows no ONNX Runtime.

Sources of the options: ONNX Runtime's pages on the CUDA, TensorRT and OpenVINO execution providers, and OpenVINO's
properties of its CPU device.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Final

from service.errors import ProviderError

CPU = "CPUExecutionProvider"
OPENVINO = "OpenVINOExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

AUTO = "auto"
# What settings call them, fastest first.
NAMES: Final[Mapping[str, str]] = MappingProxyType(
    {"tensorrt": TENSORRT, "cuda": CUDA, "openvino": OPENVINO, "cpu": CPU}
)
GPU_PROVIDERS = frozenset({TENSORRT, CUDA})

_REFUSED_OPTIONS = {
    "device_id": "every GPU that CUDA_VISIBLE_DEVICES shows is used",
    "trt_cuda_graph_enable": "ONNX Runtime has one graph for all batch sizes there, and would answer with old batches",
}

# Up to here one batch for each CPU; beyond it batches share the CPUs, or each would take too long.
_MOST_CPU_EXECUTORS = 8
# Batch sizes between two powers of two, on devices whose time grows with every image.
_STEPS_PER_OCTAVE = 4


@dataclass(frozen=True)
class Plan:
    """How one model runs.

    `provider`: name as ONNX Runtime spells it. `intra_op_threads`: CPU threads that work on one batch. `executors`:
    batches that run at the same time; on GPUs one for each of `gpus` (device numbers). `precision`: what the provider
    is told to compute in ("bf16", "f32", "fp16", "int8"); empty leaves it to the model file. `options`: the
    provider's own, from the settings; they win over those made here.
    """

    provider: str
    intra_op_threads: int
    executors: int = 1
    precision: str = ""
    gpus: tuple[int, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)

    @property
    def computes_in_caller(self) -> bool:
        """Whether the runtime computes on the thread that calls it, and has no threads of its own.

        Threads that a runtime starts inherit the priority of the thread that makes a session, for good.
        """
        return self.provider == CPU and self.intra_op_threads == 1

    def buckets(self, max_batch_size: int) -> tuple[int, ...]:
        """Batch sizes to prepare, ascending.

        A GPU is as fast with 8 images as with 5, and each size costs memory and a captured graph: powers of two. On a
        CPU each padded image costs as much as a real one: up to four sizes for each doubling.
        """
        return batch_buckets(max_batch_size, 1 if self.provider in GPU_PROVIDERS else _STEPS_PER_OCTAVE)


def batch_buckets(max_batch_size: int, steps_per_octave: int = 1) -> tuple[int, ...]:
    """Batch sizes up to and with `max_batch_size`: powers of two, and evenly spaced sizes between them."""
    sizes = {max_batch_size}
    power = 1
    while power < max_batch_size:
        step = max(1, power // steps_per_octave) if steps_per_octave > 1 else power
        sizes.update(range(power, min(2 * power, max_batch_size), step))
        power *= 2
    return tuple(sorted(sizes))


def cpu_plan(
    cpus: int, *, provider: str = CPU, executors: int = 0, intra_op_threads: int = 0, precision: str = ""
) -> Plan:
    """A plan for a provider that computes on the CPU.

    One thread for each batch and as many batches as CPUs (up to eight, which then get more threads each) answers more
    images per second than one batch on all CPUs: threads never wait for each other, and the decoders beside them take
    CPUs away from one batch instead of stalling all of its threads. With one thread for each, OpenVINO gets one batch
    more: its own threads compute, and one of them would be idle while an answer leaves and the next batch arrives.

    Args:
        cpus: CPUs that the process may use.
        provider: CPU or OPENVINO.
        executors: batches at the same time; 0 chooses.
        intra_op_threads: threads for each batch; 0 chooses.
        precision: see `Plan`.
    """
    if executors and not intra_op_threads:
        intra_op_threads = max(1, cpus // executors)
    elif intra_op_threads and not executors:
        executors = max(1, cpus // intra_op_threads)
    elif not executors:
        executors = min(cpus, _MOST_CPU_EXECUTORS)
        intra_op_threads = max(1, cpus // executors)
        executors += provider == OPENVINO and intra_op_threads == 1
    return Plan(provider, intra_op_threads, executors, precision)


def chain(
    requested: Sequence[str], missing: Callable[[str], str], *, gpus: int, allow_fallback: bool
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The providers to choose from.

    `auto` takes those for GPUs if there is a GPU, else those for CPUs. What is asked for by name has to be there.

    Args:
        requested: names as in the settings, or `auto`.
        missing: why a provider (ONNX Runtime's name) cannot be used here; empty if it can.
        gpus: GPUs that this process sees.
        allow_fallback: go on with what there is, in the end with the CPU.

    Returns:
        ONNX Runtime's names in order, and why each of the others was left out.

    Raises:
        ProviderError: a name is unknown; one that was asked for is missing, or there is a GPU that none can use.
    """
    if unknown := sorted(set(requested) - {AUTO, *NAMES}):
        raise ProviderError(f"there is no provider {', '.join(unknown)}; choose from {AUTO}, {', '.join(NAMES)}")
    automatic = AUTO in requested or not requested
    wanted = _automatic(gpus) if automatic else tuple(dict.fromkeys(NAMES[name] for name in requested))
    left_out = {name: why for name in wanted if (why := missing(name))}
    usable = tuple(name for name in wanted if name not in left_out)
    if allow_fallback:
        return (*usable, *(() if usable else (CPU,))), left_out
    if left_out and not (automatic and usable):
        reasons = "; ".join(f"{short_name(name)}: {why}" for name, why in left_out.items())
        raise ProviderError(
            f"a provider cannot be used here ({reasons}); mend that, name others with `providers`, or set "
            "`allow_fallback` to go on without"
        )
    return usable, left_out


def _automatic(gpus: int) -> tuple[str, ...]:
    return (TENSORRT, CUDA) if gpus else (CPU, OPENVINO)


def short_name(provider: str) -> str:
    """The settings' name of a provider."""
    return next((name for name, full in NAMES.items() if full == provider), provider)


def check_options(options: Mapping[str, Mapping[str, object]]) -> None:
    """Raises ValueError if an operator's options, by provider, are of no provider or would break what is built here."""
    if unknown := sorted(set(options) - set(NAMES)):
        raise ValueError(f"there is no provider {', '.join(unknown)}; choose from {', '.join(NAMES)}")
    if options.get("cpu"):
        raise ValueError("cpu has no options; its threads are those of executors and intra_op_threads")
    for name, given in options.items():
        for key in sorted(set(given) & set(_REFUSED_OPTIONS)):
            raise ValueError(f"the option {key} of {name} cannot be set: {_REFUSED_OPTIONS[key]}")


def session_entries() -> dict[str, str]:
    """Entries of every session's configuration."""
    return {
        # Spinning threads burn the quota of the decode threads beside them.
        "session.intra_op.allow_spinning": "0",
        # What really runs where is told in the log.
        "session.record_ep_graph_assignment_info": "1",
    }


def cuda_options(plan: Plan, gpu: int, *, graphs: bool) -> dict[str, str]:
    """Options of the CUDA provider.

    The arena grows by what is needed and not to the next power of two. The better and slower one of cuDNN's heuristics
    chooses the algorithms: every batch size is run before traffic comes. `use_tf32=0`, `prefer_nhwc=0` or
    `gpu_mem_limit=BYTES` (for each batch size) in the settings' `provider_options` change the rest.
    """
    made = {
        "arena_extend_strategy": "kSameAsRequested",
        "cudnn_conv_algo_search": "EXHAUSTIVE",
        "cudnn_conv_use_max_workspace": "1",
        "do_copy_in_default_stream": "1",
        "prefer_nhwc": "1",
        "use_tf32": "1",
    }
    return {**made, **plan.options, "device_id": str(gpu), "enable_cuda_graph": str(int(graphs))}


def tensorrt_options(
    plan: Plan, gpu: int, *, shape: Sequence[int], input_name: str, buckets: Sequence[int], cache: Path | None
) -> dict[str, str]:
    """Options of the TensorRT provider: one profile that spans every bucket, so that no batch leaves it.

    Args:
        plan: precision and the settings' options.
        gpu: device number.
        shape: height, width, channels of the input.
        input_name: name of the graph's input.
        buckets: batch sizes, ascending.
        cache: directory for this model's engine on this GPU. None: nothing is cached.
    """

    def profile(batch: int) -> str:
        return f"{input_name}:{'x'.join(map(str, (batch, *shape)))}"

    made = {
        # Unlike the CUDA provider's, these switches are "True" or "False": "1" is an error.
        # What an int8 model leaves without scales is quicker in fp16; the canary judges that.
        "trt_fp16_enable": str(plan.precision in {"fp16", "int8"}),
        "trt_int8_enable": str(plan.precision == "int8"),
        "trt_profile_min_shapes": profile(buckets[0]),
        "trt_profile_opt_shapes": profile(buckets[-1]),
        "trt_profile_max_shapes": profile(buckets[-1]),
    }
    if cache is not None:
        made |= {
            "trt_engine_cache_enable": "True",
            "trt_engine_cache_path": str(cache),
            "trt_timing_cache_enable": "True",
            "trt_timing_cache_path": str(cache),
        }
    return {**made, **plan.options, "device_id": str(gpu)}


def tensorrt_cache(
    root: Path, *, gpu_name: str, compute_capability: str, tensorrt: str, onnxruntime: str, digest: str, plan: Plan,
    buckets: Sequence[int],
) -> Path:  # fmt: skip
    """Directory of a compiled engine: another GPU, library, model, precision or profile never finds it."""
    facts = [compute_capability, onnxruntime, digest, plan.precision, list(buckets), sorted(plan.options.items())]
    key = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
    machine = "".join(c if c.isalnum() else "-" for c in f"{gpu_name}-{compute_capability}-trt{tensorrt}")
    return root / "tensorrt" / machine / key


def openvino_config(plan: Plan) -> str:
    """OpenVINO's properties as JSON, for the plugin's option `load_config`.

    One stream for each executor: a session with two streams called from two threads is twice as fast as two sessions,
    which end up on the same core. Threads are counted over all streams. The runtime sets no affinity of its own,
    because the decode threads share the CPUs.
    """
    made = {
        "INFERENCE_NUM_THREADS": str(plan.executors * plan.intra_op_threads),
        "NUM_STREAMS": str(plan.executors),
        "ENABLE_CPU_PINNING": "NO",
    }
    if plan.precision:
        made["INFERENCE_PRECISION_HINT"] = plan.precision
    return json.dumps({"CPU": {**made, **plan.options}})
