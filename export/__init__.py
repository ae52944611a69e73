"""The workstation side: turns a checkpoint into a bundle that edge_llm serves (``python -m export``)."""

import os

# onnxruntime's Linux wheels (1.31) report usage to their maker unless this is set before the library is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
