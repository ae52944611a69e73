"""``edge-llm serve``: wiring only. Build the parts, start them, wait for a signal, drain, stop."""
