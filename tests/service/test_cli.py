"""The `convoy` command: help, outputs, and one line and a documented exit code for whatever goes wrong."""

import io
import json
import re
import shlex
import signal
import socket
import subprocess
import sys
import textwrap

import click
import pytest
import toys
from PIL import Image

from service import cli

NOBODY = "127.0.0.1:1"


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A real server with two models; its address."""
    repository = tmp_path_factory.mktemp("models")
    toys.write_version(repository, "grey", classes=256)
    toys.write_version(repository, "coarse", classes=2)
    with toys.serve_process(repository) as (_, report):
        yield report["grpc"]


@pytest.fixture
def convoy(monkeypatch, capsys):
    """Runs the command in this process; gives exit code, stdout and stderr."""
    for name in ("CONVOY_SERVER", "CONVOY_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setenv("GRPC_VERBOSITY", "ERROR")  # the command settles it for its process; here that is the tests' own

    def run(*arguments, stdin=b""):
        monkeypatch.setattr(sys, "argv", ["convoy", *map(str, arguments)])
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return int(ended.value.code), captured.out, captured.err

    return run


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    (folder / "deep").mkdir(parents=True)
    for path, level in {"a.png": 10, "b.PNG": 20, "deep/c.png": 30}.items():
        (folder / path).write_bytes(toys.grey_png(level))
    (folder / "notes.txt").write_text("no picture")
    return folder


def only_line(text):
    """The one line of an error, without a traceback around it."""
    (line,) = text.splitlines()
    return line


# --- help


def command_names():
    return cli.cli.list_commands(click.Context(cli.cli))


@pytest.mark.parametrize("name", command_names())
def test_every_command_explains_itself(convoy, name):
    code, out, _ = convoy(name, "--help")

    assert code == 0
    assert out.startswith("Usage: convoy " + name)
    assert f"Examples:\n    convoy {name}" in out
    assert len(out) > 300


@pytest.mark.parametrize("name", command_names())
def test_its_examples_can_be_typed(convoy, name):
    _, out, _ = convoy(name, "--help")
    command = cli.cli.get_command(click.Context(cli.cli), name)
    examples = re.findall(
        rf"^ .*\bconvoy {name} ?(.*)", out.partition("Examples:")[2].partition("Options:")[0], re.MULTILINE
    )
    assert examples
    for example in examples:
        command.make_context(
            name, shlex.split(example.partition(" > ")[0], comments=True)
        )  # raises for what it does not take


def test_help_lists_every_command_and_every_exit_code(convoy):
    code, out, _ = convoy("--help")

    assert code == 0
    assert all(name in out for name in [*command_names(), "Exit codes", "wrong flags or settings", "75", "130"])


@pytest.mark.parametrize(("typed", "advice"), [("classfy", "Did you mean 'classify'?"), ("xyzzy", "'xyzzy'.")])
def test_a_misspelt_command_is_told_its_name(convoy, typed, advice):
    code, _, err = convoy(typed, "image.jpg")

    assert code == 2
    assert err.rstrip().endswith(advice)


def test_the_version_is_told(convoy):
    code, out, _ = convoy("--version")

    assert (code, out.split()[0]) == (0, "convoy,")


def test_serve_offers_every_setting_as_a_flag(convoy):
    _, out, _ = convoy("serve", "--help")

    for flag in ("--repository", "--port", "--http-port", "--max-batch-size", "--drain-timeout-s", "--log-format"):
        assert flag in out


def test_help_loads_nothing_heavy():
    script = """
        import sys
        from service import cli
        try:
            cli.cli.main(["--help"])
        except SystemExit:
            pass
        heavy = {"torch", "onnx", "onnxruntime", "grpc", "numpy", "PIL", "sklearn"} & set(sys.modules)
        sys.exit(f"loaded: {heavy}" if heavy else 0)
    """
    done = run_script(script)

    assert done.returncode == 0, done.stderr


def run_script(script, *arguments, env=None, **options):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script), *map(str, arguments)],
        cwd=toys.ROOT,
        env=toys.environment(env),
        capture_output=True,
        text=True,
        timeout=toys.TIMEOUT_S,
        check=False,
        **options,
    )


# --- classify


def test_files_are_classified_in_the_order_given(convoy, served, pictures):
    code, out, _ = convoy(
        "classify", pictures / "b.PNG", pictures / "a.png", "--server", served, "--model", "grey", "--top-k", 2
    )

    assert code == 0
    lines = out.splitlines()
    assert [lines[0], lines[3]] == [str(pictures / "b.PNG"), str(pictures / "a.png")]
    assert lines[1].endswith("level 20")
    assert lines[4].endswith("level 10")
    assert len(lines) == 6


def test_a_folder_gives_every_image_below_it(convoy, served, pictures):
    code, out, _ = convoy("classify", pictures, "--server", served, "--model", "grey", "--json", "--top-k", 1)

    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["file"], row["classes"][0]["label"]) for row in rows] == [
        (str(pictures / "a.png"), "level 10"),
        (str(pictures / "b.PNG"), "level 20"),
        (str(pictures / "deep" / "c.png"), "level 30"),
    ]


def test_json_has_file_and_classes_with_index_label_and_score(convoy, served, pictures):
    _, out, _ = convoy("classify", pictures / "a.png", "--server", served, "--model", "grey", "--json", "--top-k", 3)

    row = json.loads(out)
    assert set(row) == {"file", "classes"}
    assert [list(entry) for entry in row["classes"]] == [["index", "label", "score"]] * 3
    assert row["classes"][0]["index"] == 10
    assert 1 >= row["classes"][0]["score"] > row["classes"][1]["score"] > 0


def test_index_zero_is_spelled_out_in_json(convoy, served, tmp_path):
    (tmp_path / "black.png").write_bytes(toys.grey_png(0))
    _, out, _ = convoy("classify", tmp_path / "black.png", "--server", served, "--model", "grey", "--json")

    assert json.loads(out)["classes"][0]["index"] == 0


def test_a_dash_reads_standard_input(convoy, served):
    code, out, _ = convoy(
        "classify", "-", "--server", served, "--model", "grey", "--json", "--top-k", 1, stdin=toys.grey_png(99)
    )

    assert (code, json.loads(out)["classes"][0]["label"]) == (0, "level 99")


def test_the_server_can_be_named_by_the_environment(convoy, served, pictures, monkeypatch):
    monkeypatch.setenv("CONVOY_SERVER", served)

    assert convoy("classify", pictures / "a.png", "--model", "grey")[0] == 0


def test_nothing_above_the_minimum_score_is_no_failure(convoy, served, pictures):
    code, out, _ = convoy("classify", pictures / "a.png", "--server", served, "--model", "grey", "--min-score", 0.99)

    assert code == 0
    assert "no class above the minimum score" in out


def test_more_images_than_fit_into_a_request_are_all_answered(convoy, served, tmp_path):
    for level in range(40):
        (tmp_path / f"{level:03d}.png").write_bytes(toys.grey_png(level))
    code, out, _ = convoy("classify", tmp_path, "--server", served, "--model", "grey", "--json", "--top-k", 1)

    assert code == 0
    assert [json.loads(line)["classes"][0]["index"] for line in out.splitlines()] == list(range(40))


@pytest.mark.parametrize("limit", [{"CONVOY_MAX_IMAGES_PER_REQUEST": "3"}, {"CONVOY_MAX_MESSAGE_BYTES": "4096"}])
def test_a_server_that_allows_less_in_a_request_gets_less(convoy, tmp_path, limit):
    toys.write_version(tmp_path / "models", "grey", classes=256)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for level in range(20):
        (pictures / f"{level:03d}.bmp").write_bytes(toys.encoded(Image.new("L", (24, 24), level), "BMP"))
    with toys.serve_process(tmp_path / "models", env=limit) as (_, report):
        code, out, _ = convoy("classify", pictures, "--server", report["grpc"], "--json", "--top-k", 1)

    assert code == 0
    assert [json.loads(line)["classes"][0]["index"] for line in out.splitlines()] == list(range(20))


def test_an_image_that_is_too_large_alone_is_named_and_the_others_answered(convoy, tmp_path):
    toys.write_version(tmp_path / "models", "grey", classes=256)
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for level in range(6):
        side = 80 if level == 4 else 24
        (pictures / f"{level}.bmp").write_bytes(toys.encoded(Image.new("L", (side, side), level), "BMP"))
    with toys.serve_process(tmp_path / "models", env={"CONVOY_MAX_MESSAGE_BYTES": "4096"}) as (_, report):
        code, out, err = convoy("classify", pictures, "--server", report["grpc"], "--json", "--top-k", 1)

    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 6
    assert [row["classes"][0]["index"] if "classes" in row else row["error"]["reason"] for row in rows] == [
        0, 1, 2, 3, "TOO_LARGE", 5,
    ]  # fmt: skip
    assert only_line(err) == "convoy: 1 of 6 images could not be classified"


def test_one_bad_image_among_good_ones_is_partial(convoy, served, pictures):
    (pictures / "bad.jpg").write_text("I am a text file")
    code, out, err = convoy("classify", pictures, "--server", served, "--model", "grey")

    assert code == 6
    assert "cannot be used: This is not an image" in out
    assert "level 30" in out
    assert only_line(err) == "convoy: 1 of 4 images could not be classified"


@pytest.mark.parametrize("count", [1, 3, 20])
def test_only_bad_images_are_named_one_by_one(convoy, served, tmp_path, count):
    for n in range(count):
        (tmp_path / f"{n:02d}.jpg").write_text("I am a text file" if n % 2 else "")
    code, out, err = convoy("classify", tmp_path, "--server", served, "--model", "grey", "--json")

    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 3
    assert len(rows) == count
    assert all(row["error"]["message"] for row in rows)
    assert [row["error"]["reason"] for row in rows] == [("EMPTY", "UNSUPPORTED_FORMAT")[n % 2] for n in range(count)]
    assert "could" in only_line(err)


def test_of_a_folder_hidden_files_are_no_images_and_formats_that_are_not_read_are_told(convoy, served, pictures):
    for name in (".hidden.png", "._a.png", "IMG_1.HEIC", "scan.tiff", "notes.txt"):
        (pictures / name).write_text("no image")
    code, out, err = convoy("classify", pictures, "--server", served, "--model", "grey", "--json")

    assert code == 0
    assert len(out.splitlines()) == 3
    assert only_line(err).endswith("IMG_1.HEIC and 1 more, in formats that are not read; save as JPEG or PNG")


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["classify"], 2, "IMAGE"),
        (["classify", "x.png", "--top-k", "0"], 2, "top-k"),
        (["classify", "x.png", "--min-score", "2"], 2, "min-score"),
        (["nonsense"], 2, "nonsense"),
        (["serve", "--port", "eighty"], 2, "eighty"),
        (["serve", "--port", "99999"], 2, "port"),
        (["serve", "--config", "/nowhere.yaml"], 2, "/nowhere.yaml does not exist"),
        (["serve", "--repository", "/nowhere", "--port", "0", "--http-port", "0"], 2, "/nowhere does not exist"),
        (["inspect", "/nowhere"], 2, "/nowhere"),
        (["classify", "/nowhere.png"], 3, "/nowhere.png does not exist"),
        (["classify", "x.png", "--version", str(2**63)], 2, "--version"),
        (["classify", "x.png", "--top-k", str(2**32)], 2, "--top-k"),
        (["classify", __file__, "--tls-ca", __file__], 2, "expected PEM"),
        (["route", "pets", "--traffic", f"{2**63}=1", "--admin", NOBODY], 2, "version=weight"),
        (["serve", "--max-connection-age-s", "inf"], 2, "max_connection_age_s"),
        (["route", "pets", "--traffic", "1=10,1=20", "--admin", NOBODY], 2, "a version is there twice"),
        (
            ["classify", __file__, "--server", NOBODY],
            4,
            "no server answers at 127.0.0.1:1 (Connection refused); start one with `convoy serve`",
        ),
        (["classify", __file__, "--server", "localhost"], 4, "(give its port, as in localhost:8500)"),
        (["load", "caf\udce9", "--admin", NOBODY], 4, NOBODY),
        (["classify", __file__, "--server", "\udcff:1"], 2, "an argument is not in UTF-8: '\\udcff:1'"),
    ],
    ids=lambda value: " ".join(map(str, value)) if isinstance(value, list) else "",
)
def test_what_goes_wrong_ends_with_its_code_and_says_why(convoy, arguments, code, words):
    found, _, err = convoy(*arguments)

    assert found == code
    assert words in err
    assert "Traceback" not in err


def test_a_name_that_is_not_in_utf8_is_an_error_of_usage(convoy, served, pictures):
    code, _, err = convoy("classify", pictures / "a.png", "--server", served, "--model", "gr\udce9y")

    assert code == 2
    assert "not in UTF-8" in only_line(err)


def test_a_folder_without_images_says_which_formats_count(convoy, tmp_path):
    code, _, err = convoy("classify", tmp_path, "--server", NOBODY)

    assert code == 3
    assert ".jpg" in only_line(err)


@pytest.mark.parametrize("model", ["nope", ""])
def test_an_unknown_model_is_refused_with_those_that_there_are(convoy, served, pictures, model):
    code, _, err = convoy("classify", pictures / "a.png", "--server", served, "--model", model)

    assert code == 5
    assert "NOT_FOUND" in only_line(err)
    assert "coarse, grey" in err


def test_models_are_listed(convoy, served):
    code, out, _ = convoy("models", "--server", served, "--json")

    rows = [json.loads(line) for line in out.splitlines()]
    assert code == 0
    assert [(row["name"], row["version"], row["state"], row["num_classes"]) for row in rows] == [
        ("coarse", 1, "READY", 2),
        ("grey", 1, "READY", 256),
    ]


def test_a_table_in_a_pipe_is_not_cut(convoy, served):
    _, out, _ = convoy("models", "--server", served)

    assert [line.count("CPUExecutionProvider") for line in out.splitlines() if "READY" in line] == [1, 1]
    assert "…" not in out


def test_inspect_shows_and_verifies_a_version(convoy, tmp_path):
    version = toys.write_version(tmp_path)
    code, out, _ = convoy("inspect", version)
    assert (code, "grey version 1" in out, "passed" in out) == (0, True, True)
    assert json.loads(convoy("inspect", version, "--json")[1])["name"] == "grey"
    (version / "model.onnx").write_bytes(b"damaged")
    code, _, err = convoy("inspect", version)

    assert code == 3
    assert "model.onnx does not match" in only_line(err)


# --- settings


def test_flags_win_over_environment_over_file(convoy, monkeypatch, tmp_path):
    config = tmp_path / "convoy.yaml"
    config.write_text("repository: /from-file\nport: 0\nhttp_port: 0\n")
    seen = []
    for arguments, variable in (([], None), ([], "/from-env"), (["--repository", "/from-flag"], "/from-env")):
        if variable:
            monkeypatch.setenv("CONVOY_REPOSITORY", variable)
        seen.append(convoy("serve", "--config", config, *arguments)[2])

    assert ["/from-file" in seen[0], "/from-env" in seen[1], "/from-flag" in seen[2]] == [True] * 3


# --- the edges of the process


def test_without_the_training_extra_train_says_what_to_install():
    script = """
        import sys
        from importlib.machinery import PathFinder

        class Service:
            '''Finds what is installed with the service, as if the extra were not.'''
            find_distributions = PathFinder.find_distributions

            @staticmethod
            def find_spec(name, path=None, target=None):
                extra = {"torch", "onnx", "onnxscript", "sklearn", "safetensors", "matplotlib"}
                return None if name.partition(".")[0] in extra else PathFinder.find_spec(name, path, target)

        sys.meta_path[:] = [finder for finder in sys.meta_path if finder is not PathFinder] + [Service]
        sys.argv = ["convoy", *sys.argv[1:]]
        from service.cli import main
        main()
    """
    done = run_script(script, "train", "photos")
    helped = run_script(script, "--help")

    assert done.returncode == 2
    assert "pip install '.[training]'" in only_line(done.stderr)
    assert (helped.returncode, "train" in helped.stdout) == (0, True)


def test_a_fault_of_the_program_ends_with_one_and_shows_where(tmp_path):
    """A command that joins by the entry-point group and breaks."""
    (tmp_path / "broken_command.py").write_text(
        "import click\n@click.command()\ndef broken():\n    raise ZeroDivisionError('by a bug')\n"
    )
    info = tmp_path / "broken-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: broken\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[convoy.commands]\nbroken = broken_command:broken\n")
    script = """
        import sys
        sys.path.insert(0, sys.argv[1])
        sys.argv = ["convoy", "broken"]
        from service.cli import main
        main()
    """
    done = run_script(script, tmp_path)

    assert done.returncode == 1
    assert "ZeroDivisionError: by a bug" in done.stderr


def test_a_reader_that_stops_reading_is_no_error(served, tmp_path):
    for n in range(64):
        (tmp_path / f"{n:02d}.png").write_bytes(toys.grey_png(n))
    command = [sys.executable, "-m", "service", "classify", tmp_path, "--server", served, "--model", "grey", "--json"]
    process = subprocess.Popen(
        [*map(str, command), "--top-k", "256"],
        cwd=toys.ROOT,
        env=toys.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.read(10)
    process.stdout.close()
    error = process.stderr.read().decode()
    process.stderr.close()

    assert (process.wait(toys.TIMEOUT_S), error) == (0, "")


def test_ctrl_c_ends_with_130_and_no_traceback(tmp_path):
    (tmp_path / "a.png").write_bytes(toys.grey_png(0))
    with socket.create_server(("127.0.0.1", 0)) as silent:
        silent.settimeout(toys.TIMEOUT_S)
        target = f"127.0.0.1:{silent.getsockname()[1]}"
        process = toys.Process("classify", tmp_path, "--server", target)
        connection, _ = silent.accept()
        assert connection.recv(3) == b"PRI"  # it has said hello, and waits
        process.signal(signal.SIGINT)
        code, error = process.ended()
        connection.close()

    assert code == 130
    assert "Traceback" not in error
