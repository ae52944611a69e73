"""Damaged and hostile bundles whose hashes are right: refused by a typed error, never by a crash or a hang.

Every test prints how many inputs it has tried (``pytest -s``).
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_llm.bundle.graph_guard import check_graph_file
from edge_llm.bundle.manifest import TOKENIZER_FILE, Bundle, decode_manifest
from edge_llm.domain.domain import read_schema
from edge_llm.domain.schema import encode_domain
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.errors import EdgeLlmError, ManifestError
from tests.bundle.sealing import reseal
from tests.domain.pack import SCHEMA
from tests.paths import TINY_BUNDLE

GRAPHS = 150
GRAPHS_TIMEOUT_S = 100
QUICK = settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)


@pytest.fixture
def tried(request) -> Iterator[Counter[str]]:
    """Counts what came of the inputs."""
    counts: Counter[str] = Counter()
    yield counts
    outcomes = ", ".join(f"{count} {outcome}" for outcome, count in counts.most_common())
    print(f"\n{request.node.name}: {sum(counts.values())} inputs: {outcomes}")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return shutil.copytree(TINY_BUNDLE, tmp_path / "bundle")


def note(tried: Counter[str], attempt: Callable[[], object]) -> None:
    """Run it; only errors of ours are allowed."""
    try:
        attempt()
    except EdgeLlmError as error:
        tried[type(error).__name__] += 1
    else:
        tried["fine"] += 1


@st.composite
def damaged(draw: st.DrawFn, raw: bytes) -> bytes:
    """Bytes replaced, left out, put in or repeated, or the end cut off."""
    changed = bytearray(raw)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, max(0, len(changed) - 1)))
        length = draw(st.integers(0, 40))
        piece = draw(st.one_of(st.binary(max_size=4), st.just(bytes(changed[at : at + length]) * 2)))
        changed[at : at + length] = piece
    return bytes(changed[: draw(st.one_of(st.just(len(changed)), st.integers(0, len(changed))))])


# Anything that JSON can say, in place of what was said.
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20) | st.just(10**400),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=8), children, max_size=3),
    max_leaves=6,
)


@st.composite
def restated(draw: st.DrawFn, raw: bytes) -> bytes:
    """The same JSON with some of its values replaced, left out or repeated: nearly right, which reaches deeper."""
    tree = json.loads(raw)
    for _ in range(draw(st.integers(1, 3))):
        node = tree
        while True:
            if not isinstance(node, dict | list) or not node:
                break
            key = draw(st.sampled_from(list(node) if isinstance(node, dict) else list(range(len(node)))))
            if isinstance(node[key], dict | list) and node[key] and draw(st.booleans()):
                node = node[key]
                continue
            how = draw(st.sampled_from(["replace", "remove", "repeat"]))
            if how == "replace":
                node[key] = draw(values)
            elif how == "remove":
                del node[key]
            elif isinstance(node, list):
                node *= 2
            break
    return json.dumps(tree).encode("utf-8", "surrogatepass")


def variants(raw: bytes) -> st.SearchStrategy[bytes]:
    deep = st.sampled_from([b"[" * 100_000, b'{"a":' * 100_000, b'{"format":1,"x":' + b"[" * 50_000])
    return damaged(raw) | restated(raw) | restated(raw) | deep


@QUICK
@given(raw=variants((TINY_BUNDLE / "manifest.json").read_bytes()))
def test_manifests(raw, bundle, tried):
    def open_and_verify() -> None:
        (bundle / "manifest.json").write_bytes(raw)
        opened = Bundle.open(bundle)
        opened.verify()
        for graph in opened.manifest.graphs:
            opened.verified_path(graph.file)

    note(tried, open_and_verify)
    note(tried, lambda: decode_manifest(raw))


@QUICK
@given(raw=variants((TINY_BUNDLE / TOKENIZER_FILE).read_bytes()))
def test_tokenizers(raw, bundle, tried):
    def load_and_use() -> None:
        (bundle / TOKENIZER_FILE).write_bytes(raw)
        reseal(bundle)
        tokenizer = Tokenizer.from_file(Bundle.open(bundle).verified_path(TOKENIZER_FILE))
        tokenizer.decode(tokenizer.encode("How far is it to the coast?"))

    note(tried, load_and_use)


@QUICK
@given(raw=variants(encode_domain(SCHEMA)))
def test_domains(raw, bundle, tried):
    def read() -> None:
        (bundle / "domain.json").write_bytes(raw)
        manifest = json.loads((bundle / "manifest.json").read_bytes()) | {"domain_file": "domain.json"}
        others = [entry for entry in manifest["files"] if entry["path"] != "domain.json"]
        manifest["files"] = [*others, {"path": "domain.json", "size_bytes": 0, "sha256": "0" * 64}]
        (bundle / "manifest.json").write_text(json.dumps(manifest))
        reseal(bundle)
        assert read_schema(Bundle.open(bundle)) is not None

    note(tried, read)


@QUICK
@given(raw=damaged((TINY_BUNDLE / "graphs/cpu-int8/model.onnx").read_bytes()))
def test_the_guard_of_graphs(raw, bundle, tried):
    path = bundle / "model.onnx"
    path.write_bytes(raw)
    note(tried, lambda: check_graph_file(path, "model.onnx.data"))


@pytest.mark.timeout(GRAPHS_TIMEOUT_S + 60)
def test_graphs_in_onnx_runtime(bundle, tried, tmp_path):
    """Loaded and asked in a process of their own, whose end by a signal would be seen here."""
    command = [sys.executable, "-m", "tests.bundle.open_damaged_graphs", str(bundle), "0", str(GRAPHS)]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=GRAPHS_TIMEOUT_S,
        check=False,
        cwd=Path(__file__).parent.parent.parent,
        errors="replace",
    )
    outcomes = re.findall(r"^(\d+) (refused by (\w+)|answers right|the same)", result.stdout, re.MULTILINE)
    assert result.returncode == 0, f"the last was {outcomes[-1:]}: {result.stderr[-2000:]}"
    tried.update(name or what for _, what, name in outcomes)
    assert tried["BundleIntegrityError"]
    assert tried["UnsupportedBundleError"]


def test_a_tokenizer_that_is_no_file_of_ours_is_named(bundle):
    (bundle / TOKENIZER_FILE).write_bytes(b"{}")
    reseal(bundle)
    with pytest.raises(ManifestError, match="is not a tokenizer"):
        Tokenizer.from_file(Bundle.open(bundle).verified_path(TOKENIZER_FILE))
