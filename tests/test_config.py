from __future__ import annotations

import pytest

from edge_llm.config import Config, load_config
from edge_llm.device.profile import device_layer, device_names
from edge_llm.errors import ConfigError


def write(tmp_path, text: str):
    path = tmp_path / "edge.toml"
    path.write_text(text)
    return path


def test_nothing_set_gives_the_defaults():
    assert load_config() == Config()


def test_each_layer_overrides_the_one_below(tmp_path):
    config = load_config(
        device_layer={"engine": {"slots": 1, "threads": 1, "prefill_chunk": 8}, "mqtt": {"host": "device"}},
        config_file=write(tmp_path, '[engine]\nslots = 2\nthreads = 2\n[mqtt]\nhost = "file"\n'),
        environ={"EDGE_LLM_ENGINE__SLOTS": "3", "EDGE_LLM_MQTT__HOST": "env", "HOME": "/"},
        flags={"mqtt": {"host": "flag"}},
    )
    assert config.engine.prefill_chunk == 8
    assert (config.engine.threads, config.engine.slots, config.mqtt.host) == (2, 3, "flag")


def test_an_environment_list_is_written_with_commas():
    config = load_config(environ={"EDGE_LLM_ENGINE__PROVIDERS": "CUDAExecutionProvider,CPUExecutionProvider"})
    assert config.engine.providers == ("CUDAExecutionProvider", "CPUExecutionProvider")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[engine]\nslot = 2", "unknown field `slot` (at engine)"),
        ('[engine]\nslots = "2"', "Expected `int`, got `str` (at engine.slots)"),
        ("[engine]\nslots = 0", "Expected `int` >= 1 (at engine.slots)"),
        ('[mqtt]\nnode = "a/b"', "(at mqtt.node)"),
        ("surprise = 1", "unknown field `surprise`"),
        ("[engine", "not valid TOML"),
        (f"a = {'[' * 100_000}", "not valid TOML"),
        (f"a = {'9' * 5000}", "not valid TOML"),
        ("[serving]\ndrain_timeout_s = inf", "(at serving.drain_timeout_s)"),
        ("[serving]\nmetrics_interval_s = nan", "(at serving.metrics_interval_s)"),
    ],
)
def test_a_wrong_file_names_itself_and_the_key(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(config_file=path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize(
    ("environ", "message"),
    [
        ({"EDGE_LLM_ENGINE__SLOTS": "many"}, "environment"),
        ({"EDGE_LLM_NONSENSE": "1"}, "unknown field `nonsense`"),
        ({"EDGE_LLM_BUNDLE": "x", "EDGE_LLM_BUNDLE__X": "y"}, "is a setting, not a table"),
    ],
)
def test_a_wrong_variable_is_named(environ, message):
    with pytest.raises(ConfigError, match=message):
        load_config(environ=environ)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"cannot read .*no\.toml"):
        load_config(config_file=tmp_path / "no.toml")


def test_every_device_file_is_valid():
    for name in device_names():
        load_config(device_layer=device_layer(name))


def test_an_unknown_device_lists_the_known_ones():
    with pytest.raises(ConfigError, match="there are: default"):
        device_layer("toaster")


def test_secrets_that_systemd_hands_over_are_used_unless_others_are_named(tmp_path):
    (tmp_path / "mqtt-password").write_text("secret")
    (tmp_path / "mqtt-key").write_text("key")
    environ = {"CREDENTIALS_DIRECTORY": str(tmp_path)}
    mqtt = load_config(environ=environ).mqtt
    assert mqtt.password_file == str(tmp_path / "mqtt-password")
    assert mqtt.tls.key_file == str(tmp_path / "mqtt-key")
    mqtt = load_config(environ=environ, flags={"mqtt": {"password_file": "/mine", "tls": {"enabled": True}}}).mqtt
    assert mqtt.password_file == "/mine"
    assert mqtt.tls.key_file == str(tmp_path / "mqtt-key")


def test_a_secret_that_is_missing_or_blank_is_none(tmp_path):
    (tmp_path / "mqtt-password").write_text("\n")
    assert load_config(environ={"CREDENTIALS_DIRECTORY": str(tmp_path)}) == Config()
