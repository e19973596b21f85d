"""Sessions of ONNX Runtime: made for exactly the provider of the plan, or not at all."""

from __future__ import annotations

import contextlib
import io
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from service import artifact, cuda, logs, openvino, providers, threads
from service.artifact import ModelVersion
from service.errors import ArtifactError, ProviderError
from service.providers import CPU, CUDA, GPU_PROVIDERS, OPENVINO, TENSORRT, Plan

_log = logs.get("engine")

_FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors arrive as exceptions, and are told once
_PROGRESS_S = 15.0
# In the texts of ONNX Runtime's refusals to capture a graph whose nodes are not all on the GPU.
_GRAPH_REFUSED = ("graph capture", "cuda graph", "cuda_graph")


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    `session`: on a CPU all executors share it: ONNX Runtime's sessions may run on several threads, and the weights are
    held once. `on_gpus`: for each GPU its session for every batch size (`session` is one of them). `nodes`: how many
    nodes of the graph each provider took.
    """

    session: Any
    plan: Plan
    nodes: Mapping[str, int]
    on_gpus: tuple[Mapping[int, Any], ...] = ()
    graphs: bool = False


def missing(provider: str) -> str:
    """Why a provider cannot be used on this machine; empty if it can. Loads the OpenVINO plugin if asked about it."""
    if provider == OPENVINO:
        try:
            openvino.device()
        except ProviderError as error:
            return str(error)
        return ""
    if provider not in ort.get_available_providers():
        return f"this build of ONNX Runtime ({ort.__version__}) lacks it"
    if provider in GPU_PROVIDERS and not cuda.visible():
        return "the NVIDIA driver shows no GPU to this process"
    if provider == TENSORRT and not cuda.tensorrt_version():
        return "the TensorRT 10 library (libnvinfer.so.10) is not on the library path"
    return ""


def library_versions() -> dict[str, str]:
    """Versions of what computes, without loading any of it."""
    return {"onnxruntime": ort.__version__, "openvino": openvino.version(), "tensorrt": cuda.tensorrt_version()}


def load(
    version: ModelVersion, variant: str, plan: Plan, buckets: Sequence[int], engine_cache: Path | None = None
) -> Loaded:
    """Loads a variant of a model version.

    Args:
        version: the verified version.
        variant: file name of the variant.
        plan: provider, threads, GPUs.
        buckets: batch sizes that will run on GPUs; TensorRT compiles for them.
        engine_cache: directory for compiled TensorRT engines; None caches nothing.

    Raises:
        ArtifactError: the graph cannot be loaded, or its signature breaks the contract.
        ProviderError: the provider is missing, refuses the options, or takes no node of the graph.
    """
    path = version.file(variant)
    if plan.provider not in GPU_PROVIDERS:
        options: dict[str, str] = dict(plan.options)
        if plan.provider == OPENVINO:
            options = {"load_config": providers.openvino_config(plan)}
        loaded = _loaded(_open(path, plan, options), plan)
    else:
        _preload_cuda()
        on_gpus, graphs = _open_gpus(version, path, plan, buckets, engine_cache)
        loaded = _loaded(on_gpus[0][buckets[0]], plan, on_gpus, graphs=graphs)
    inputs, outputs = (_signature(loaded.session, side) for side in ("inputs", "outputs"))
    artifact.check_signature(version.manifest, inputs, outputs)
    return loaded


def _loaded(session: Any, plan: Plan, on_gpus: tuple[Mapping[int, Any], ...] = (), *, graphs: bool = False) -> Loaded:
    return Loaded(session, plan, _nodes(session), on_gpus, graphs)


def _open_gpus(
    version: ModelVersion, path: Path, plan: Plan, buckets: Sequence[int], engine_cache: Path | None
) -> tuple[tuple[Mapping[int, Any], ...], bool]:
    """Sessions for each GPU, with CUDA graphs where the model allows them.

    TensorRT's is compiled for all batch sizes. With CUDA each has one of its own: a convolution keeps the plan of cuDNN
    for one shape, and makes it anew when another one comes (`conv.cc`; microsoft/onnxruntime#23006 measures that as 15
    times slower), and what is captured may not outlive it.
    """

    def opened_on(gpu: int, *, graphs: bool) -> Mapping[int, Any]:
        options = _gpu_options(version, plan, gpu, buckets, engine_cache, graphs=graphs)
        if plan.provider == CUDA:
            return {bucket: _open(path, plan, options) for bucket in buckets}
        return dict.fromkeys(buckets, _open(path, plan, options))

    def opened(*, graphs: bool) -> tuple[Mapping[int, Any], ...]:
        return tuple(opened_on(gpu, graphs=graphs) for gpu in plan.gpus)

    with _progress(plan.provider, path):
        # As settings files may write it: 1, true.
        wanted = plan.options.get("enable_cuda_graph", "1").lower() in {"1", "true"} and plan.provider == CUDA
        if not wanted:
            return opened(graphs=False), False
        try:
            return opened(graphs=True), True
        except ProviderError as error:
            if not any(word in str(error).lower() for word in _GRAPH_REFUSED):
                raise
            _log.info("no CUDA graphs for this model: it has nodes that run on the CPU", file=str(path))
            return opened(graphs=False), False


def _gpu_options(
    version: ModelVersion,
    plan: Plan,
    gpu: int,
    buckets: Sequence[int],
    engine_cache: Path | None,
    *,
    graphs: bool,
) -> dict[str, str]:
    if plan.provider == CUDA:
        return providers.cuda_options(plan, gpu, graphs=graphs)
    cache = None
    if engine_cache is not None:
        device = cuda.visible()[gpu]
        cache = providers.tensorrt_cache(
            engine_cache,
            gpu_name=device.name,
            compute_capability=device.compute_capability,
            tensorrt=cuda.tensorrt_version(),
            onnxruntime=ort.__version__,
            digest=version.digest,
            plan=plan,
            buckets=buckets,
        )
        try:
            cache.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            _log.warning("TensorRT's engine is not kept: each start compiles it", reason=str(error))
            cache = None
    return providers.tensorrt_options(
        plan, gpu, shape=version.manifest.input.shape, input_name=artifact.INPUT_NAME, buckets=buckets, cache=cache
    )


def _preload_cuda() -> None:
    """Loads CUDA and cuDNN from their wheels, where they are installed that way. What it prints goes to the log."""
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        ort.preload_dlls()
    if said := printed.getvalue().strip():
        _log.info("CUDA's libraries are not in Python packages; the system's are taken", detail=said)


def _open(path: Path, plan: Plan, options: Mapping[str, str]) -> Any:
    configuration = ort.SessionOptions()
    configuration.intra_op_num_threads = plan.intra_op_threads
    configuration.inter_op_num_threads = 1
    configuration.log_severity_level = _FATAL_ONLY
    for key, value in providers.session_entries().items():
        configuration.add_session_config_entry(key, value)
    arguments: dict[str, Any] = {}
    try:
        if plan.provider == OPENVINO:
            configuration.add_provider_for_devices([openvino.device()], options)
        else:
            arguments["providers"] = [(plan.provider, dict(options)), *([CPU] if plan.provider != CPU else [])]
        if plan.computes_in_caller:
            session = threads.in_background(_session, path, configuration, arguments)
        else:
            session = _session(path, configuration, arguments)
    except ProviderError:
        raise
    except Exception as error:  # ONNX Runtime's exceptions have no common base below Exception
        raise _refusal(path, plan, error) from error
    found = session.get_providers()[0]
    if found != plan.provider:
        raise ProviderError(
            f"{path}: asked for {plan.provider}, ONNX Runtime took {found}; the provider's libraries are missing or "
            "do not match (for CUDA see the versions that this ONNX Runtime was built for)"
        )
    return session


def _session(path: Path, configuration: Any, arguments: Mapping[str, Any]) -> Any:
    # Without this ONNX Runtime's Python layer retries on the CPU by itself.
    return ort.InferenceSession(path, configuration, enable_fallback=0, **arguments)


def _refusal(path: Path, plan: Plan, error: Exception) -> ProviderError | ArtifactError:
    """On the CPU provider only the file can be at fault, elsewhere the provider is the likelier one."""
    reason = " ".join(str(error).split())
    if plan.provider == CPU:
        return ArtifactError(f"{path} cannot be loaded by ONNX Runtime: {reason}")
    return ProviderError(f"{path} cannot be loaded on {plan.provider}: {reason}")


def _nodes(session: Any) -> dict[str, int]:
    counted: Counter[str] = Counter()
    for part in session.get_provider_graph_assignment_info():
        counted[part.ep_name] += len(part.get_nodes())
    return dict(counted)


def _signature(session: Any, side: str) -> dict[str, tuple[str, list[int | str | None]]]:
    nodes = session.get_inputs() if side == "inputs" else session.get_outputs()
    return {node.name: (node.type, list(node.shape)) for node in nodes}


@contextlib.contextmanager
def _progress(provider: str, path: Path, every_s: float = _PROGRESS_S) -> Iterator[None]:
    """Says from time to time that a load still goes on: TensorRT compiles for minutes, which looks like a hang."""
    done = threading.Event()
    began = time.monotonic()

    def tell() -> None:
        while not done.wait(every_s):
            _log.info("still loading", provider=provider, file=str(path), seconds=round(time.monotonic() - began))

    teller = threading.Thread(target=tell, name="load-progress", daemon=True)
    teller.start()
    try:
        yield
    finally:
        done.set()
        teller.join()
