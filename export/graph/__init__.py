"""ONNX graphs, node by node."""
