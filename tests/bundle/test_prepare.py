from __future__ import annotations

import gc
import json
import os
import shutil
import sys
from pathlib import Path

import pytest

from edge_llm.bundle import prepare
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.prepare import CopyInUse, prepared_dir, prepared_graph, remove_copies
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.engine import Engine
from edge_llm.engine.loading import load_model
from edge_llm.engine.runner import Runner
from edge_llm.errors import BundleError, BundleIntegrityError, ProviderError

_SCORE = (
    "import runpy, sys; sys.argv = ['prepare', *sys.argv[3:]]; "
    "runpy.run_module('edge_llm.bundle.prepare', run_name='__main__'); "
    "print(open('/proc/self/oom_score_adj').read())"
)
TINY = Path(__file__).parent.parent / "data" / "tiny_bundle"


@pytest.fixture
def bundle(tmp_path):
    return Bundle.open(shutil.copytree(TINY, tmp_path / "bundle"))


@pytest.fixture
def builds(monkeypatch):
    """Counts how often a copy was built."""
    built = []
    original = prepare._build
    monkeypatch.setattr(prepare, "_build", lambda *args: (built.append(args), original(*args)))
    return built


def tokens(graph: Path, bundle: Bundle) -> list[int]:
    engine = Engine(Runner(graph, bundle.manifest.model, threads=1), [])
    return list(engine.generate(bundle.manifest.expectation.prompt_token_ids, max_tokens=16))


def test_the_copy_answers_as_the_bundle_does(bundle, tmp_path):
    graph = bundle.manifest.graph("cpu-int8")
    copy = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert tokens(copy, bundle) == tokens(bundle.path / graph.file, bundle)


def test_it_is_built_once(bundle, tmp_path, builds):
    first = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert prepared_graph(bundle, "cpu-int8", tmp_path / "cache") == first
    assert len(builds) == 1
    assert not list((tmp_path / "cache" / "prepared").glob(".building-*"))


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove", "seal"])
def test_a_damaged_copy_is_built_anew(bundle, tmp_path, builds, damage):
    copy = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    data = copy.parent / prepare.DATA_FILE
    before = data.read_bytes()
    if damage == "flip":
        data.write_bytes(bytes([before[0] ^ 1]) + before[1:])
    elif damage == "truncate":
        data.write_bytes(before[:-10])
    elif damage == "remove":
        data.unlink()
    else:
        (copy.parent / prepare.SEAL_FILE).write_bytes(b"{}")
    assert prepared_graph(bundle, "cpu-int8", tmp_path / "cache") == copy
    assert len(builds) == 2
    assert tokens(copy, bundle) == list(bundle.manifest.expectation.token_ids)


@pytest.mark.parametrize("change", ["cpu_features", "onnxruntime", "bundle"])
def test_a_stale_copy_is_replaced(bundle, tmp_path, builds, monkeypatch, change):
    old = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    if change == "cpu_features":
        monkeypatch.setattr(prepare, "cpu_features", lambda: "another processor")
    elif change == "onnxruntime":
        monkeypatch.setattr(prepare.ort, "__version__", "99.0")
    else:
        bundle = Bundle(bundle.path, bundle.manifest, "0" * 64)
    new = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert new.parent != old.parent
    assert len(builds) == 2


def test_one_earlier_copy_is_kept_to_go_back_to(bundle, tmp_path):
    copies = [
        prepared_graph(Bundle(bundle.path, bundle.manifest, digit * 64), "cpu-int8", tmp_path / "cache")
        for digit in "123"
    ]
    assert [copy.exists() for copy in copies] == [False, True, True]


@pytest.fixture
def prepare_as(bundle, tmp_path):
    """Prepares the bundle as if its digest were a digit many times."""
    return lambda digit: prepared_graph(
        Bundle(bundle.path, bundle.manifest, digit * 64), "cpu-int8", tmp_path / "cache"
    )


def test_the_last_one_used_is_the_one_that_is_kept(prepare_as):
    copies = [prepare_as(digit) for digit in "12"]
    for copy, used_at_s in zip(copies, (100, 200), strict=True):
        os.utime(copy.parent, (used_at_s, used_at_s))
    prepare_as("1")
    prepare_as("3")
    assert [copy.exists() for copy in copies] == [True, False]


def test_a_copy_in_use_is_the_one_that_is_kept(prepare_as):
    served = prepare_as("1")
    # By another process, as far as the lock can tell: one descriptor of a file knows nothing of the other.
    in_use = CopyInUse(served)
    second = prepare_as("2")
    third = prepare_as("3")
    assert [copy.exists() for copy in (served, second, third)] == [True, False, True]
    del in_use
    prepare_as("4")
    assert [copy.exists() for copy in (served, third)] == [False, True]


def test_a_loaded_model_keeps_its_copy(bundle, tmp_path, prepare_as):
    config = Config(cache_dir=str(tmp_path / "cache"), engine=EngineConfig(threads=1, slots=1))
    model = load_model(bundle, config)
    (served,) = prepared_dir(tmp_path / "cache").iterdir()
    for digit in "12":
        prepare_as(digit)
    assert model.prepared
    assert served.exists()
    assert remove_copies(prepared_dir(tmp_path / "cache"), bundle.digest) == 0
    del model
    gc.collect()
    assert remove_copies(prepared_dir(tmp_path / "cache"), bundle.digest) == 1


def test_the_copies_of_one_bundle_are_removed_and_no_others(bundle, tmp_path, monkeypatch):
    folder = prepared_dir(tmp_path / "cache")
    assert remove_copies(folder, bundle.digest) == 0
    other = prepared_graph(Bundle(bundle.path, bundle.manifest, "0" * 64), "cpu-int8", tmp_path / "cache")
    copies = [prepared_graph(bundle, target, tmp_path / "cache") for target in ("cpu-int8", "cpu-fp32")]
    (folder / "damaged").mkdir()
    (folder / "damaged" / prepare.SEAL_FILE).write_bytes(b"{")
    (folder / "a file").touch()
    assert remove_copies(folder, bundle.digest) == 2
    assert [copy.exists() for copy in (other, *copies)] == [True, False, False]


def test_a_seal_without_a_digest_is_still_good(bundle, tmp_path, builds):
    copy = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    seal = json.loads((copy.parent / prepare.SEAL_FILE).read_text())
    del seal["digest"]
    (copy.parent / prepare.SEAL_FILE).write_text(json.dumps(seal))
    assert prepared_graph(bundle, "cpu-int8", tmp_path / "cache") == copy
    assert len(builds) == 1


def test_a_folder_that_vanishes_meanwhile_does_not_matter(bundle, tmp_path):
    prepared = tmp_path / "cache" / "prepared"
    prepared.mkdir(parents=True)
    (prepared / ".building-gone").symlink_to(tmp_path / "nowhere")  # its stat() fails
    assert prepared_graph(bundle, "cpu-int8", tmp_path / "cache").exists()


def test_copies_of_other_bundles_and_targets_stay(bundle, tmp_path):
    int8 = prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    fp32 = prepared_graph(bundle, "cpu-fp32", tmp_path / "cache")
    assert int8.exists()
    assert fp32.exists()


def test_a_tampered_bundle_is_refused(bundle, tmp_path):
    data = bundle.path / "graphs" / "cpu-int8" / "model.onnx.data"
    data.write_bytes(data.read_bytes()[::-1])
    with pytest.raises(BundleIntegrityError):
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert not list((tmp_path / "cache").rglob("*.onnx"))


def test_a_cache_folder_that_cannot_be_written_is_an_error_that_says_so(bundle, tmp_path):
    (tmp_path / "cache").write_text("a file where a folder should be")
    with pytest.raises(BundleError, match="cannot be written"):
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")


def test_a_full_disk_is_said_before_anything_is_built(bundle, tmp_path, monkeypatch, builds):
    usage = prepare.shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(prepare.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(BundleError, match=r"no space for the prepared copy in .*: it needs 1 MB, 0 MB are free"):
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_failing_build_says_why_and_leaves_nothing(bundle, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.sys, "executable", "/bin/false")
    with pytest.raises(BundleError, match="could not be built"):
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


@pytest.fixture
def packs_with(tmp_path, monkeypatch):
    """Makes the packing process run a script of shell in place of Python."""

    def use(script: str) -> None:
        program = tmp_path / "python"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        monkeypatch.setattr(prepare.sys, "executable", str(program))

    return use


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("SEGV", r"onnxruntime \S+ was ended by SIGSEGV\. Export it again, or try another"),
        ("ABRT", r"was ended by SIGABRT\. Export it again"),
        ("KILL", r"was ended by SIGKILL, as the kernel does when memory runs out\. Free memory"),
        ("40", r"was ended by signal 40\. Export"),
    ],
)
def test_a_graph_that_crashes_the_packing_process_is_refused(bundle, tmp_path, packs_with, name, hint):
    packs_with(f"kill -{name} $$")
    with pytest.raises(ProviderError, match=rf"cpu-int8/model\.onnx is not used: .*{hint}"):
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_graph_that_packing_does_not_end_with_is_refused(bundle, tmp_path, packs_with, monkeypatch):
    packs_with("exec sleep 60")
    monkeypatch.setattr(prepare, "BUILD_TIMEOUT_S", 0.2)
    with pytest.raises(ProviderError, match=r"packing it did not end within 0\.2 s"):
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert list((tmp_path / "cache" / "prepared").iterdir()) == []


def test_a_build_that_says_why_it_failed_is_not_taken_for_a_crash(bundle, tmp_path, packs_with):
    packs_with("printf 'Traceback\\nOSError: disk full \\377\\n' >&2; exit 1")
    with pytest.raises(BundleError, match="could not be built: OSError: disk full \N{REPLACEMENT CHARACTER}") as raised:
        prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert not isinstance(raised.value, ProviderError)


def test_packing_is_what_the_kernel_ends_when_memory_runs_out(bundle, tmp_path, packs_with):
    """Its own score for that is the highest there is, as the real process leaves it behind when it ends."""
    packs_with(f'"{sys.executable}" -c "{_SCORE}" "$@" > "{tmp_path}/score"')
    prepared_graph(bundle, "cpu-int8", tmp_path / "cache")
    assert (tmp_path / "score").read_text().strip() == "1000"
