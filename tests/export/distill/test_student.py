"""The student's shape, and what it takes over."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers

from export.distill.student import (
    StudentShape,
    alternate_layers,
    new_student,
    project,
    save_student,
    start_from,
    take_embeddings,
    weights_digest,
)
from export.errors import ExportError
from tests.export.models import gpt2_config, llama_config, random_model


@pytest.mark.parametrize(
    ("text", "shape", "heads"),
    [("6x384", (6, 384), 6), ("2x32", (2, 32), 2), ("12x768", (12, 768), 12), ("4x80", (4, 80), 5)],
)
def test_shapes(text: str, shape: tuple[int, int], heads: int) -> None:
    parsed = StudentShape.parse(text)
    assert (parsed.num_layers, parsed.hidden_size) == shape
    assert parsed.num_heads == heads
    assert parsed.hidden_size % heads == 0


@pytest.mark.parametrize("text", ["", "6", "6x", "x384", "0x384", "6x100", "6x8", "6X384", "-1x64", "6x384x2", "six"])
def test_what_is_no_shape(text: str) -> None:
    with pytest.raises(ValueError, match="is not LAYERSxWIDTH"):
        StudentShape.parse(text)


def test_a_student_is_the_same_for_a_seed() -> None:
    first, second, other = (new_student(StudentShape(2, 32), 50, 24, 0.1, seed) for seed in (3, 3, 4))
    assert first.config.n_positions == 24
    assert first.lm_head.weight is first.transformer.wte.weight
    assert first.lm_head.weight.shape == (50, 32)
    assert equal(first, second)
    assert not equal(first, other)


def equal(one: Any, other: Any) -> bool:
    pairs = zip(one.parameters(), other.parameters(), strict=True)
    return all(bool((a == b).all()) for a, b in pairs)


@pytest.mark.parametrize("width", [8, 24, 40])
def test_projected_rows_have_the_width(width: int) -> None:
    rows = np.random.default_rng(0).standard_normal((60, 24)).astype(np.float32)
    projected = project(rows, width)
    assert projected.shape == (60, width)
    assert projected.dtype == np.float32
    assert np.isfinite(projected).all()
    np.testing.assert_array_equal(project(rows, width), projected)


def test_equal_width_is_a_copy_and_more_width_is_zeros() -> None:
    rows = np.random.default_rng(0).standard_normal((5, 4)).astype(np.float32)
    same = project(rows, 4)
    np.testing.assert_array_equal(same, rows)
    assert same is not rows
    wider = project(rows, 6)
    np.testing.assert_array_equal(wider[:, :4], rows)
    assert not wider[:, 4:].any()


def test_less_width_keeps_distances_that_lie_in_it() -> None:
    rng = np.random.default_rng(0)
    flat = rng.standard_normal((50, 3)) @ rng.standard_normal((3, 20)) + 5
    projected = project(flat.astype(np.float32), 3)
    distances = np.linalg.norm(flat[:, None] - flat[None], axis=-1)
    np.testing.assert_allclose(np.linalg.norm(projected[:, None] - projected[None], axis=-1), distances, atol=1e-3)


@pytest.mark.parametrize("width", [24, 32, 64])
def test_taken_embeddings_are_the_first_rows(width: int) -> None:
    student = new_student(StudentShape(1, 32), 40, 16, 0.0, 0)
    own = student.get_input_embeddings().weight.detach().numpy().copy()
    rows = np.random.default_rng(0).standard_normal((30, width)).astype(np.float32) * 3
    take_embeddings(student, rows)
    table = student.get_input_embeddings().weight.detach().numpy()
    np.testing.assert_array_equal(table[30:], own[30:])
    assert table[:30].std() == pytest.approx(0.05, rel=1e-3)
    expected = project(rows, 32)
    np.testing.assert_allclose(table[:30], expected * (0.05 / expected.std()), rtol=1e-4)


@pytest.mark.parametrize(("layers", "chosen"), [(2, [0, 4]), (3, [0, 2, 4]), (5, [0, 1, 2, 3, 4])])
def test_alternate_layers_are_the_teachers(layers: int, chosen: list[int]) -> None:
    teacher = random_model(gpt2_config(n_layer=5, n_embd=48, n_head=3, vocab_size=60))
    student = new_student(StudentShape(layers, 48), 70, 32, 0.0, 0)
    alternate_layers(student, teacher)
    for layer, source in enumerate(chosen):
        assert equal(student.transformer.h[layer], teacher.transformer.h[source])
    assert equal(student.transformer.ln_f, teacher.transformer.ln_f)
    assert bool((student.transformer.wpe.weight == teacher.transformer.wpe.weight[:32]).all())
    assert bool((student.transformer.wte.weight[:60] == teacher.transformer.wte.weight).all())


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (llama_config, "the teacher is a llama of width 64"),
        (lambda: gpt2_config(n_embd=64, n_head=4), "the teacher is a gpt2 of width 64"),
        (lambda: gpt2_config(n_head=6), "with 3 heads only"),
        (lambda: gpt2_config(n_layer=1), "the teacher has 1 layers, fewer than the student's 2"),
    ],
    ids=["llama", "width", "heads", "layers"],
)
def test_other_teachers_have_no_layers_to_give(config: Any, words: str) -> None:
    student = new_student(StudentShape(2, 48), 400, 96, 0.0, 0)
    with pytest.raises(ExportError, match=words):
        alternate_layers(student, random_model(config()))


def vocabulary(*words: str) -> str:
    model = tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token=words[0])
    made: str = tokenizers.Tokenizer(model).to_str()
    return made


def test_an_earlier_student_is_taken_over_token_by_token(tmp_path: Path) -> None:
    earlier = new_student(StudentShape(2, 32), 3, 24, 0.0, 1)
    save_student(earlier, tmp_path, vocabulary("?", "open", "close"), 0, {})
    student = new_student(StudentShape(2, 32), 4, 24, 0.0, 2)
    fresh = student.lm_head.weight[2].clone()
    start_from(student, tmp_path, vocabulary("?", "close", "ajar", "open"))
    rows = student.transformer.wte.weight
    for row, before in ((0, 0), (1, 2), (3, 1)):
        assert bool((rows[row] == earlier.transformer.wte.weight[before]).all())
    assert bool((rows[2] == fresh).all())
    assert student.lm_head.weight is rows
    for name, tensor in earlier.transformer.named_parameters():
        if name != "wte.weight":
            assert bool((dict(student.transformer.named_parameters())[name] == tensor).all()), name


def test_weights_have_a_digest() -> None:
    first, second, other = (new_student(StudentShape(2, 32), 5, 24, 0.0, seed) for seed in (3, 3, 4))
    assert weights_digest(first) == weights_digest(second) != weights_digest(other)


@pytest.mark.parametrize(
    ("shape", "context", "words"), [("2x32", 48, "give --context 24"), ("3x32", 24, "give --student 2x32")]
)
def test_only_a_student_of_the_same_shape_is_taken_over(tmp_path: Path, shape: str, context: int, words: str) -> None:
    save_student(new_student(StudentShape(2, 32), 3, 24, 0.0, 1), tmp_path, vocabulary("?", "a", "b"), 0, {})
    student = new_student(StudentShape.parse(shape), 3, context, 0.0, 2)
    with pytest.raises(ExportError, match=words):
        start_from(student, tmp_path, vocabulary("?", "a", "b"))


def test_what_is_no_student_is_not_taken_over(tmp_path: Path) -> None:
    student = new_student(StudentShape(2, 32), 3, 24, 0.0, 2)
    with pytest.raises(ExportError, match="takes the folder student-hf"):
        start_from(student, tmp_path, vocabulary("?", "a", "b"))
    save_student(student, tmp_path, vocabulary("?", "a", "b"), 0, {})
    (tmp_path / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ExportError, match="cannot be read as a GPT-2"):
        start_from(student, tmp_path, vocabulary("?", "a", "b"))
