"""What the tests of the service share: a model whose answer can be read off the image, pictures for it, an engine that
a test can hold, and servers around them.

The toy model looks at the mean grey level of an image: class k of K wins for the level 255 * k / (K - 1). So every
answer tells which image it came from, and with 256 classes each of the 256 levels has an answer of its own.
"""

import asyncio
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import onnx
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc
from grpc import aio
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from service import artifact, publication, serving
from service.admission import Admission
from service.artifact import Canary, InputSpec, Manifest, Resize, Variant
from service.classifier import Classifier
from service.decode import decode_pool
from service.engine import Outputs
from service.metrics import Metrics
from service.preprocess import Limits
from service.repository import Repository
from service.rpc.listener import Listener, Options
from service.rpc.servicer import ImageClassifier
from service.server import Server
from service.settings import Settings
from service.sources import LocalSource

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 30.0


# --- pictures


def grey_png(level, size=(8, 8)):
    """A PNG whose every pixel has one grey level, 0 to 255."""
    return encoded(Image.new("L", size, level), "PNG")


def grey_levels(count, classes=10):
    """Levels that the toy model tells apart, and the class each belongs to."""
    return [(round(255 * (k % classes) / (classes - 1)), k % classes) for k in range(count)]


def photo_jpeg(width=500, height=375, seed=0, quality=90):
    """A JPEG with the statistics of a photo: smooth gradients, edges and grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3), np.uint8))
    pixels = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC)).astype(np.int16)
    pixels[height // 3 : height // 2, width // 4 : width // 2] //= 2
    grain = rng.normal(0, 6, pixels.shape)
    return encoded(Image.fromarray(np.clip(pixels + grain, 0, 255).astype(np.uint8)), "JPEG", quality=quality)


def encoded(image, image_format, **options):
    """Bytes of a Pillow image, or of pixels uint8[H, W] or [H, W, C]."""
    stream = io.BytesIO()
    (image if isinstance(image, Image.Image) else Image.fromarray(image)).save(stream, image_format, **options)
    return stream.getvalue()


# --- the toy model


def grey_outputs(levels, classes):
    """What the toy model says to mean grey levels float[N]: logits and probabilities, float32[N, classes]."""
    centres = 255 * np.arange(classes, dtype=np.float32) / (classes - 1)
    scale = np.float32(-(((classes - 1) / 255) ** 2))
    logits = scale * (np.asarray(levels, np.float32)[:, None] - centres) ** 2
    exponentials = np.exp(logits - logits.max(axis=1, keepdims=True))
    return logits, exponentials / exponentials.sum(axis=1, keepdims=True)


def grey_graph(classes, spec, *, nan_at=None, fixed_batch=False, float_input=False):
    """The toy model as an ONNX graph that keeps the contract, unless an option breaks it.

    `nan_at`: grey level for which the outputs are NaN. `fixed_batch`: batch of 1 only. `float_input`: float32 in.
    """
    batch = 1 if fixed_batch else "N"
    centres = (255 * np.arange(classes) / (classes - 1)).astype(np.float32).reshape(1, classes)
    constants = {
        "centres": centres,
        "scale": np.asarray(-(((classes - 1) / 255) ** 2), np.float32),
        "axes": np.asarray([1, 2, 3], np.int64),
        "column": np.asarray([-1, 1], np.int64),
        "poison": np.asarray(-1e6 if nan_at is None else nan_at, np.float32),
        "near": np.asarray(0.5, np.float32),
        "nan": np.asarray(np.nan, np.float32),
        "zero": np.asarray(0, np.float32),
    }
    nodes = [
        helper.make_node("Cast", ["image"], ["pixels"], to=TensorProto.FLOAT),
        helper.make_node("ReduceMean", ["pixels", "axes"], ["mean"], keepdims=0),
        helper.make_node("Reshape", ["mean", "column"], ["level"]),
        helper.make_node("Sub", ["level", "centres"], ["distance"]),
        helper.make_node("Mul", ["distance", "distance"], ["square"]),
        helper.make_node("Mul", ["square", "scale"], ["clean"]),
        helper.make_node("Sub", ["level", "poison"], ["apart"]),
        helper.make_node("Abs", ["apart"], ["gap"]),
        helper.make_node("Less", ["gap", "near"], ["poisoned"]),
        helper.make_node("Where", ["poisoned", "nan", "zero"], ["taint"]),
        helper.make_node("Add", ["clean", "taint"], ["logits"]),
        helper.make_node("Softmax", ["logits"], ["probabilities"], axis=1),
    ]
    element = TensorProto.FLOAT if float_input else TensorProto.UINT8
    graph = helper.make_graph(
        nodes,
        "grey",
        [helper.make_tensor_value_info("image", element, [batch, *spec.shape])],
        [
            helper.make_tensor_value_info(name, TensorProto.FLOAT, [batch, classes])
            for name in ("logits", "probabilities")
        ],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    onnx.checker.check_model(model)
    return model


def write_version(
    repository,
    name="grey",
    number=1,
    *,
    classes=10,
    labels=None,
    spec=None,
    external_data=False,
    canary_shift=0.0,
    graph_options=None,
):
    """Publishes the toy model as a version, and returns its directory.

    Args:
        repository: made if it does not exist.
        name: of the model.
        number: of the version.
        classes: K of the graph.
        labels: of the manifest; None gives one for each class of the graph. Another count breaks the contract.
        spec: the model's input; None takes 8x8 gray, stretched.
        external_data: writes the weights beside the graph, which breaks the contract.
        canary_shift: added to the probabilities that the canary promises.
        graph_options: `nan_at`, `fixed_batch`, `float_input` of `grey_graph`.
    """
    spec = spec or InputSpec(height=8, width=8, channels=1, resize=Resize(mode="stretch"))
    labels = tuple(labels or (f"level {k}" for k in range(classes)))
    staging = publication.staging_dir(Path(repository), name, number)
    model = grey_graph(classes, spec, **graph_options or {})
    onnx.save_model(
        model, staging / artifact.MODEL, save_as_external_data=external_data, location="weights.bin", size_threshold=0
    )
    levels = [0, 85, 255]
    (staging / artifact.CANARY_DIR).mkdir()
    images = tuple(f"{artifact.CANARY_DIR}/{level}.png" for level in levels)
    for level, path in zip(levels, images, strict=True):
        (staging / path).write_bytes(grey_png(level))
    rows = np.zeros((len(levels), len(labels)))
    known = min(classes, len(labels))
    rows[:, :known] = grey_outputs(levels, classes)[1][:, :known] + canary_shift
    manifest = Manifest(
        name=name,
        version=number,
        created=publication.now(),
        architecture="grey",
        classes=labels,
        input=spec,
        files=publication.list_files(staging),
        variants=(Variant(name="fp32", file=artifact.MODEL, accuracy=1.0),),
        canary=Canary(images=images, probabilities=tuple(map(tuple, rows.tolist()))),
        metrics={"accuracy": 1.0},
    )
    return publication.publish(staging, Path(repository), manifest)


# --- an engine that a test holds in its hand


class ToyEngine:
    """`service.engine.Engine` without a runtime: the toy model in numpy, run when the test lets it.

    `batches` records the grey levels of each batch that began. While `pause()`d a batch waits for `let_go`.
    `fail_next(error)` makes the next batch raise.
    """

    provider = "ToyProvider"
    variant = artifact.MODEL
    precision = "toy"

    def __init__(self, classes=10, buckets=(1, 2, 4, 8), nan_at=None):
        self.classes = classes
        self.buckets = buckets
        self.nan_at = nan_at
        self.measured_s = {}
        self.batches = []
        self.closed = False
        self._errors = deque()
        self._paused = False
        self._may_go = threading.Semaphore(0)
        self._began = threading.Semaphore(0)

    def infer(self, chunks):
        pixels = np.concatenate(list(chunks))
        levels = pixels.reshape(len(pixels), -1).mean(axis=1)
        self.batches.append([round(float(level)) for level in levels])
        self._began.release()
        if self._paused and not self._may_go.acquire(timeout=TIMEOUT_S):
            raise TimeoutError("the test never let this batch go")
        if self._errors:
            raise self._errors.popleft()
        logits, probabilities = grey_outputs(levels, self.classes)
        if self.nan_at is not None:
            probabilities[np.abs(levels - self.nan_at) < 0.5] = np.nan
        return Outputs(logits, probabilities.astype(np.float32))

    def close(self):
        self.closed = True

    def pause(self):
        """From now on batches wait; forgets those of the canary."""
        self.batches.clear()
        self._began = threading.Semaphore(0)
        self._paused = True

    def let_go(self, batches=1):
        """Lets so many batches end."""
        self._may_go.release(batches)

    def resume(self):
        """Lets everything go, now and later."""
        self._paused = False
        self._may_go.release(1000)

    def fail_next(self, error):
        self._errors.append(error)

    async def began(self):
        """Waits until one more batch has begun."""
        assert await asyncio.to_thread(self._began.acquire, timeout=TIMEOUT_S), "no batch began"


# --- servers

CLASSIFY = "/convoy.v1.ImageClassifier/Classify"


@dataclass
class Stand:
    """A gRPC server on a free port around toy engines, with everything a test may want to look at."""

    stub: object
    channel: object
    target: str
    metrics: Metrics
    admission: Admission
    listener: Listener
    repository: Repository
    engines: dict = field(default_factory=dict)

    def value(self, name, **labels):
        """Value of a metric's sample; 0 if it was never touched."""
        return self.metrics.registry.get_sample_value(name, labels) or 0.0

    def silent_call(self, method=CLASSIFY, timeout=None):
        """A call that is opened and never sends its message."""

        async def silence():
            await asyncio.Event().wait()
            yield b""

        return self.channel.stream_unary(method)(silence(), timeout=timeout)


async def eventually(check):
    """Waits for what wakes nobody when it changes, such as a gauge."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            if check():
                return
            await asyncio.sleep(0.005)


def toy_load(path, build, metrics, gently, on_device_lost):
    """Loads a version on toy engines that neither wait for company, nor shed, nor run on the loop."""
    plain = {"window_s": 0.0, "codel_target_s": 0.0, "in_turn_s": 0.0}
    return serving.load(path, build, metrics.model, gently=gently, on_device_lost=on_device_lost, **plain)


@asynccontextmanager
async def toy_stand(
    root,
    engines,
    *,
    max_message_bytes=1 << 20,
    max_images=256,
    max_pending=512,
    default_s=10.0,
    longest_s=60.0,
    bounds=None,
    loading=None,
):
    """The service from the port down to the engine, on toy engines: `engines` maps model names to them.

    Everything but the engine is the real thing, put together as `service.server` does it. `bounds`: further options of
    the listener. `loading`: is told the directory of each version before it is loaded, on the loader's thread.
    """
    metrics, lost = Metrics(), []
    for name, engine in engines.items():
        if not (root / name).exists():
            write_version(root, name, classes=engine.classes)

    def load(path, gently):
        if loading:
            loading(path)
        return toy_load(path, lambda version: [engines[version.manifest.name]], metrics, gently, lost.append)

    repository = Repository(LocalSource(root), load, metrics, release_timeout_s=2.0)
    admission = Admission(max_pending, 1 << 28)
    metrics.watch(metrics.pending_images, lambda: admission.images)
    decoder = decode_pool(2, metrics.stage("decode"))
    classifier = Classifier(decoder, admission, Limits(max_pixels=4_000_000), max_images, metrics)
    servicer = ImageClassifier(repository, classifier, default_s, longest_s)
    fixed = {"max_message_bytes": max_message_bytes, "max_connection_age_s": 0.0, "grace_s": 5.0}
    listener = Listener(Options("127.0.0.1", 0, **{**fixed, **(bounds or {})}), servicer, metrics)
    await listener.start()
    decoder.start()
    await repository.load_all()
    listener.ready(ready=True)
    target = f"127.0.0.1:{listener.port}"
    try:
        async with aio.insecure_channel(target) as channel:
            stub = pb_grpc.ImageClassifierStub(channel)
            yield Stand(stub, channel, target, metrics, admission, listener, repository, engines)
    finally:
        for engine in engines.values():
            engine.resume()
        await listener.stop(0)
        await classifier.close()
        await repository.close()
        await decoder.close()


@asynccontextmanager
async def real_server(repository, **settings):
    """A `service.server.Server` in this process, ready, on free ports; drained at the end."""
    fixed = {"port": 0, "http_port": 0, "drain_timeout_s": 5.0, "providers": ("cpu",), "cache_dir": cache(repository)}
    server = Server(Settings(repository=str(repository), **{**fixed, **settings}))
    try:
        await server.startup()
        yield server
    finally:
        await server.shutdown()


def cache(repository):
    """A cache directory beside the models, so that tests write nothing at home."""
    return Path(repository) / ".cache"


class Followed:
    """A process that serves, whose stderr is read line by line until it reports that it is ready, and on to its end."""

    def __init__(self, command, **options):
        self.lines = []
        self._ready = threading.Event()
        self._report = None
        pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen(command, **pipes, **options)
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()

    def kill(self):
        if self._process.poll() is None:
            self._process.kill()
        self._process.wait()
        self._reader.join(TIMEOUT_S)

    def _follow(self):
        with self._process.stderr as stream:
            for line in stream:
                self.lines.append(line)
                if '"event": "ready"' in line:
                    self._report = json.loads(line)
                    self._ready.set()
        self._ready.set()


class Process(Followed):
    """`convoy` in a process of its own, and what it writes to stderr."""

    def __init__(self, *arguments, env=None):
        super().__init__([sys.executable, "-m", "service", *map(str, arguments)], cwd=ROOT, env=environment(env))

    def ready(self):
        """Waits for the log line `ready` and returns it; None if the process ended without one."""
        assert self._ready.wait(TIMEOUT_S), "neither ready nor ended: " + "".join(self.lines)
        return self._report

    @property
    def pid(self):
        return self._process.pid

    def signal(self, number):
        self._process.send_signal(number)

    def open_files(self):
        """Paths of what the process has open."""
        found = []
        for entry in Path(f"/proc/{self._process.pid}/fd").iterdir():
            with suppress(OSError):  # closed meanwhile
                found.append(str(entry.readlink()))
        return found

    def wait(self, timeout_s):
        """Waits for the end; raises `subprocess.TimeoutExpired` if it does not come."""
        self._process.wait(timeout_s)

    def ended(self):
        """Waits for the end; exit code and everything written to stderr."""
        code = self._process.wait(TIMEOUT_S)
        self._reader.join(TIMEOUT_S)
        return code, "".join(self.lines)

    def events(self):
        """The log's JSON lines."""
        return [json.loads(line) for line in self.lines if line.startswith("{")]


def environment(changes=None):
    """This process's environment, able to import the checkout, without settings of its own; and the changes."""
    own = ("CONVOY_", "ORT_")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(own)}
    path = os.pathsep.join([str(ROOT), str(ROOT / "protos")])
    return {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **(changes or {})}


@contextmanager
def serve_process(repository, *flags, env=None, providers="cpu"):
    """A `convoy serve` process that is ready, on free ports. Yields it and its `ready` line; drains it at the end."""
    fixed = ("--port", "0", "--http-port", "0", "--log-format", "json", "--providers", providers)
    process = Process("serve", "--repository", repository, *fixed, "--cache-dir", cache(repository), *flags, env=env)
    try:
        report = process.ready()
        assert report, f"the server did not start: {process.ended()}"
        yield process, report
        process.signal(signal.SIGTERM)
        code, log = process.ended()
        assert code == 0, log
    finally:
        process.kill()
