from __future__ import annotations

import pytest

from edge_llm.bundle import shipped
from edge_llm.errors import BundleNotFoundError


def test_in_a_checkout_it_lies_beside_the_package():
    assert (shipped.shipped_bundle() / "manifest.json").is_file()


def test_without_one_the_error_says_what_to_give(monkeypatch, tmp_path):
    monkeypatch.setattr(shipped, "_FOLDERS", (tmp_path,))
    with pytest.raises(BundleNotFoundError, match="no bundle: give --bundle FOLDER"):
        shipped.shipped_bundle()
