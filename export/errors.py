"""What goes wrong while exporting: ``ExportError`` is the one-line message that the command prints, with status 2."""

from __future__ import annotations

from edge_llm.errors import EdgeLlmError


class ExportError(EdgeLlmError):
    """The export cannot go on. The message says what is wrong and what to do about it, in one line."""
