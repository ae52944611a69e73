"""``python -m export keygen`` and ``sign``: who may say what a device runs (edge_llm/bundle/signature.py)."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edge_llm.bundle.files import replace_file
from edge_llm.bundle.manifest import MANIFEST_FILE, Bundle, decode_manifest
from edge_llm.bundle.signature import SIGNATURE_FILE
from edge_llm.config import refuse_if_open_to_all
from export.errors import ExportError

if TYPE_CHECKING:
    import argparse

    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

_NO_CRYPTOGRAPHY = "signing needs the package cryptography: pip install 'edge-llm[signing]'"


def add_signing_parsers(commands: Any) -> None:
    """The commands ``keygen`` and ``sign``."""
    keygen = commands.add_parser("keygen", help="make a pair of keys for signing bundles")
    keygen.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="the private key; the public one is FILE.pub"
    )
    sign = commands.add_parser("sign", help="sign a bundle, or sign it anew")
    sign.add_argument("bundle", type=Path, metavar="BUNDLE", help="the bundle's folder")
    sign.add_argument("--key", type=Path, required=True, metavar="FILE", help="the private key")


def run_keygen(options: argparse.Namespace) -> Path:
    """Write an Ed25519 key, for its owner alone, and its public half beside it.

    Returns:
        The file of the public key.

    Raises:
        ExportError: one of the files is there already, or cannot be written.
    """
    try:
        from cryptography.hazmat.primitives import serialization
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    except ImportError:
        raise ExportError(_NO_CRYPTOGRAPHY) from None
    key = Ed25519PrivateKey.generate()
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    out: Path = options.out
    public_file = out.with_name(f"{out.name}.pub")
    if public_file.exists():
        raise ExportError(f"{public_file} is there already: give --out another name")
    _write_new(out, private, 0o600)
    _write_new(public_file, public, 0o644)
    return public_file


def run_sign(options: argparse.Namespace) -> Path:
    """Check every file of a bundle, and sign its manifest.

    Returns:
        The signature's file.

    Raises:
        BundleError: the bundle is damaged: it is not signed.
        ConfigError: the key is open to every user of the machine.
        ExportError: the key or the folder cannot be used.
    """
    key = _load_private_key(options.key)
    bundle = Bundle.open(options.bundle)
    bundle.verify()
    raw = (bundle.path / MANIFEST_FILE).read_bytes()
    if decode_manifest(raw) != bundle.manifest:
        raise ExportError(f"{bundle.path} was changed while it was checked: it is not signed")
    path = bundle.path / SIGNATURE_FILE
    try:
        replace_file(path, key.sign(raw))
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from None
    return path


def _load_private_key(file: Path) -> Ed25519PrivateKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError:
        raise ExportError(_NO_CRYPTOGRAPHY) from None
    refuse_if_open_to_all("the private key", file)
    try:
        key = load_pem_private_key(file.read_bytes(), password=None)
    except OSError as error:
        raise ExportError(f"the private key {file} cannot be read: {error.strerror}") from None
    except TypeError:
        raise ExportError(f"{file} has a passphrase, which sign does not take: decrypt it with openssl pkey") from None
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PrivateKey):
        raise ExportError(f"{file} is no Ed25519 private key in PEM: `python -m export keygen` makes one")
    return key


def _write_new(path: Path, content: bytes, mode: int) -> None:
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        with open(descriptor, "wb") as stream:
            stream.write(content)
    except FileExistsError:
        raise ExportError(f"{path} is there already: give --out another name") from None
    except OSError as error:
        raise ExportError(f"cannot write {path}: {error.strerror}") from None
