"""TensorRT's engines: built in a process of its own, which a script stands for here, kept, and told of meanwhile."""

from __future__ import annotations

import json
import sys
import threading
import time
from pathlib import Path

import msgspec
import pytest

from edge_llm.bundle import tensorrt_engines
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.tensorrt_engines import Progress, TensorrtEngines
from edge_llm.device.session import TENSORRT, Provider
from edge_llm.errors import ConfigError, ProviderError
from tests.paths import TINY_BUNDLE
from tests.read_provider_options import OPTIONS_FILE

# Compiles as TensorRT does, only faster: an engine for each graph, one after the other, while GO/n is there.
SLOW_BUILDER = """
import json, pathlib, sys, time
request = json.load(sys.stdin)
folder = pathlib.Path(request["options"]["trt_engine_cache_path"])
for number, graph in enumerate(request["graphs"]):
    while not (folder.parent / f"go{number}").exists():
        time.sleep(0.01)
    (folder / f"engine{number}.engine").write_text(graph)
"""
FAILING_BUILDER = "import sys; sys.stderr.write('noise\\nno TensorRT here\\n'); sys.exit(3)"
CRASHING_BUILDER = "import os; os.abort()"
FAST_BUILDER = SLOW_BUILDER.replace("while not", "while False and not")
NO_ENGINES = "import sys; sys.stdin.read()"
OPTIONS = {"trt_fp16_enable": "1", "trt_engine_cache_enable": "1"}


@pytest.fixture
def builder(monkeypatch):
    def set_builder(script: str, progress_s: float = 0.02) -> None:
        monkeypatch.setattr(tensorrt_engines, "_COMMAND", (sys.executable, "-c", script))
        monkeypatch.setattr(tensorrt_engines, "PROGRESS_S", progress_s)

    return set_builder


def engines(cache_dir: Path, options=OPTIONS, *, prefill: str | None = "graphs/cpu-int8/prefill.onnx"):
    bundle = Bundle.open(TINY_BUNDLE)
    # The tiny bundle has no static form: a second graph is only named.
    graph = msgspec.structs.replace(bundle.manifest.graph("cpu-int8"), prefill_file=prefill)
    return TensorrtEngines(bundle, graph, Provider(TENSORRT, options), cache_dir)


def folder_of(one: TensorrtEngines) -> Path:
    return Path(one.provider.options["trt_engine_cache_path"])


def ignore(_progress: Progress) -> None:
    pass


def test_a_slow_build_tells_how_far_it_is(builder, tmp_path):
    builder(SLOW_BUILDER)
    told: list[Progress] = []

    def on_progress(progress: Progress) -> None:
        told.append(progress)
        if len(told) in (5, 10):
            (tmp_path / "tensorrt" / f"go{len(told) // 5 - 1}").touch()

    assert engines(tmp_path).prepare(on_progress)
    assert told[0].elapsed_s < 1
    assert [progress.elapsed_s for progress in told] == sorted(progress.elapsed_s for progress in told)
    assert {progress.graphs for progress in told} == {2}
    assert {progress.engines for progress in told[:5]} == {0}
    assert told[-1].engines >= 1


def test_what_is_kept_is_not_built_again(builder, tmp_path):
    builder(FAST_BUILDER)
    first = engines(tmp_path)
    assert first.prepare(ignore)
    assert sorted(path.name for path in folder_of(first).iterdir()) == [
        "engine0.engine",
        "engine1.engine",
        "engines.json",
    ]
    builder(CRASHING_BUILDER)
    assert not engines(tmp_path).prepare(lambda _progress: pytest.fail("built again"))


@pytest.mark.parametrize("damage", ["engine0.engine", "engines.json"])
@pytest.mark.parametrize("how", ["changed", "gone"])
def test_what_is_damaged_is_built_again(builder, tmp_path, damage, how):
    builder(FAST_BUILDER)
    first = engines(tmp_path)
    first.prepare(ignore)
    path = folder_of(first) / damage
    path.write_text("?") if how == "changed" else path.unlink()
    assert engines(tmp_path).prepare(ignore)
    assert not engines(tmp_path).prepare(ignore)


def test_engines_are_kept_apart_by_what_they_depend_on(tmp_path):
    usual = folder_of(engines(tmp_path))
    assert usual.parent == tmp_path / "tensorrt"
    assert folder_of(engines(tmp_path)) == usual
    assert folder_of(engines(tmp_path, {**OPTIONS, "trt_fp16_enable": "0"})) != usual


@pytest.mark.parametrize("name", ["proc/device-tree/compatible", "etc/nv_tegra_release", "proc/driver/nvidia/version"])
def test_engines_of_another_machine_are_not_taken(tmp_path, monkeypatch, name):
    monkeypatch.setattr(tensorrt_engines, "_ROOT", tmp_path)
    folders = {folder_of(engines(tmp_path))}
    (tmp_path / name).parent.mkdir(parents=True)
    for text in ("nvidia,p3767-0003\0nvidia,tegra234\0", "nvidia,p3701-0005\0nvidia,tegra234\0"):
        (tmp_path / name).write_text(text)
        folders |= {folder_of(engines(tmp_path)), folder_of(engines(tmp_path))}
    assert len(folders) == 3


def test_who_comes_while_another_builds_waits_and_takes_the_same(builder, tmp_path):
    builder(SLOW_BUILDER)
    one, other = engines(tmp_path), engines(tmp_path)
    building, told = threading.Event(), []
    built: list[bool] = []
    thread = threading.Thread(target=lambda: built.append(one.prepare(lambda _progress: building.set())))
    thread.start()
    assert building.wait(10)

    def on_progress(progress: Progress) -> None:
        told.append(progress)
        if len(told) == 3:
            for number in range(2):
                (tmp_path / "tensorrt" / f"go{number}").touch()

    assert not other.prepare(on_progress)
    thread.join()
    assert built == [True]
    assert len(told) >= 3
    assert {progress.graphs for progress in told} == {2}
    assert not engines(tmp_path).prepare(ignore)


def test_only_what_was_found_is_discarded_not_what_another_has_built_since(builder, tmp_path):
    builder(FAST_BUILDER)
    engines(tmp_path).prepare(ignore)
    one, other = engines(tmp_path), engines(tmp_path)
    assert not one.discard()
    assert not one.prepare(ignore)
    assert not other.prepare(ignore)
    # Both find that they cannot be loaded; the first builds anew.
    assert one.discard()
    assert one.prepare(ignore)
    assert other.discard()
    assert not other.prepare(ignore)


def test_only_one_older_set_is_kept(builder, tmp_path):
    builder(FAST_BUILDER)
    made = []
    for size in range(4):
        one = engines(tmp_path, {**OPTIONS, "trt_max_workspace_size": str(size)})
        one.prepare(ignore)
        made.append(folder_of(one))
        time.sleep(0.01)  # the time of a folder tells which is the older one
    assert [folder.exists() for folder in made] == [False, False, True, True]


@pytest.mark.parametrize(
    ("script", "message"),
    [
        (FAILING_BUILDER, "its engines could not be built: no TensorRT here"),
        (CRASHING_BUILDER, "the process ended with signal 6"),
    ],
)
def test_a_build_that_fails_is_a_reason_against_the_provider(builder, tmp_path, script, message):
    builder(script)
    one = engines(tmp_path)
    with pytest.raises(ProviderError, match=message):
        one.prepare(ignore)
    assert not folder_of(one).exists()


def test_a_build_that_does_not_end_is_given_up(builder, tmp_path, monkeypatch):
    builder(SLOW_BUILDER)
    monkeypatch.setattr(tensorrt_engines, "BUILD_TIMEOUT_S", 0.1)
    with pytest.raises(ProviderError, match=r"did not end within 0\.2 s"):
        engines(tmp_path).prepare(ignore)


def test_a_stop_does_not_wait_for_the_build(builder, tmp_path):
    builder(SLOW_BUILDER)

    def stop(_progress: Progress) -> None:
        raise KeyboardInterrupt

    one = engines(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        one.prepare(stop)
    assert not folder_of(one).exists()


def test_a_provider_that_makes_no_engine_is_tried_as_it_is(builder, tmp_path):
    builder(NO_ENGINES)
    assert engines(tmp_path).prepare(ignore)
    assert not (folder_of(engines(tmp_path)) / "engines.json").exists()


def test_where_nothing_is_to_be_kept_nothing_is_built_ahead(builder, tmp_path):
    builder(CRASHING_BUILDER)
    assert not engines(tmp_path, {"trt_engine_cache_enable": "0"}).prepare(ignore)


def test_the_processs_own_part_makes_a_session_for_each_graph(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(
        tensorrt_engines, "make_session", lambda path, _options, provider: made.append((path.name, provider))
    )
    request = tmp_path / "request.json"
    request.write_text(json.dumps({"graphs": ["a/decode.onnx", "a/prefill.onnx"], "options": OPTIONS}))
    with request.open() as stream:
        monkeypatch.setattr("sys.stdin", stream)
        assert tensorrt_engines.main() == 0
    provider = Provider(TENSORRT, OPTIONS)
    assert made == [("decode.onnx", provider), ("prefill.onnx", provider)]


def test_the_process_itself_says_why_it_failed(tmp_path, monkeypatch):
    """The real one: this onnxruntime has no TensorRT, or no graph to build from."""
    monkeypatch.setattr(tensorrt_engines, "PROGRESS_S", 0.1)
    one = engines(tmp_path)
    with pytest.raises(ProviderError, match=r"its engines could not be built: onnxruntime .* cannot load .*\.onnx"):
        one.prepare(ignore)


def test_the_options_that_the_program_sets_are_known(tmp_path):
    known = set(json.loads(OPTIONS_FILE.read_text())[TENSORRT])
    assert set(engines(tmp_path).provider.options) <= known


def test_everything_that_is_written_lies_under_the_cache_folder(tmp_path):
    options = engines(tmp_path).provider.options
    assert {options["trt_engine_cache_path"], options["trt_timing_cache_path"]} == {str(folder_of(engines(tmp_path)))}


def test_a_context_model_that_nothing_would_load_is_not_written(tmp_path):
    assert "trt_dump_ep_context_model" not in engines(tmp_path).provider.options
    engines(tmp_path, {"trt_dump_ep_context_model": "0"})
    with pytest.raises(ConfigError, match="trt_dump_ep_context_model: leave it out, a context model would not be used"):
        engines(tmp_path, {"trt_dump_ep_context_model": "1"})


def test_who_is_told_of_a_build_may_prevent_it(builder, tmp_path):
    builder(FAST_BUILDER)

    def refuse(_progress: Progress) -> None:
        raise ProviderError("not now")

    one = engines(tmp_path)
    with pytest.raises(ProviderError, match="not now"):
        one.prepare(refuse)
    assert not folder_of(one).exists()
    assert one.prepare(ignore)


@pytest.mark.parametrize("name", ["trt_engine_cache_path", "trt_timing_cache_path", "trt_ep_context_file_path"])
def test_a_path_in_the_settings_is_refused(tmp_path, name):
    with pytest.raises(ConfigError, match=f"{name}: leave it out, engines are kept under cache_dir"):
        engines(tmp_path, {name: "/somewhere"})


@pytest.mark.parametrize("prefix", ["../up", "a/b", "/root"])
def test_a_prefix_is_a_name(tmp_path, prefix):
    with pytest.raises(ConfigError, match="a name, not a path"):
        engines(tmp_path, {"trt_engine_cache_prefix": prefix})
