"""The import rules of docs/architecture.md, checked on the source."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# Lower packages know nothing of the ones above them.
LAYERS = [
    {"cli", "__main__"},
    {"daemon", "demo", "ask", "doctor", "bench", "tune"}
    | {"bundle_command", "cache_command", "feedback_command", "install_command", "verify_command"},
    {"updating", "store_start"},
    {"node"},
    {"local_broker", "installation"},
    {"unit_files"},
    {"mqtt", "serving"},
    {"cache", "engine", "domain"},
    {"bundle", "device"},
    {"config", "errors", "logs", "metrics", "notify", "arguments"},
]
WORKSTATION_ONLY = {"export", "torch", "transformers", "optimum", "onnx", "gguf", "safetensors"}


def modules() -> list[Path]:
    return sorted((ROOT / "edge_llm").rglob("*.py"))


def imports(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: write absolute imports"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def layer_of(name: str) -> int | None:
    return next((index for index, layer in enumerate(LAYERS) if name in layer), None)


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_the_device_side_never_imports_the_workstation_side(path):
    assert not {name.split(".")[0] for name in imports(path)} & WORKSTATION_ONLY


@pytest.mark.parametrize("path", modules(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_one_way(path):
    own = path.relative_to(ROOT / "edge_llm").parts[0].removesuffix(".py")
    if own == "__init__":
        return
    own_layer = layer_of(own)
    assert own_layer is not None, f"{own} has no layer: add it to LAYERS and docs/architecture.md"
    for name in imports(path):
        parts = name.split(".")
        if parts[0] != "edge_llm" or len(parts) < 2:
            continue
        other = layer_of(parts[1])
        assert other is None or other >= own_layer, f"{own} imports {name}, which is above it"
