"""Distillation: a teacher, a domain pack or a text, and a small GPT-2 that learns from both (docs/export.md)."""
