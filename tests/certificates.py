"""Certificates for tests, made with openssl."""

from __future__ import annotations

import subprocess
from pathlib import Path

_NEW_KEY = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")


class CertificateAuthority:
    """Issues certificates; its own is ``ca``, and the file names are ``NAME.pem`` and ``NAME.key``."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.certificate = folder / "ca.pem"
        self._openssl("req", "-x509", *_NEW_KEY, "-keyout", "ca.key", "-out", "ca.pem", "-days", "2",
                      "-subj", f"/CN=CA of {folder.name}", "-addext", "keyUsage=critical,keyCertSign")  # fmt: skip

    def issue(self, name: str, extension: str = "extendedKeyUsage=clientAuth") -> tuple[Path, Path]:
        """A certificate whose CN is ``name``, for a client unless ``extension`` says otherwise, and its key."""
        self._openssl("req", *_NEW_KEY, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        (self.folder / "extension").write_text(extension)
        self._openssl("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial",
                      "-out", f"{name}.pem", "-days", "2", "-extfile", "extension")  # fmt: skip
        return self.folder / f"{name}.pem", self.folder / f"{name}.key"

    def issue_server(self, name: str = "server") -> tuple[Path, Path]:
        """A certificate for 127.0.0.1, and its key."""
        return self.issue(name, "subjectAltName=IP:127.0.0.1")

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True, cwd=self.folder)
