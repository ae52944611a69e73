"""edge_llm: a language model that answers in milliseconds on the device itself."""

import os

__version__ = "0.1.0"

# Nothing leaves the device: onnxruntime's Linux wheels (1.31) keep a device id and report usage to their maker, unless
# this is set before the library is loaded.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
