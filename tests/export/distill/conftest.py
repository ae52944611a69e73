"""One thread for torch: the models are too small to share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from export.distill.corpus import Corpus
from tests.export.distill.tiny_corpus import make_corpus


@pytest.fixture(autouse=True, scope="package")
def one_thread() -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def corpus() -> Corpus:
    return make_corpus()
