"""Subjects: the files of a bundle from a stranger, whose hashes are right."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from benchmarks.fuzz.mutation import damaged, restated_json, restated_protobuf
from benchmarks.fuzz.subject import require
from edge_llm.bundle.manifest import MANIFEST_FILE, TOKENIZER_FILE, Bundle, sha256_file
from edge_llm.bundle.signature import SIGNATURE_FILE
from edge_llm.config import Config, EngineConfig, MqttConfig
from edge_llm.domain.domain import Domain
from edge_llm.domain.grammar import GrammarState
from edge_llm.domain.schema import DOMAIN_FILE, decode_domain, encode_domain
from edge_llm.engine.loading import load_model
from edge_llm.engine.sampler import SamplingParams
from edge_llm.engine.tokenizer import Tokenizer
from edge_llm.unit_files import Machine, drop_in_text

if TYPE_CHECKING:
    from random import Random

_ROOT: Final = Path(__file__).parent.parent.parent
SMALL_BUNDLE: Final = _ROOT / "tests" / "data" / "tiny_bundle"
DOMAIN_BUNDLE: Final = _ROOT / "bundles" / "vehicle-gpt2-int8"
_TARGET: Final = "cpu-int8"
_TEXT: Final = "How far is it to the coast? Grüße, 你好 🙂 <|im_end|> <|action window.move|>"
_MAX_STEPS: Final = 60


class _Opened:
    """A small bundle in a folder of its own, one file of which is replaced.

    Args:
        folder: an empty one.
        name: the file.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self.bundle = Path(shutil.copytree(SMALL_BUNDLE, folder / "bundle"))
        self._manifest: dict[str, Any] = json.loads((self.bundle / MANIFEST_FILE).read_bytes())
        self.path = self.bundle / name
        self.raw = self.path.read_bytes()
        self._entry = next((entry for entry in self._manifest["files"] if entry["path"] == name), None)

    def put(self, content: bytes) -> None:
        """Replace the file, and bring its hash up to date as its maker would."""
        self.path.write_bytes(content)
        if self._entry is not None:
            self._entry |= {"size_bytes": len(content), "sha256": sha256_file(self.path)}
            (self.bundle / MANIFEST_FILE).write_text(json.dumps(self._manifest))


class Manifests:
    """``manifest.json``."""

    def __init__(self, folder: Path) -> None:
        self._opened = _Opened(folder, MANIFEST_FILE)

    def make(self, rng: Random) -> bytes:
        """A manifest."""
        return restated_json(self._opened.raw, rng)

    def take(self, case: bytes) -> str:
        """Open and verify the bundle, and write the unit's drop-in for it."""
        self._opened.put(case)
        bundle = Bundle.open(self._opened.bundle)
        machine = Machine(("/opt/edge-llm/bin/edge-llm",), Config(mqtt=MqttConfig(host="x")), bundle)
        check_drop_in(drop_in_text(machine))
        bundle.verify()
        return "verified"


class Signatures:
    """``manifest.sig``, the manifest that it signs, and the key's file."""

    def __init__(self, folder: Path) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

        key = Ed25519PrivateKey.from_private_bytes(bytes(range(32)))
        self._opened = _Opened(folder, MANIFEST_FILE)
        self._key_file = folder / "fleet.pub"
        public = key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
        self._parts = (self._opened.raw, key.sign(self._opened.raw), public)

    def make(self, rng: Random) -> bytes:
        """The three files, one or two of them damaged."""
        parts = list(self._parts)
        for _ in range(rng.choice((1, 1, 2))):
            at = rng.randrange(3)
            parts[at] = damaged(parts[at], rng) if rng.random() < 0.9 else rng.randbytes(len(parts[at]))
        return msgspec.msgpack.encode(parts)

    def take(self, case: bytes) -> str:
        """Open the bundle with the key."""
        manifest, signature, key = msgspec.msgpack.decode(case, type=tuple[bytes, bytes, bytes])
        self._opened.put(manifest)
        (self._opened.bundle / SIGNATURE_FILE).write_bytes(signature)
        self._key_file.write_bytes(key)
        Bundle.open(self._opened.bundle, [self._key_file])
        require((manifest, signature) == self._parts[:2], "what was not signed was taken for signed")
        return "taken, signed"


class Tokenizers:
    """``tokenizer.json``, read by a library in Rust."""

    def __init__(self, folder: Path) -> None:
        self._opened = _Opened(folder, TOKENIZER_FILE)

    def make(self, rng: Random) -> bytes:
        """A tokenizer."""
        return restated_json(self._opened.raw, rng)

    def take(self, case: bytes) -> str:
        """Load it, and encode and decode with it."""
        self._opened.put(case)
        tokenizer = Tokenizer.from_file(Bundle.open(self._opened.bundle).verified_path(TOKENIZER_FILE))
        token_ids, ends = tokenizer.encode_with_ends(_TEXT)
        require(len(token_ids) == len(ends), "a token has no end")
        tokenizer.decode(token_ids)
        tokenizer.decode(range(0, max(tokenizer.vocab_size, 1), 7))
        return "loaded and used"


class Domains:
    """``domain.json`` of the shipped bundle, with its tokenizer; answers are walked through its grammar."""

    def __init__(self, _folder: Path) -> None:
        self._tokenizer = Tokenizer.from_file(DOMAIN_BUNDLE / TOKENIZER_FILE)
        self._raw = (DOMAIN_BUNDLE / DOMAIN_FILE).read_bytes()

    def make(self, rng: Random) -> bytes:
        """A domain."""
        return restated_json(self._raw, rng)

    def take(self, case: bytes) -> str:
        """Compile the grammar, and follow the first and the last token that it allows."""
        schema = decode_domain(case)
        require(decode_domain(encode_domain(schema)) == schema, "it reads otherwise when it is written again")
        domain = Domain(schema, self._tokenizer)
        prompt_ids = [domain.grammar.user_id, *self._tokenizer.encode("drive to Munich airport"), 0]
        prompt_ids[-1] = domain.grammar.reply_id
        for pick in (min, max):
            state = GrammarState(domain.grammar, prompt_ids)
            answer = domain.answer(lambda: domain.sampler(SamplingParams(), prompt_ids), ())
            for _ in range(_MAX_STEPS):
                allowed = state.allowed()
                if allowed is None:
                    break
                require(bool(allowed), "the grammar allows nothing")
                state.advance(token_id := pick(allowed))
                answer.push([token_id])
            answer.finish()
        return "compiled and followed"


class Graphs:
    """``model.onnx``, read by ONNX Runtime once the guard has let it through."""

    def __init__(self, folder: Path) -> None:
        self._opened = _Opened(folder, f"graphs/{_TARGET}/model.onnx")
        # The bundle's own graph: a prepared copy is made in a process of its own.
        self._config = Config(engine=EngineConfig(prepare=False, slots=1, threads=1, target=_TARGET))

    def make(self, rng: Random) -> bytes:
        """A graph."""
        change = restated_protobuf if rng.random() < 0.7 else damaged
        return change(self._opened.raw, rng)

    def take(self, case: bytes) -> str:
        """Load it, and ask what the manifest expects."""
        self._opened.put(case)
        load_model(Bundle.open(self._opened.bundle), self._config)
        return "loaded, answers as expected"


def check_drop_in(text: str) -> None:
    """See that a drop-in says nothing but what this package writes."""
    keys = ("ExecStart=", "TimeoutStopSec=", "MemoryMax=", "AllowedCPUs=", "CPUQuota=", "SupplementaryGroups=")
    for line in text.split("\n"):
        is_known = not line or line == "[Service]" or line.startswith(("#", *keys, "IPAddressDeny=", "IPAddressAllow="))
        is_known = is_known or re.fullmatch(r"ReadWritePaths=-(/[\w.@+,=-]+)+", line) is not None
        require(is_known and "\r" not in line, f"the drop-in says {line!r}")
