"""``manifest.sig``: an Ed25519 signature (RFC 8032) over the bytes of ``manifest.json``, which names every file's hash.

The file is the 64 bytes of the signature; keys are PEM files, so openssl can check it, too. ``python -m export sign``
writes it. Only a device that demands signatures needs the package ``cryptography``.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Final

from edge_llm.bundle.files import read_plain_file
from edge_llm.errors import BundleIntegrityError, BundleSignatureError, ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

SIGNATURE_FILE: Final = "manifest.sig"
SIGNATURE_BYTES: Final = 64
_MAX_KEY_BYTES: Final = 16_384
_HOW_TO_SIGN: Final = "have it signed with `python -m export sign BUNDLE --key FILE`"


def check_signature(folder: Path, raw_manifest: bytes, key_files: Sequence[str | Path]) -> Path:
    """See that one of the keys has signed a manifest.

    Args:
        folder: the bundle.
        raw_manifest: the bytes of its manifest, which are used afterwards.
        key_files: PEM files of public keys; any of them will do.

    Returns:
        The file of the key that fits.

    Raises:
        BundleSignatureError: it is not signed, or by none of the keys, or something has been changed since.
        ConfigError: a key cannot be used, or the package ``cryptography`` is missing.
    """
    keys = [(Path(file), load_public_key(file)) for file in key_files]
    from cryptography.exceptions import InvalidSignature

    signature = _read_signature(folder)
    for file, key in keys:
        try:
            key.verify(signature, raw_manifest)
        except InvalidSignature:
            continue
        return file
    names = ", ".join(str(file) for file, _ in keys)
    raise BundleSignatureError(
        f"the bundle {folder} is signed, but by no trusted key ({names}), or its manifest was changed since: copy it "
        f"again, or {_HOW_TO_SIGN}"
    )


def load_public_key(file: str | Path) -> Ed25519PublicKey:
    """An Ed25519 public key from a PEM file. Raises ``ConfigError``."""
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError:
        raise ConfigError("bundle signatures need the package cryptography: pip install 'edge-llm[signing]'") from None
    try:
        with open(file, "rb") as stream:
            key = load_pem_public_key(stream.read(_MAX_KEY_BYTES))
    except OSError as error:
        raise ConfigError(f"the public key {file} cannot be read: {error.strerror}") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        raise ConfigError(f"{file} is no Ed25519 public key in PEM: `python -m export keygen` makes one")
    return key


def _read_signature(folder: Path) -> bytes:
    path = folder / SIGNATURE_FILE
    try:
        signature = read_plain_file(path, SIGNATURE_BYTES)
    except FileNotFoundError:
        raise BundleSignatureError(
            f"the bundle {folder} is not signed, and this device takes signed ones only: {_HOW_TO_SIGN}"
        ) from None
    except (OSError, BundleIntegrityError) as error:
        raise BundleSignatureError(f"the signature {path} cannot be used ({error}): {_HOW_TO_SIGN}") from None
    if len(signature) != SIGNATURE_BYTES:
        raise BundleSignatureError(f"{path} is not a signature of {SIGNATURE_BYTES} bytes: {_HOW_TO_SIGN}")
    return signature
