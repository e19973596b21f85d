"""The command, as it is typed, against a server on the same machine."""

import json
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from click.testing import CliRunner
from convoy.v1 import image_classifier_pb2 as pb
from convoy.v1 import image_classifier_pb2_grpc as pb_grpc

from service.bench import bench, images
from service.exits import ServerUnreachableError

QUICK = ["--warmup", "0", "--requests", "20"]


class Echo(pb_grpc.ImageClassifierServicer):
    """Classifies nothing, quickly."""

    def Classify(self, request, context):  # noqa: N802 - gRPC's spelling
        return pb.ClassifyResponse(results=[pb.ImageResult(classification=pb.Classification()) for _ in request.images])


@pytest.fixture
def server():
    running = grpc.server(ThreadPoolExecutor(4))
    pb_grpc.add_ImageClassifierServicer_to_server(Echo(), running)
    port = running.add_insecure_port("127.0.0.1:0")
    running.start()
    yield f"127.0.0.1:{port}"
    running.stop(0).wait()


@pytest.fixture
def image(tmp_path):
    path = tmp_path / "image.jpg"
    path.write_bytes(b"not looked at")
    return str(path)


def run(*arguments):
    return CliRunner().invoke(bench, arguments, catch_exceptions=True)


def test_a_sweep_prints_its_table_and_writes_json_and_picture(server, image, tmp_path):
    results, picture = tmp_path / "results.json", tmp_path / "sweep.svg"

    done = run(
        image, "--server", server, "--concurrency", "1,3", *QUICK, "--json", str(results), "--plot", str(picture)
    )

    assert done.exit_code == 0, done.output
    assert "1 callers" in done.output
    assert "3 callers" in done.output
    content = json.loads(results.read_text())
    assert [level["sent"] for level in content["levels"]] == [20, 20]
    assert content["settings"]["images"] == [image]
    assert content["settings"]["tls"] is False
    assert picture.read_text().startswith("<svg")


def test_open_loop_with_made_up_images(server):
    done = run("--synthetic", "32x24", "--server", server, "--rate", "200", *QUICK, "--images-per-request", "4")

    assert done.exit_code == 0, done.output
    assert "200/s" in done.output
    assert "from the intended time" in done.output


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "--synthetic"),
        (["--synthetic", "32"], "500x375"),
        (["--synthetic", "8x8", "--rate", "5", "--concurrency", "5"], "exclude each other"),
        (["--synthetic", "8x8", "--rate", "fast"], "list of numbers"),
        (["--synthetic", "8x8", "--rate", "0"], "above 0"),
        (["--synthetic", "8x8", "--rate", "inf"], "above 0"),
        (["--synthetic", "8x8", "--concurrency", "1.5"], "whole numbers"),
        (["--synthetic", "8x8", "--plot", "sweep.png"], ".svg"),
        (["--synthetic", "8x8", "--plot", "/nowhere/sweep.svg"], "cannot be written"),
        (["--synthetic", "8x8", "--json", "/nowhere/figures.json"], "cannot be written"),
        (["--synthetic", "99999x99999"], "64,000,000 pixels"),
    ],
)
def test_wrong_flags_are_explained(arguments, words):
    done = run(*arguments)

    assert done.exit_code == 2
    assert words in done.output


def test_a_level_in_which_nothing_was_sent_is_told_and_is_no_success(server, image, tmp_path):
    flags = ("--warmup", "0", "--duration", "0.1", "--seed", "1", "--json", str(tmp_path / "results.json"))
    some = run(image, "--server", server, "--rate", "0.001,500", *flags)
    none = run(image, "--server", server, "--rate", "0.001", "--warmup", "0.1", *flags[2:])

    assert (some.exit_code, none.exit_code) == (0, 2)
    assert "nothing was measured" in none.output


def test_hidden_files_are_not_sent(tmp_path):
    (tmp_path / "b.jpg").write_bytes(b"an image")
    for hidden in (tmp_path / "._b.jpg", tmp_path / ".thumbnails" / "a.jpg"):
        hidden.parent.mkdir(exist_ok=True)
        hidden.write_bytes(b"none")

    assert images.from_disk([tmp_path]) == [b"an image"]


def test_no_server_is_a_domain_error(unused_tcp_port):
    done = run("--synthetic", "8x8", "--server", f"127.0.0.1:{unused_tcp_port}")

    assert isinstance(done.exception, ServerUnreachableError)


def test_ctrl_c_shows_what_was_measured(server, image):
    script = "from service.bench import bench; bench()"
    command = [sys.executable, "-c", script, image, "--server", server, "--warmup", "0", "--concurrency", "2,4"]
    with subprocess.Popen(
        [*command, "--duration", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert "2 callers" in process.stderr.readline()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=20)

    assert process.returncode == 130, errors
    assert "2 callers" in output
    assert "4 callers" not in output
    assert "Traceback" not in errors
