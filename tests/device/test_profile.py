from __future__ import annotations

import json

import pytest

from edge_llm.config import load_config
from edge_llm.device import profile
from edge_llm.device.board import detect_board
from edge_llm.device.profile import device_layer, device_names
from edge_llm.device.session import TENSORRT
from edge_llm.errors import ConfigError
from tests.device.boards import DEVICE_TREES, device_tree
from tests.read_provider_options import OPTIONS_FILE

BOARDS = [
    "default",
    "jetson-agx-orin",
    "jetson-orin-nano",
    "jetson-orin-nx",
    "jetson-thor",
    "raspberry-pi-4",
    "raspberry-pi-5",
    "x86-64",
]


def test_every_board_has_a_file():
    assert device_names() == BOARDS


@pytest.mark.parametrize("name", BOARDS)
def test_a_file_is_valid_and_states_only_differences(name):
    load_config(device_layer=device_layer(name))
    if name == "default":
        return
    default, own = device_layer("default"), profile.read_toml(profile._folder() / f"{name}.toml")
    for table, settings in own.items():
        for key, value in settings.items():
            assert default.get(table, {}).get(key) != value, f"{name}: {table}.{key} is the default's"


@pytest.mark.parametrize("board", DEVICE_TREES)
def test_whatever_is_detected_has_a_file(tmp_path, board):
    assert detect_board(device_tree(tmp_path, board), "aarch64").device in BOARDS


def test_a_raspberry_pi_4_wants_float32_first():
    config = load_config(device_layer=device_layer("raspberry-pi-4"))
    assert config.engine.targets["CPUExecutionProvider"] == ("cpu-fp32", "cpu-int8")


@pytest.mark.parametrize("name", [name for name in BOARDS if name.startswith("jetson")])
def test_a_jetson_falls_back_to_the_processor(name):
    providers = load_config(device_layer=device_layer(name)).engine.providers
    assert providers[-1] == "CPUExecutionProvider"
    assert len(providers) > 1


def test_an_unknown_board_is_refused_with_the_list():
    with pytest.raises(ConfigError, match="there are: default, jetson-agx-orin"):
        device_layer("toaster")


@pytest.mark.parametrize("name", BOARDS)
def test_options_are_those_that_the_provider_has(name):
    known = json.loads(OPTIONS_FILE.read_text())
    for provider, options in load_config(device_layer=device_layer(name)).engine.provider_options.items():
        assert set(options) <= set(known[provider]), f"{name}: not in {known['source']}"


@pytest.mark.parametrize("name", [name for name in BOARDS if name.startswith("jetson")])
def test_a_jetson_keeps_engines_and_timings_by_name(name):
    options = load_config(device_layer=device_layer(name)).engine.provider_options[TENSORRT]
    assert options["trt_engine_cache_enable"] is options["trt_timing_cache_enable"] is True
    assert options["trt_engine_cache_prefix"] == "edge_llm"
