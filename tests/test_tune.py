from __future__ import annotations

from pathlib import Path

import pytest

from edge_llm import cli
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig, load_config
from edge_llm.device.profile import TUNED_FILE, device_layer, tuned_layer, write_tuned
from edge_llm.errors import ConfigError
from edge_llm.tune import smallest_nearly_best, tune

TINY = Path(__file__).parent / "data" / "tiny_bundle"


def test_it_measures_every_setting_and_chooses_among_them(tmp_path):
    lines = []
    config = Config(cache_dir=str(tmp_path), engine=EngineConfig(threads=7, slots=3))
    tuned = tune(Bundle.open(TINY), config, lines.append)
    assert tuned.threads in tuned.answer_ms
    assert tuned.prefill_chunk in tuned.prefill_ms_per_token
    assert tuned.slots in tuned.tokens_per_s
    assert len(lines) == len(tuned.answer_ms) + len(tuned.prefill_ms_per_token) + len(tuned.tokens_per_s)
    load_config(device_layer={"engine": tuned.settings()})


@pytest.mark.parametrize(
    ("costs", "best"),
    [({1: 10.0, 2: 6.0, 4: 5.9}, 2), ({1: 5.0}, 1), ({1: 5.0, 2: 5.2, 4: 9.0}, 1), ({8: 1.0, 16: 0.5, 32: 0.4}, 32)],
)
def test_the_smallest_that_is_nearly_the_best(costs, best):
    assert smallest_nearly_best(costs, 1.05) == best


def test_what_was_measured_is_laid_over_the_device_file_and_under_the_config(tmp_path, monkeypatch):
    write_tuned(tmp_path, "x86-64", {"threads": 3, "slots": 7}, "a test")
    assert tuned_layer(tmp_path, "x86-64") == {"engine": {"threads": 3, "slots": 7}}
    assert tuned_layer(tmp_path, "raspberry-pi-5") == {}
    (tmp_path / "config.toml").write_text("[engine]\nslots = 2\n")
    args = ["doctor", "--device", "x86-64", "--set", f"cache_dir={tmp_path}", "--config", str(tmp_path / "config.toml")]
    seen = []
    monkeypatch.setattr(cli, "_doctor", lambda parsed: seen.append(cli.settings(parsed)) or 0)
    assert cli.main(args) == 0
    assert (seen[0].engine.threads, seen[0].engine.slots) == (3, 2)
    assert seen[0].cache.max_bytes == device_layer("x86-64")["cache"]["max_bytes"]


def test_nothing_was_measured(tmp_path):
    assert tuned_layer(tmp_path, "x86-64") == {}


def test_a_damaged_file_names_itself(tmp_path):
    (tmp_path / TUNED_FILE).write_text("device = ")
    with pytest.raises(ConfigError, match=r"tuned\.toml is not valid TOML"):
        tuned_layer(tmp_path, "x86-64")


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cannot write"):
        write_tuned(tmp_path / "file", "default", {}, "a test")
