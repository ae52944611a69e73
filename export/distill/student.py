"""The student: a GPT-2 of a given shape, with whatever it can take over from its teacher."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import tokenizers

from export.errors import ExportError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from numpy.typing import NDArray

    from export.tensors import Float32Array

_HEAD_DIM: Final = 64
# Of GPT-2's own initialisation is 0.02; embeddings that mean something from the start may be larger (docs/export.md).
_EMBEDDING_STD: Final = 0.05


@dataclass(frozen=True)
class StudentShape:
    """Layers and width of a student."""

    num_layers: int
    hidden_size: int

    @classmethod
    def parse(cls, text: str) -> StudentShape:
        """``6x384`` is 6 layers of width 384. Raises ``ValueError`` saying what is allowed."""
        found = re.fullmatch(r"(\d{1,3})x(\d{2,5})", text)
        if not found or not int(found[1]) or int(found[2]) % 16:
            raise ValueError(f"{text!r} is not LAYERSxWIDTH such as 6x384, with a width that 16 divides")
        return cls(int(found[1]), int(found[2]))

    @property
    def num_heads(self) -> int:
        """Heads of 64 channels where the width allows it, else of 16."""
        return self.hidden_size // (_HEAD_DIM if self.hidden_size % _HEAD_DIM == 0 else 16)


def new_student(shape: StudentShape, vocab_size: int, context: int, dropout: float, seed: int) -> Any:
    """A GPT-2 with random weights, as a transformers model with a tied head."""
    import torch
    import transformers

    torch.manual_seed(seed)
    config = transformers.GPT2Config(
        n_layer=shape.num_layers,
        n_head=shape.num_heads,
        n_embd=shape.hidden_size,
        n_positions=context,
        vocab_size=vocab_size,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
    )
    return transformers.GPT2LMHeadModel(config)


def take_embeddings(student: Any, teacher_rows: Float32Array) -> None:
    """Start from the teacher's token embeddings: as they are at equal width, else projected on their main axes.

    Args:
        student: its first rows are overwritten.
        teacher_rows: ``(tokens, teacher_width)``; fewer rows than the student's vocabulary if it has tokens of its own.
    """
    import torch

    table = student.get_input_embeddings().weight
    projected = project(teacher_rows, int(table.shape[1]))
    projected = projected * (_EMBEDDING_STD / float(projected.std()))
    with torch.no_grad():
        table[: projected.shape[0]] = torch.from_numpy(projected)


def project(rows: Float32Array, width: int) -> Float32Array:
    """Rows ``(n, d)`` as ``(n, width)``: principal components if they are narrower, zeros added if they are wider."""
    size = rows.shape[1]
    if size == width:
        same: Float32Array = rows.copy()
        return same
    if size < width:
        return np.pad(rows, ((0, 0), (0, width - size)))
    centred = rows - rows.mean(axis=0)
    # The axes of largest variance: eigenvectors of the covariance, which is small where the table is not.
    _, axes = np.linalg.eigh((centred.T @ centred).astype(np.float64))
    main: NDArray[np.float64] = axes[:, ::-1][:, :width]
    components: Float32Array = (centred @ main.astype(np.float32)).astype(np.float32)
    # Turned at random, so that heads share the large components instead of the first one getting them all.
    turn = np.linalg.qr(np.random.default_rng(0).standard_normal((width, width)))[0].astype(np.float32)
    return np.ascontiguousarray(components @ turn, dtype=np.float32)


def start_from(student: Any, folder: Path, tokenizer_json: str) -> None:
    """Take over all weights of an earlier student of the same shape; token rows are matched by what the tokens say.

    Args:
        student: overwritten, but for the rows of tokens that the earlier one did not have.
        folder: as ``save_student`` writes it.
        tokenizer_json: the student's own vocabulary.

    Raises:
        ExportError: there is no such student, or it has another shape.
    """
    import torch
    import transformers

    if not (folder / "config.json").is_file() or not (folder / "tokenizer.json").is_file():
        raise ExportError(f"{folder} is no student: --start-from takes the folder student-hf of an earlier --work")
    try:
        earlier = transformers.GPT2LMHeadModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        known = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")).get_vocab(with_added_tokens=True)
    except Exception as error:  # transformers and tokenizers raise whatever they meet
        raise ExportError(f"{folder} cannot be read as a GPT-2: {error}") from error
    ours, theirs = student.config, earlier.config
    for option, mine, its in (
        ("student", f"{ours.n_layer}x{ours.n_embd}", f"{theirs.n_layer}x{theirs.n_embd}"),
        ("context", ours.n_positions, theirs.n_positions),
    ):
        if mine != its:
            raise ExportError(f"the student in {folder} has another shape: give --{option} {its}")
    weights = earlier.state_dict()
    rows = {token: row for token, row in known.items() if row < theirs.vocab_size}
    vocabulary = tokenizers.Tokenizer.from_str(tokenizer_json).get_vocab(with_added_tokens=True)
    shared = [(row, rows[token]) for token, row in vocabulary.items() if token in rows]
    here, there = (torch.tensor(ids, dtype=torch.long) for ids in zip(*shared, strict=True))
    table = student.get_input_embeddings().weight
    with torch.no_grad():
        table[here] = earlier.get_input_embeddings().weight[there]
    for name in ("transformer.wte.weight", "lm_head.weight"):
        weights[name] = table
    student.load_state_dict(weights)


def weights_digest(student: Any) -> str:
    """SHA-256 of all weights, which says what a training started from."""
    digest = hashlib.sha256()
    for name, tensor in sorted(student.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def save_student(
    student: Any, folder: Path, tokenizer_json: str, end_id: int, tokenizer_config: Mapping[str, Any]
) -> None:
    """Write a student as ``load_folder`` reads it.

    Args:
        student: a transformers model.
        folder: made if it is not there.
        tokenizer_json: contents of tokenizer.json.
        end_id: the token that ends an answer.
        tokenizer_config: contents of tokenizer_config.json.
    """
    # Both files would otherwise name the end of GPT-2's own vocabulary.
    for config in (student.config, student.generation_config):
        config.eos_token_id = config.bos_token_id = end_id
    student.save_pretrained(folder)
    (folder / "tokenizer.json").write_text(tokenizer_json, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config), encoding="utf-8")


def alternate_layers(student: Any, teacher: Any) -> None:
    """Take over embeddings and every n-th layer of a GPT-2 teacher of the same width (Sanh et al. 2019, DistilBERT).

    Raises:
        ExportError: the teacher is no GPT-2, or of another width, or has fewer layers.
    """
    import torch

    ours, theirs = student.config, teacher.config
    if theirs.model_type != "gpt2" or theirs.n_embd != ours.n_embd or theirs.n_head != ours.n_head:
        raise ExportError(
            f"layers can be taken over from a GPT-2 of width {ours.n_embd} with {ours.n_head} heads only, and the "
            f"teacher is a {theirs.model_type} of width {getattr(theirs, 'n_embd', theirs.hidden_size)}"
        )
    if theirs.n_layer < ours.n_layer:
        raise ExportError(f"the teacher has {theirs.n_layer} layers, fewer than the student's {ours.n_layer}")
    chosen = np.linspace(0, theirs.n_layer - 1, ours.n_layer).round().astype(int)
    with torch.no_grad():
        for layer, source in zip(student.transformer.h, chosen, strict=True):
            layer.load_state_dict(teacher.transformer.h[int(source)].state_dict())
        student.transformer.ln_f.load_state_dict(teacher.transformer.ln_f.state_dict())
        positions = min(ours.n_positions, theirs.n_positions)
        student.transformer.wpe.weight[:positions] = teacher.transformer.wpe.weight[:positions]
        rows = min(ours.vocab_size, theirs.vocab_size)
        student.transformer.wte.weight[:rows] = teacher.transformer.wte.weight[:rows]
