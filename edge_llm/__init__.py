"""edge_llm: a language model that answers in milliseconds on the device itself."""

__version__ = "0.1.0"
