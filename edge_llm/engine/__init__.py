"""Token ids to token ids: the static KV cache, the ONNX Runtime session, sampling and text at the edge."""
