"""Where settings come from, which source wins, and that a wrong one says which it is."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from service.errors import ConfigurationError
from service.settings import MIB, Settings, load, mistyped


@pytest.fixture(autouse=True)
def _no_settings_of_the_caller(monkeypatch):
    for name in Settings.model_fields:
        monkeypatch.delenv(f"CONVOY_{name.upper()}", raising=False)


@pytest.fixture
def file(tmp_path):
    def write(text):
        path = tmp_path / "convoy.yaml"
        path.write_text(text)
        return path

    return write


def test_the_defaults_stand_without_any_source():
    settings = load()

    assert (settings.port, settings.http_port, settings.max_message_bytes) == (8500, 8501, 32 * MIB)
    assert settings.host == "127.0.0.1"


def test_flags_win_over_environment_over_file(file, monkeypatch):
    config = file("port: 1\nhttp_port: 1\nmax_batch_size: 1\n")
    monkeypatch.setenv("CONVOY_PORT", "2")
    monkeypatch.setenv("CONVOY_HTTP_PORT", "2")

    settings = load(config, {"port": 3})

    assert (settings.port, settings.http_port, settings.max_batch_size) == (3, 2, 1)


def test_settings_do_not_change_after_the_start():
    with pytest.raises(ValueError, match="frozen"):
        load().port = 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"port": 70000}, "port"),
        ({"max_batch_size": 0}, "max_batch_size"),
        ({"log_level": "chatty"}, "log_level"),
        ({"default_deadline_ms": 90_000}, "default_deadline_ms"),
        ({"max_images_per_request": 5000}, "max_images_per_request"),
        ({"max_message_bytes": 600 * MIB}, "max_message_bytes"),
        ({"port": "eighty"}, "eighty"),
        ({"no_such_setting": 1}, "no_such_setting"),
        ({"max_connection_age_s": math.inf}, "max_connection_age_s"),
        ({"drain_delay_s": math.nan}, "drain_delay_s"),
        ({"drain_timeout_s": 3e6}, "drain_timeout_s"),
        ({"cpu_batch_ms": math.inf}, "cpu_batch_ms"),
        ({"max_calls_per_connection": 5_000_000_000}, "max_calls_per_connection"),
        ({"providers": None}, "providers"),
        ({"models": 3}, "models"),
        ({"provider_options": {"cpu": {"use_arena": "1"}}}, "cpu has no options"),
    ],
)
def test_a_wrong_value_names_its_setting_in_one_line(flags, words):
    with pytest.raises(ConfigurationError, match=words) as caught:
        load(flags=flags)

    assert "\n" not in str(caught.value)


def test_variables_that_look_like_settings_are_named_with_what_they_meant():
    environment = {
        "CONVOY_MAX_BATCHSIZE": "8",
        "convoy_log_levle": "debug",
        "CONVOY_MAX_BATCH_SIZE": "8",
        "convoy_port": "1",
        # Of other commands, of the tests, of Kubernetes for a service named convoy; and of another program.
        "CONVOY_CONFIG": "x",
        "CONVOY_SERVER": "x",
        "CONVOY_ADMIN": "x",
        "CONVOY_TUNE_STORAGE": "x",
        "CONVOY_REQUIRE_TOOLS": "1",
        "CONVOY_SERVICE_HOST": "10.0.0.1",
        "CONVOY_SERVICE_PORT": "8500",
        "CONVOY_SERVICE_PORT_GRPC": "8500",
        "CONVOY_PORT_8500_TCP_ADDR": "10.0.0.1",
        "BATCHSIZE": "8",
    }

    assert mistyped(environment) == {
        "CONVOY_MAX_BATCHSIZE": "CONVOY_MAX_BATCH_SIZE",
        "convoy_log_levle": "CONVOY_LOG_LEVEL",
    }


def test_every_fault_is_named_at_once():
    with pytest.raises(ConfigurationError, match=r"port.*max_batch_size"):
        load(flags={"port": -1, "max_batch_size": 0})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("port: [1", "convoy.yaml"),
        ("- port", "convoy.yaml"),
        ("just text", "convoy.yaml"),
        ("prot: 1", "prot"),
        ("port: many", "port"),
        ("model_settings: {a: {executors: 1}, a: {variant: fp32}}", "a occurs twice"),
    ],
)
def test_a_file_that_cannot_be_used_is_named(file, text, words):
    with pytest.raises(ConfigurationError, match=words):
        load(file(text))


@pytest.mark.parametrize(
    ("own", "words"),
    [
        ("versions: frist", "version policy"),
        ("traffic: {1: .inf, 2: 1}", "finite sum"),
        ("traffic: {1: 0}", "above 0"),
        ("providers: {cpu: 1}", "providers"),
    ],
)
def test_a_model_s_wrong_settings_are_named(file, own, words):
    with pytest.raises(ConfigurationError, match=rf"^wrong settings .*: model_settings\.pets(?!.*alue error).*{words}"):
        load(file(f"model_settings: {{pets: {{{own}}}}}"))


def test_a_single_version_and_a_single_provider_need_no_quotes(file):
    own = load(file("model_settings: {pets: {versions: 3, providers: 'cuda, cpu'}}")).model_settings["pets"]

    assert (own.versions, own.providers) == ("3", ("cuda", "cpu"))


def test_what_a_merge_key_brings_occurs_once(file):
    models = "{a: &a {executors: 1, variant: fp32}, b: &b {<<: *a, executors: 2}, c: {<<: [*b, *a], executors: 3}}"
    own = load(file(f"model_settings: {models}")).model_settings

    assert {name: (each.executors, each.variant) for name, each in own.items()} == {
        "a": (1, "fp32"), "b": (2, "fp32"), "c": (3, "fp32"),
    }  # fmt: skip


def test_an_empty_file_is_no_fault(file):
    assert load(file("")).port == 8500


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigurationError, match=r"nowhere\.yaml does not exist"):
        load(tmp_path / "nowhere.yaml")


@pytest.mark.parametrize("text", ["digits,pets", " digits , pets ,", "digits"])
def test_models_are_names_separated_by_commas(monkeypatch, text):
    monkeypatch.setenv("CONVOY_MODELS", text)

    assert load().models == tuple(name for name in ("digits", "pets") if name in text)


def test_an_environment_value_of_the_wrong_kind_does_not_blame_the_file(monkeypatch):
    monkeypatch.setenv("CONVOY_MODEL_SETTINGS", "not json")

    with pytest.raises(ConfigurationError) as caught:
        load()

    assert "file None" not in str(caught.value)


def test_variables_that_are_no_settings_are_left_alone(monkeypatch):
    monkeypatch.setenv("CONVOY_SERVER", "gpu-box:8500")
    monkeypatch.setenv("CONVOY_CONFIG", "elsewhere.yaml")

    assert load().port == 8500


@given(port=st.integers(0, 65535), batch=st.integers(1, 1024), deadline=st.integers(1, 60_000))
def test_what_is_within_the_bounds_is_taken_as_it_is(port, batch, deadline):
    settings = load(flags={"port": port, "max_batch_size": batch, "default_deadline_ms": deadline})

    assert (settings.port, settings.max_batch_size, settings.default_deadline_ms) == (port, batch, deadline)


def test_every_setting_is_described():
    assert [name for name, field in Settings.model_fields.items() if not field.description] == []
