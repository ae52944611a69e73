"""Signed bundles: what a device with trusted keys opens, and what it refuses."""

from __future__ import annotations

import shutil
import sys

import pytest

from edge_llm import cli
from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.signature import SIGNATURE_FILE
from edge_llm.errors import BundleSignatureError, ConfigError, ManifestError
from export.cli import main as export
from tests.paths import TINY_BUNDLE


@pytest.fixture
def key(tmp_path):
    """A private key's file; the public one lies beside it."""
    assert export(["keygen", "--out", str(tmp_path / "fleet.key")]) == 0
    return tmp_path / "fleet.key"


@pytest.fixture
def public(key):
    return key.with_name("fleet.key.pub")


@pytest.fixture
def copy(tmp_path):
    return shutil.copytree(TINY_BUNDLE, tmp_path / "bundle")


@pytest.fixture
def signed(copy, key):
    assert export(["sign", str(copy), "--key", str(key)]) == 0
    return copy


def test_a_signed_bundle_opens_with_its_key_and_without_any(signed, public):
    assert Bundle.open(signed, [public]).digest == Bundle.open(signed).digest


def test_one_of_several_keys_is_enough(signed, public, tmp_path):
    assert export(["keygen", "--out", str(tmp_path / "other.key")]) == 0
    Bundle.open(signed, [tmp_path / "other.key.pub", public]).verify()


def test_an_unsigned_bundle_is_refused_where_keys_are_trusted(copy, public):
    Bundle.open(copy)
    with pytest.raises(BundleSignatureError, match=r"is not signed.*python -m export sign"):
        Bundle.open(copy, [public])


def test_a_foreign_key_is_refused(signed, tmp_path):
    assert export(["keygen", "--out", str(tmp_path / "other.key")]) == 0
    with pytest.raises(BundleSignatureError, match=r"by no trusted key \(.*other\.key\.pub\)"):
        Bundle.open(signed, [tmp_path / "other.key.pub"])


@pytest.mark.parametrize(
    "damage", [lambda raw: raw + b" ", lambda raw: raw.replace(b"tiny", b"tinx"), lambda raw: b"{}"]
)
def test_a_changed_manifest_is_refused_before_it_is_read(signed, public, damage):
    manifest = signed / "manifest.json"
    manifest.write_bytes(damage(manifest.read_bytes()))
    with pytest.raises(BundleSignatureError, match="changed since"):
        Bundle.open(signed, [public])


@pytest.mark.parametrize("content", [b"", b"x" * 63, b"x" * 64, b"x" * 65, b"x" * 100_000])
def test_what_is_no_signature_is_refused(signed, public, content):
    (signed / SIGNATURE_FILE).write_bytes(content)
    with pytest.raises(BundleSignatureError, match="export sign"):
        Bundle.open(signed, [public])


def test_a_signature_that_is_a_link_is_refused(signed, public, tmp_path):
    (signed / SIGNATURE_FILE).rename(tmp_path / "elsewhere")
    (signed / SIGNATURE_FILE).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(BundleSignatureError, match="is a link"):
        Bundle.open(signed, [public])


def test_a_key_that_is_none_is_a_mistake_in_the_settings(signed, key, tmp_path):
    for file, message in ((tmp_path / "none.pub", "cannot be read"), (key, "no Ed25519 public key")):
        with pytest.raises(ConfigError, match=message):
            Bundle.open(signed, [file])


def test_without_cryptography_only_signed_bundles_are_out_of_reach(signed, public, monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] == "cryptography"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "cryptography", None)
    Bundle.open(signed).verify()
    with pytest.raises(ConfigError, match=r"pip install 'edge-llm\[signing\]'"):
        Bundle.open(signed, [public])


def test_a_damaged_bundle_is_not_signed(copy, key, capsys):
    (copy / "tokenizer.json").write_bytes(b"{}")
    assert export(["sign", str(copy), "--key", str(key)]) == 2
    assert not (copy / SIGNATURE_FILE).exists()
    assert "tokenizer.json" in capsys.readouterr().err


def test_a_key_that_all_may_read_does_not_sign(copy, key, capsys):
    key.chmod(0o644)
    assert export(["sign", str(copy), "--key", str(key)]) == 2
    assert "chmod 600" in capsys.readouterr().err


def test_the_private_key_is_for_its_owner_and_never_overwritten(key, capsys):
    assert key.stat().st_mode & 0o777 == 0o600
    before = key.read_bytes()
    assert export(["keygen", "--out", str(key)]) == 2
    assert "there already" in capsys.readouterr().err
    assert key.read_bytes() == before


def test_what_is_no_private_key_does_not_sign(copy, public, tmp_path, capsys):
    for file in (public, copy / "manifest.json", tmp_path / "none"):
        if file.exists():
            file.chmod(0o600)
        assert export(["sign", str(copy), "--key", str(file)]) == 2
    assert "Traceback" not in capsys.readouterr().err


def test_verify_says_what_was_checked(signed, copy, public, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(signed.parent))
    assert cli.main(["verify", "--bundle", str(signed), "--public-key", str(public)]) == 0
    assert "signed by a trusted key" in capsys.readouterr().out
    assert cli.main(["verify", "--bundle", str(signed)]) == 0
    assert "was not checked" in capsys.readouterr().out
    assert cli.main(["verify", "--bundle", str(TINY_BUNDLE)]) == 0
    assert "not signed" in capsys.readouterr().out
    (signed / "graphs" / "cpu-int8" / "model.onnx.data").write_bytes(b"")
    assert cli.main(["verify", "--bundle", str(signed), "--public-key", str(public)]) == 1
    assert "0 bytes, the manifest says" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["serve", "demo", "bench", "prepare", "tune", "doctor"])
def test_every_command_that_opens_a_bundle_asks_for_the_signature(command, copy, public, capsys, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(copy.parent))
    arguments = [command, "--bundle", str(copy), "--set", f'bundle_keys=["{public}"]', "--port", "1"]
    assert cli.main(arguments) == (1 if command == "doctor" else 2)
    output = capsys.readouterr()
    assert "is not signed" in output.err + output.out


def test_nothing_of_an_unsigned_manifest_is_used(copy, public):
    (copy / "manifest.json").write_bytes(b"not even JSON")
    with pytest.raises(BundleSignatureError):
        Bundle.open(copy, [public])
    with pytest.raises(ManifestError):
        Bundle.open(copy)
