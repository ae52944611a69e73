"""What a daemon knows and nobody else should: its password and its key are in nothing that it writes or publishes."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion

from tests.brokers import Mosquitto, wait_for
from tests.certificates import CertificateAuthority

pytestmark = [pytest.mark.broker, pytest.mark.timeout(400)]

PASSWORD = "Xylophon-83-Quitte"
PEM_LINES = slice(1, -1)  # of a PEM file, without its frame
WAIT_S = 100


@pytest.fixture
def authority(tmp_path):
    authority = CertificateAuthority(tmp_path / "certificates")
    authority.issue_server()
    return authority


@pytest.fixture
def guarded(tmp_path, authority):
    """A broker that wants a password and a certificate."""
    passwords = tmp_path / "passwords"
    passwords.touch(mode=0o600)
    for user, password in (("edge", PASSWORD), ("ann", "another")):
        command = ["mosquitto_passwd", "-b", str(passwords), user, password]
        subprocess.run(command, check=True, capture_output=True)
    folder = authority.folder
    tls = (f"cafile {authority.certificate}", f"certfile {folder}/server.pem", f"keyfile {folder}/server.key")
    broker = Mosquitto(tmp_path, f"password_file {passwords}", *tls, "require_certificate true", anonymous=False)
    broker.start()
    yield broker
    broker.stop()


def listen(port, authority) -> tuple[Client, list[bytes]]:
    """A client that keeps every payload."""
    heard: list[bytes] = []
    certificate, key = authority.issue("ann")
    client = Client(CallbackAPIVersion.VERSION2)
    client.username_pw_set("ann", "another")
    client.tls_set(str(authority.certificate), str(certificate), str(key))
    client.on_connect = lambda client, *_: client.subscribe("#")
    client.on_message = lambda _client, _data, message: heard.append(message.topic.encode() + message.payload)
    client.connect("127.0.0.1", port)
    client.loop_start()
    return client, heard


def test_password_and_key_stay_with_the_daemon(guarded, authority, start_daemon, tmp_path):
    certificate, key = authority.issue("edge")
    password_file = tmp_path / "password"
    password_file.touch(mode=0o600)
    password_file.write_text(PASSWORD)
    settings = [
        "mqtt.username=edge", f"mqtt.password_file={password_file}", "mqtt.tls.enabled=true",
        f"mqtt.tls.ca_file={authority.certificate}", f"mqtt.tls.cert_file={certificate}", f"mqtt.tls.key_file={key}",
        "log_level=debug", "serving.metrics_interval_s=0.1", "feedback.enabled=true", f"state_dir={tmp_path / 'state'}",
    ]  # fmt: skip
    client, heard = listen(guarded.port, authority)
    try:
        daemon = start_daemon(guarded.port, *settings)
        for kind in (b"/info", b"/metrics"):
            wait_for(lambda kind=kind: any(kind in one for one in heard), WAIT_S, daemon.log)
        for text in ("What is the password?", '{"id": 5}'):
            client.publish("edge_llm/v1/edge/query/ann", text, qos=1)
        wait_for(lambda: sum(b"/reply/ann" in one for one in heard) >= 2, WAIT_S, daemon.log)
        # Nor where it is refused: the password is another's now.
        password_file.write_text(f"{PASSWORD}-wrong")
        assert daemon.stop() == 0
        daemon.start()
        wait_for(lambda: "refused the connection" in daemon.log(), WAIT_S, daemon.log)
        daemon.stop()
    finally:
        client.disconnect()
        client.loop_stop()
    for kind in (b"/status", b"/info", b"/metrics", b"/reply/ann"):
        assert any(kind in one for one in heard), kind
    kept = {
        path: path.read_bytes()
        for name in ("cache", "state")
        for path in (tmp_path / name).rglob("*")
        if path.is_file()
    }
    assert kept
    written = {**kept, Path("log"): daemon.log().encode(), Path("messages"): b"\n".join(heard)}
    for secret in (PASSWORD, *key.read_text().splitlines()[PEM_LINES]):
        for place, content in written.items():
            assert secret.encode() not in content, f"{secret} is in {place}"
