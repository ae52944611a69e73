"""What needs the workstation's packages is left out where they are not installed (`make test-oldest`)."""

from __future__ import annotations

import importlib.util

# They make and sign bundles.
collect_ignore = [] if importlib.util.find_spec("onnx") else ["test_graph_guard.py", "test_signature.py"]
