"""Sessions of ONNX Runtime: made for exactly the provider of the plan, or not at all."""

from __future__ import annotations

import contextlib
import functools
import io
import shutil
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnxruntime as ort

from service import artifact, cuda, faults, logs, openvino, providers, threads
from service.artifact import ModelVersion
from service.errors import ArtifactError, ConvoyError, OutOfReachError, ProviderError
from service.providers import CPU, CUDA, GPU_PROVIDERS, OPENVINO, TENSORRT, Plan

_log = logs.get("engine")

_ERRORS = 3
_FATAL_ONLY = 4  # ONNX Runtime's log severity: its errors arrive as exceptions, and are told once
_PROGRESS_S = 15.0
# In the texts of failures for which files of an earlier compilation are to blame.
_CACHE_DAMAGED = ("could not deserialize engine from cache", "could not create timing cache")


@dataclass(frozen=True)
class OnGpu:
    """A model on one GPU.

    `sessions`: by batch size; whoever runs them may replace one. `plain`: opens a session that captures no graph; None
    if the others capture none either.
    """

    sessions: dict[int, Any]
    plain: Callable[[], Any] | None = None


@dataclass(frozen=True)
class Loaded:
    """A model in memory.

    `session`: on a CPU, shared by all executors: ONNX Runtime's sessions may run on several threads, and the weights
    are held once. `on_gpus`: for each GPU. `nodes`: how many nodes of the graph each provider took.
    """

    session: Any
    plan: Plan
    nodes: Mapping[str, int]
    on_gpus: tuple[OnGpu, ...] = ()


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
        return "the TensorRT 10 libraries (libnvinfer.so.10, libnvonnxparser.so.10) are not on the library path"
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
        OutOfReachError: memory or file descriptors are short.
        ProviderError: the provider is missing, refuses the options, or takes no node of the graph.
    """
    path = version.file(variant)
    if plan.provider not in GPU_PROVIDERS:
        options: dict[str, str] = dict(plan.options)
        if plan.provider == OPENVINO:
            options = {"load_config": providers.openvino_config(plan)}
        session = _open(path, plan, options)
        _check(version, session)
        return Loaded(session, plan, _nodes(session))
    _preload_cuda()
    on_gpus = _open_gpus(version, path, plan, buckets, engine_cache)
    _check(version, on_gpus[0].sessions[buckets[0]])
    return Loaded(None, plan, _nodes(on_gpus[0].sessions[buckets[0]]), on_gpus)


def _open_gpus(
    version: ModelVersion, path: Path, plan: Plan, buckets: Sequence[int], engine_cache: Path | None
) -> tuple[OnGpu, ...]:
    """Sessions for each GPU, with CUDA graphs where the model allows them.

    TensorRT's is compiled for all batch sizes. With CUDA each has one of its own: a convolution keeps the plan of cuDNN
    for one shape, and makes it anew when another one comes (`conv.cc`; microsoft/onnxruntime#23006 measures that as 15
    times slower), and what is captured may not outlive it.
    """

    def opened_on(gpu: int, *, graphs: bool) -> OnGpu:
        if plan.provider == TENSORRT:
            return OnGpu(dict.fromkeys(buckets, _open_tensorrt(version, path, plan, gpu, buckets, engine_cache)))

        def one(*, graphs: bool) -> Any:
            return _open(path, plan, providers.cuda_options(plan, gpu, graphs=graphs))

        sessions = {bucket: one(graphs=graphs) for bucket in buckets}
        return OnGpu(sessions, functools.partial(one, graphs=False) if graphs else None)

    def opened(*, graphs: bool) -> tuple[OnGpu, ...]:
        return tuple(opened_on(gpu, graphs=graphs) for gpu in plan.gpus)

    with _progress(plan.provider, path):
        # As settings files may write it: 1, true.
        wanted = plan.options.get("enable_cuda_graph", "1").lower() in {"1", "true"} and plan.provider == CUDA
        if not wanted:
            return opened(graphs=False)
        try:
            return opened(graphs=True)
        except ProviderError as error:
            if not faults.no_capture(error):
                raise
            _log.info("no CUDA graphs for this model: it has nodes that run on the CPU", file=str(path))
            return opened(graphs=False)


def _open_tensorrt(
    version: ModelVersion, path: Path, plan: Plan, gpu: int, buckets: Sequence[int], engine_cache: Path | None
) -> Any:
    """A session with a compiled engine, from the cache if it is there.

    ONNX Runtime writes the engine piece by piece under its final name, and a process may be killed meanwhile; it fails
    on half an engine, or worse. So it compiles in a directory of its own, which takes its place when it is complete.
    """

    def opened(cache: Path | None) -> Any:
        shape = version.manifest.input.shape
        options = providers.tensorrt_options(
            plan, gpu, shape=shape, input_name=artifact.INPUT_NAME, buckets=buckets, cache=cache
        )
        return _open(path, plan, options)

    if engine_cache is None:
        return opened(None)
    cache = _engine_directory(version, plan, gpu, buckets, engine_cache)
    if cache.is_dir():
        try:
            return opened(cache)
        except ProviderError as error:
            if not any(word in str(error) for word in _CACHE_DAMAGED):
                raise
            _log.warning("TensorRT's engine is damaged; compiling it again", directory=str(cache), error=str(error))
            shutil.rmtree(cache, ignore_errors=True)
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        building = Path(tempfile.mkdtemp(prefix=f"{cache.name}.", dir=cache.parent))
    except OSError as error:
        _log.warning("TensorRT's engine is not kept: each start compiles it", reason=str(error))
        return opened(None)
    try:
        session = opened(building)
        with contextlib.suppress(OSError):  # another process was faster
            building.rename(cache)
    finally:
        shutil.rmtree(building, ignore_errors=True)
    return session


def _engine_directory(version: ModelVersion, plan: Plan, gpu: int, buckets: Sequence[int], root: Path) -> Path:
    device = cuda.visible()[gpu]
    return providers.tensorrt_cache(
        root,
        gpu_name=device.name,
        compute_capability=device.compute_capability,
        tensorrt=cuda.tensorrt_version(),
        onnxruntime=ort.__version__,
        digest=version.digest,
        plan=plan,
        buckets=buckets,
    )


def _preload_cuda() -> None:
    """Loads CUDA and cuDNN from their wheels, where they are installed that way. What it prints goes to the log."""
    # Of each session on a GPU it would warn on stderr that no plugin has that provider, which is none.
    ort.set_default_logger_severity(_ERRORS)
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


def _refusal(path: Path, plan: Plan, error: Exception) -> ConvoyError:
    """On the CPU provider only the file can be at fault, elsewhere the provider is the likelier one."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if faults.is_shortage(error):
        return OutOfReachError(f"{path} cannot be loaded on {plan.provider} now: {reason}")
    if plan.provider == CPU:
        return ArtifactError(f"{path} cannot be loaded by ONNX Runtime: {reason}")
    return ProviderError(f"{path} cannot be loaded on {plan.provider}: {reason}")


def _check(version: ModelVersion, session: Any) -> None:
    artifact.check_signature(version.manifest, _signature(session, "inputs"), _signature(session, "outputs"))


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
