"""``manifest.json``: the bundle's one schema, written by export/package.py and read by the daemon.

A bundle is a folder::

    BUNDLE/manifest.json  manifest.sig
    BUNDLE/tokenizer.json
    BUNDLE/quality.json
    BUNDLE/domain.json       README.md
    BUNDLE/graphs/<target>/model.onnx  prefill.onnx  model.onnx.data  prefix.kv

Only files that the manifest names are opened, after their size and SHA-256 have been checked; and where keys are
trusted, only if one of them has signed the manifest (signature.py).
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from edge_llm.bundle.files import check_plain_file, read_plain_file
from edge_llm.bundle.graph_guard import check_graph_file
from edge_llm.bundle.signature import check_signature
from edge_llm.errors import BundleIntegrityError, BundleNotFoundError, ManifestError

if TYPE_CHECKING:
    from collections.abc import Sequence

FORMAT_VERSION: Final = 1
MANIFEST_FILE: Final = "manifest.json"
TOKENIZER_FILE: Final = "tokenizer.json"
QUALITY_FILE: Final = "quality.json"
# Above any real manifest, and small enough that a hostile one cannot exhaust a board's memory.
MAX_MANIFEST_BYTES: Final = 4 << 20
# Files that are read as a whole, by name; domain.json has its bound in edge_llm/domain/schema.py.
_MAX_BYTES: Final = {TOKENIZER_FILE: 128 << 20, QUALITY_FILE: 4 << 20}
_MAX_LABEL_CHARACTERS: Final = 200
PATH_PATTERN: Final = re.compile(r"(graphs/[a-z0-9-]{1,64}/)?[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

# Above what any model has; a loop over it still ends.
PositiveInt = Annotated[int, Meta(ge=1, le=1 << 24)]
TokenId = Annotated[int, Meta(ge=0, lt=1 << 24)]
Sha256 = Annotated[str, Meta(pattern="^[0-9a-f]{64}$")]


class _Strict(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Frozen, and a field that the schema does not know is an error."""


class FileEntry(_Strict, frozen=True):
    """One file of the bundle, by its path relative to the bundle folder."""

    path: str
    size_bytes: Annotated[int, Meta(ge=0, lt=1 << 48)]
    sha256: Sha256


class ModelDims(_Strict, frozen=True):
    """The model's shape. ``max_seq_len`` is the static length of the KV cache in tokens."""

    architecture: Literal["gpt2", "llama"]
    num_layers: Annotated[int, Meta(ge=1, le=1024)]
    num_heads: PositiveInt
    num_kv_heads: PositiveInt
    head_dim: PositiveInt
    hidden_size: PositiveInt
    vocab_size: PositiveInt
    max_seq_len: PositiveInt


# A field that is not set is left out, so that a device which does not know it yet reads the manifest all the same.
class Graph(_Strict, frozen=True, omit_defaults=True):
    """One exported form of the model (edge_llm/bundle/graph_io.py describes each ``form``).

    A static form has two graphs over one data file: ``file`` decodes, ``prefill_file`` takes ``prefill_chunk`` tokens.
    ``prefix_file`` is the KV of the shared head of its prompts, if it is shipped. ``expectation`` takes the place of
    the manifest's where its weights are so much coarser or finer that it rightly generates other tokens.
    """

    target: str
    file: str
    data_file: str | None
    bits: Literal[4, 8, 16, 32]
    block_size: Annotated[int, Meta(ge=0)]
    kv_dtype: Literal["float32", "float16"]
    opset: PositiveInt
    ir_version: PositiveInt
    min_onnxruntime: str
    prefix_file: str | None = None
    form: Literal["gqa", "scatter", "primitive"] = "gqa"
    prefill_file: str | None = None
    prefill_chunk: PositiveInt | None = None
    expectation: Expectation | None = None

    @property
    def is_static(self) -> bool:
        """Whether it is two graphs of fixed shapes."""
        return self.form != "gqa"

    @property
    def files(self) -> tuple[str, ...]:
        """Everything that is needed to run it, relative to the bundle."""
        return tuple(name for name in (self.file, self.prefill_file, self.data_file) if name is not None)


class RolePieces(_Strict, frozen=True):
    """Fixed text before and after one message of a role."""

    before: str
    after: str


class PromptTemplate(_Strict, frozen=True):
    """The chat template as fixed pieces, so that the device needs no template engine.

    A prompt is ``prefix``, then each message between its role's pieces, then ``generation_prompt``. A conversation
    without a system message gets ``default_system``, if there is one. ``special_tokens`` are the strings inside the
    pieces that are one token each; user text never becomes one of them.
    """

    prefix: str
    system: RolePieces | None
    user: RolePieces
    assistant: RolePieces
    generation_prompt: str
    default_system: str | None
    strip_content: bool
    special_tokens: tuple[str, ...]
    stop_token_ids: tuple[TokenId, ...]
    stop_strings: tuple[str, ...]


class GenerationDefaults(_Strict, frozen=True):
    """What a query that sets nothing is answered with. ``temperature`` 0 is greedy."""

    max_tokens: PositiveInt = 256
    temperature: Annotated[float, Meta(ge=0, le=5)] = 0.0
    top_k: Annotated[int, Meta(ge=0)] = 0
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    min_p: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=10)] = 1.0


class GraphQuality(_Strict, frozen=True):
    """A graph's figures against ``cpu-fp32`` of the same weights (quality.json has them in full).

    ``max_perplexity_ratio`` is the limit that the export was run with.
    """

    target: str
    perplexity_ratio: float
    top1_agreement: float
    mean_kl: float
    max_perplexity_ratio: float


class Expectation(_Strict, frozen=True):
    """Greedy tokens that a correct engine generates after ``prompt_token_ids``: the bundle's self-test."""

    prompt_token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1)]
    token_ids: Annotated[tuple[TokenId, ...], Meta(min_length=1)]


class Manifest(_Strict, frozen=True, omit_defaults=True):
    """The whole of ``manifest.json``. ``domain_file`` tells what the model may ask the host to do (edge_llm/domain)."""

    format: Literal[1]
    name: str
    version: str
    source: str
    license: str
    reference: str
    created: str
    exporter: dict[str, str]
    model: ModelDims
    graphs: Annotated[tuple[Graph, ...], Meta(min_length=1, max_length=64)]
    prompt: PromptTemplate
    generation: GenerationDefaults
    quality: tuple[GraphQuality, ...]
    expectation: Expectation
    files: Annotated[tuple[FileEntry, ...], Meta(min_length=1, max_length=512)]
    domain_file: str | None = None

    def graph(self, target: str) -> Graph:
        """The graph of one target. Raises ``ManifestError`` naming the targets there are."""
        for graph in self.graphs:
            if graph.target == target:
                return graph
        there = ", ".join(graph.target for graph in self.graphs)
        raise ManifestError(f"bundle {self.name!r} has no graph for target {target!r}; it has: {there}")


class Bundle:
    """A bundle folder whose manifest has been read and is valid; its other files are checked by ``verify``.

    Attributes:
        path: the folder.
        manifest: its contents.
        digest: SHA-256 of manifest.json, which names every other file's hash and so the whole bundle.
    """

    def __init__(self, path: Path, manifest: Manifest, digest: str) -> None:
        self.path = path
        self.manifest = manifest
        self.digest = digest

    @classmethod
    def open(cls, path: str | Path, keys: Sequence[str | Path] = ()) -> Bundle:
        """Read and validate the manifest.

        Args:
            path: the folder.
            keys: PEM files of public keys, one of which must have signed the manifest; none is asked for if empty.

        Raises:
            BundleNotFoundError: no such folder, or no manifest in it.
            BundleSignatureError: no trusted key has signed it.
            BundleIntegrityError: the manifest is a link, or too large.
            ManifestError: the manifest is malformed, or of another format version.
            ConfigError: a key cannot be used.
        """
        folder = Path(path)
        manifest_path = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise BundleNotFoundError(f"no bundle at {folder}: give the folder that `python -m export bundle` wrote")
        try:
            raw = read_plain_file(manifest_path, MAX_MANIFEST_BYTES)
        except FileNotFoundError:
            raise BundleNotFoundError(f"{folder} is not a bundle: it has no {MANIFEST_FILE}") from None
        except OSError as error:
            raise BundleNotFoundError(f"{manifest_path} cannot be read: {error.strerror}") from None
        if keys:
            check_signature(folder, raw, keys)
        return cls(folder, decode_manifest(raw), hashlib.sha256(raw).hexdigest())

    def entry(self, name: str) -> FileEntry:
        """The manifest's entry of a file. Raises ``ManifestError`` if the manifest does not name it."""
        for entry in self.manifest.files:
            if entry.path == name:
                return entry
        raise ManifestError(f"the manifest of {self.path} does not list {name}")

    def verified_path(self, name: str) -> Path:
        """Path of a file that the manifest names, once its size and hash have been checked.

        Raises:
            BundleNotFoundError: it is missing or cannot be read.
            BundleIntegrityError: it is a link, its size or hash differs, or it is a graph that reads other files.
        """
        entry = self.entry(name)
        path = self.path / entry.path
        try:
            return self._verified(path, entry)
        except BundleNotFoundError:
            raise
        except OSError as error:
            raise BundleNotFoundError(f"{path} cannot be read: {error.strerror}") from None

    def _verified(self, path: Path, entry: FileEntry) -> Path:
        folder = self.path
        for part in PurePosixPath(entry.path).parts[:-1]:
            folder /= part
            if folder.is_symlink():
                raise BundleIntegrityError(f"{folder} is a link; a bundle holds plain files only")
        try:
            size_bytes = check_plain_file(path)
        except FileNotFoundError:
            raise BundleNotFoundError(f"{path} is missing: export or copy the bundle again") from None
        if size_bytes != entry.size_bytes:
            raise BundleIntegrityError(
                f"{path} has {size_bytes} bytes, the manifest says {entry.size_bytes}: copy the bundle again"
            )
        if sha256_file(path) != entry.sha256:
            raise BundleIntegrityError(f"{path} does not match its SHA-256 in the manifest: copy the bundle again")
        for graph in self.manifest.graphs:
            if entry.path in (graph.file, graph.prefill_file):
                check_graph_file(path, None if graph.data_file is None else PurePosixPath(graph.data_file).name)
        return path

    def verify(self) -> None:
        """Check every file that the manifest names. Raises as ``verified_path`` does."""
        for entry in self.manifest.files:
            self.verified_path(entry.path)


def decode_manifest(raw: bytes) -> Manifest:
    """Parse ``manifest.json``. Raises ``ManifestError`` naming the field that is wrong."""
    try:
        version = msgspec.json.decode(raw, type=dict[str, msgspec.Raw]).get("format")
        if version is not None and bytes(version) != str(FORMAT_VERSION).encode():
            raise ManifestError(
                f"manifest format {bytes(version).decode(errors='replace')} is not supported (this edge_llm reads "
                f"format {FORMAT_VERSION}): export the bundle again"
            )
        manifest = msgspec.json.decode(raw, type=Manifest)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ManifestError(f"manifest.json is not valid: {error}") from None
    _check_consistency(manifest)
    return manifest


def encode_manifest(manifest: Manifest) -> bytes:
    """Serialise, readable by people; the inverse of ``decode_manifest``."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=2) + b"\n"


def _check_consistency(manifest: Manifest) -> None:
    for label in (manifest.name, manifest.version, *(graph.target for graph in manifest.graphs)):
        # They are shown on terminals, and stand in the unit's drop-in: a line break would make a line of its own.
        if not label.isprintable() or len(label) > _MAX_LABEL_CHARACTERS:
            raise ManifestError(f"manifest.json holds the name {label[:80]!r}: names are short and printable")
    names = [entry.path for entry in manifest.files]
    for name in names:
        if not PATH_PATTERN.fullmatch(name) or ".." in name:
            raise ManifestError(
                f"manifest.json names the file {name!r}: only flat names and graphs/<target>/ are allowed"
            )
    for entry in manifest.files:
        if entry.size_bytes > _MAX_BYTES.get(entry.path, entry.size_bytes):
            raise ManifestError(f"{entry.path} may have {_MAX_BYTES[entry.path]} bytes, not {entry.size_bytes}")
    if len(set(names)) != len(names):
        raise ManifestError("manifest.json lists a file twice")
    needed = [TOKENIZER_FILE, QUALITY_FILE, *filter(None, [manifest.domain_file])]
    for graph in manifest.graphs:
        needed += [*graph.files, *filter(None, [graph.prefix_file])]
        _check_graph(graph)
    for name in needed:
        if name not in names:
            raise ManifestError(f"manifest.json uses the file {name!r} but does not list it under `files`")
    model = manifest.model
    if model.num_heads % model.num_kv_heads:
        raise ManifestError(f"num_heads {model.num_heads} is not a multiple of num_kv_heads {model.num_kv_heads}")
    expectations = [manifest.expectation, *filter(None, (graph.expectation for graph in manifest.graphs))]
    recorded = [token_id for one in expectations for token_id in (*one.prompt_token_ids, *one.token_ids)]
    ids = (*manifest.prompt.stop_token_ids, *recorded)
    if any(token_id >= model.vocab_size for token_id in ids):
        raise ManifestError(f"manifest.json holds a token id outside the vocabulary of {model.vocab_size}")


def _check_graph(graph: Graph) -> None:
    if graph.is_static != (graph.prefill_file is not None) or graph.is_static != (graph.prefill_chunk is not None):
        raise ManifestError(
            f"the {graph.target} graph of form {graph.form!r} must have prefill_file and prefill_chunk just if it "
            f"is static: export the bundle again"
        )
    folders = {PurePosixPath(name).parent for name in graph.files}
    models = [name for name in graph.files if name != graph.data_file]
    # By other names ONNX Runtime would read other formats, and it looks for the data beside the graph.
    if len(folders) > 1 or not all(name.endswith(".onnx") for name in models):
        raise ManifestError(f"the {graph.target} graph must be .onnx files with their data in the same folder")


def sha256_file(path: Path) -> str:
    """Hex SHA-256 of a file, read in blocks of 1 MiB."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while block := stream.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
