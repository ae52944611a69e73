"""Passwords, access control lists and TLS against a real mosquitto."""

from __future__ import annotations

import logging
import ssl
import subprocess

import pytest

from edge_llm.config import Config, MqttConfig, TlsConfig
from edge_llm.errors import ConfigError
from edge_llm.metrics import Metrics
from edge_llm.mqtt.asking import Asker, BrokerUnreachableError
from edge_llm.mqtt.connection import Credentials
from edge_llm.mqtt.gateway import Gateway
from tests.brokers import Mosquitto, wait_for
from tests.certificates import CertificateAuthority
from tests.mqtt.fakes import WAIT_S, RunningGateway

pytestmark = pytest.mark.broker
ACL = """
user device
topic readwrite edge_llm/v1/edge/#
user ann
topic write edge_llm/v1/edge/query/ann
topic read edge_llm/v1/edge/reply/ann/#
topic read edge_llm/v1/edge/status
"""


@pytest.fixture
def guarded(tmp_path):
    passwords = tmp_path / "passwords"
    for option, user in (("-c", "device"), ("", "ann")):
        arguments = ["mosquitto_passwd", "-b", *([option] if option else []), str(passwords), user, f"{user}'s secret"]
        subprocess.run(arguments, check=True, capture_output=True)
    acl = tmp_path / "acl"
    acl.write_text(ACL)
    acl.chmod(0o600)
    broker = Mosquitto(tmp_path, f"password_file {passwords}", f"acl_file {acl}", anonymous=False)
    broker.start()
    yield broker
    broker.stop()


def _secret(folder, text):
    path = folder / f"secret-{len(text)}"
    path.write_text(text)
    path.chmod(0o600)
    return str(path)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_user_and_password_and_acl(guarded, tmp_path, protocol):
    device = {"username": "device", "password_file": _secret(tmp_path, "device's secret\n"), "protocol": protocol}
    with RunningGateway(guarded.port, **device):
        config = MqttConfig(
            port=guarded.port, username="ann", password_file=_secret(tmp_path, "ann's secret"), protocol=protocol
        )
        with Asker(config, user="ann") as asker:
            assert asker.wait_online(WAIT_S)["state"] == "online"
            assert asker.ask("say hi", timeout_s=WAIT_S)["text"] == "hi"


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_a_wrong_password_is_said_once_and_tried_again(guarded, tmp_path, caplog, protocol):
    mqtt = MqttConfig(
        port=guarded.port,
        username="device",
        password_file=_secret(tmp_path, "wrong"),
        reconnect_min_s=0.01,
        reconnect_max_s=0.02,
        protocol=protocol,
    )
    gateway = Gateway(Config(mqtt=mqtt), Metrics())
    with caplog.at_level(logging.INFO, "edge_llm"):
        gateway.start()
        wait_for(lambda: guarded.log().count("Sending CONNACK") >= 3, WAIT_S)
        gateway.close(0.5)
    assert len(caplog.records) == 1
    assert "check mqtt.username and mqtt.password_file" in caplog.text
    assert "wrong" not in caplog.text


def test_what_the_acl_forbids_is_said(guarded, tmp_path, caplog):
    # mosquitto accepts a subscription that its ACL will never serve, but refuses the publication.
    mqtt = MqttConfig(port=guarded.port, username="ann", password_file=_secret(tmp_path, "ann's secret"))
    gateway = Gateway(Config(mqtt=mqtt), Metrics())
    with caplog.at_level(logging.WARNING, "edge_llm"):
        gateway.start()
        assert gateway.wait_connected(WAIT_S)
        gateway.close(WAIT_S)  # returns early: a refused message does not stay in the queue
    assert "edge_llm/v1/edge/status is lost: refused by the broker: Not authorized" in caplog.text


def test_the_client_says_why_it_cannot_connect(guarded):
    with pytest.raises(BrokerUnreachableError, match=r"check mqtt\.username"):
        Asker(MqttConfig(port=guarded.port), user="ann").connect(1.0)


@pytest.mark.parametrize(
    "settings",
    [
        {"username": "x", "password_file": "/no/such/file"},
        {"password_file": "/dev/null"},
        {"tls": TlsConfig(enabled=True, ca_file="/no/such/file")},
    ],
)
def test_files_that_cannot_be_used_are_named(settings):
    with pytest.raises(ConfigError, match=r"mqtt\.(password_file|tls)"):
        Gateway(Config(mqtt=MqttConfig(**settings)), Metrics())


@pytest.fixture
def certificates(tmp_path):
    """A folder with a CA, a certificate of 127.0.0.1 and one of a client."""
    authority = CertificateAuthority(tmp_path / "certificates")
    authority.issue_server()
    authority.issue("client")
    return authority.folder


def test_tls_with_certificates_on_both_sides(certificates, tmp_path):
    files = {
        name: str(certificates / name) for name in ("ca.pem", "server.pem", "server.key", "client.pem", "client.key")
    }
    broker = Mosquitto(
        tmp_path,
        f"cafile {files['ca.pem']}",
        f"certfile {files['server.pem']}",
        f"keyfile {files['server.key']}",
        "require_certificate true",
    )
    broker.start()
    tls = TlsConfig(enabled=True, ca_file=files["ca.pem"], cert_file=files["client.pem"], key_file=files["client.key"])
    try:
        with RunningGateway(broker.port, tls=tls), Asker(MqttConfig(port=broker.port, tls=tls)) as asker:
            asker.wait_online(WAIT_S)
            words = " ".join(f"word{n}" for n in range(300))
            deltas: list[str] = []
            assert asker.ask(f"say {words}", on_delta=deltas.append, timeout_s=WAIT_S)["text"] == words
            assert "".join(deltas).strip() == words
        # The broker's name is always checked.
        with pytest.raises(BrokerUnreachableError, match="certificate"):
            Asker(MqttConfig(host="localhost", port=broker.port, tls=tls)).connect(2.0)
    finally:
        broker.stop()


@pytest.mark.parametrize("mode", [0o644, 0o604, 0o602, 0o666])
def test_a_secret_that_is_open_to_all_is_refused(certificates, tmp_path, mode):
    password, key = tmp_path / "password", certificates / "client.key"
    password.write_text("secret")
    both = certificates / "both.pem"
    both.write_text((certificates / "client.pem").read_text() + key.read_text())
    for path in (password, key, both):
        path.chmod(mode)
    cert_file = str(certificates / "client.pem")
    for name, settings in (
        ("mqtt.password_file", {"username": "ann", "password_file": str(password)}),
        ("mqtt.tls.key_file", {"tls": TlsConfig(enabled=True, cert_file=cert_file, key_file=str(key))}),
        ("mqtt.tls.cert_file", {"tls": TlsConfig(enabled=True, cert_file=str(both))}),
    ):
        with pytest.raises(ConfigError, match=rf"{name}.*mode 0{mode:o}.*chmod 600"):
            Credentials.load(MqttConfig(**settings))


@pytest.mark.parametrize("mode", [0o600, 0o400, 0o640])
def test_a_secret_of_its_owner_or_a_group_is_taken(tmp_path, mode):
    path = tmp_path / "password"
    path.write_text("secret\n")
    path.chmod(mode)
    assert Credentials.load(MqttConfig(username="ann", password_file=str(path))).password == "secret"


def test_tls_is_new_enough_and_checks_whom_it_talks_to(certificates):
    tls = TlsConfig(enabled=True, ca_file=str(certificates / "ca.pem"))
    context = Credentials.load(MqttConfig(tls=tls)).tls
    assert context.minimum_version >= ssl.TLSVersion.TLSv1_2
    assert context.check_hostname
    assert context.verify_mode == ssl.CERT_REQUIRED
