"""examples/mosquitto, as it stands there but for ports and folders: who may what, by password and by certificate."""

from __future__ import annotations

import os
import queue
import subprocess
import threading
from pathlib import Path

import pytest
from paho.mqtt.client import Client
from paho.mqtt.enums import CallbackAPIVersion, MQTTProtocolVersion

from edge_llm.config import MqttConfig, TlsConfig
from edge_llm.local_broker import mosquitto_path
from edge_llm.mqtt.asking import Asker, BrokerUnreachableError
from tests.brokers import LocalBroker, free_port
from tests.certificates import CertificateAuthority
from tests.mqtt.fakes import WAIT_S, RunningGateway

pytestmark = pytest.mark.broker
EXAMPLE = Path(__file__).parent.parent.parent / "examples" / "mosquitto"
USERS = ("edge", "host", "ann", "bob", "+", "reply")
NODE = "edge_llm/v1/edge"
NOT_AUTHORIZED = 0x87


class ExampleBroker(LocalBroker):
    """mosquitto with the example's files."""

    name = "mosquitto"

    def __init__(self, folder: Path) -> None:
        self.tls_port = free_port()
        port = free_port()
        replaced = {
            "listener 1883 127.0.0.1": f"listener {port} 127.0.0.1",
            "listener 8883": f"listener {self.tls_port} 127.0.0.1",
            "/etc/mosquitto": str(folder),
            "/var/lib/mosquitto": str(folder / "data"),
        }
        text = (EXAMPLE / "mosquitto.conf").read_text()
        for old, new in replaced.items():
            assert old in text
            text = text.replace(old, new)
        if os.geteuid() == 0:
            text += "user root\n"
        (folder / "data").mkdir()
        (folder / "mosquitto.conf").write_text(text)
        (folder / "acl").write_text((EXAMPLE / "acl").read_text())
        passwords = folder / "passwords"
        passwords.touch(mode=0o600)
        for user in USERS:
            command = ["mosquitto_passwd", "-b", str(passwords), user, f"{user}'s secret"]
            subprocess.run(command, check=True, capture_output=True)
        super().__init__(folder, port, [mosquitto_path() or "mosquitto", "-c", str(folder / "mosquitto.conf")])


class User:
    """A bare client that has proven its name with a password."""

    def __init__(self, port: int, name: str, *topics: str) -> None:
        self.messages: queue.Queue[str] = queue.Queue()
        self._acknowledged: queue.Queue[int] = queue.Queue()
        ready = threading.Event()
        self._client = Client(CallbackAPIVersion.VERSION2, protocol=MQTTProtocolVersion.MQTTv5)
        self._client.username_pw_set(name, f"{name}'s secret")
        self._client.on_message = lambda _client, _data, message: self.messages.put(message.topic)
        self._client.on_publish = lambda _client, _data, _mid, reason, _properties: self._acknowledged.put(reason.value)
        self._client.on_subscribe = lambda *_: ready.set()
        self._client.on_connect = lambda client, *_: client.subscribe([(topic, 1) for topic in topics or ("none",)])
        self._client.connect("127.0.0.1", port)
        self._client.loop_start()
        assert ready.wait(WAIT_S)

    def __enter__(self) -> User:
        return self

    def __exit__(self, *_: object) -> None:
        self._client.disconnect()
        self._client.loop_stop()

    def may_publish(self, topic: str, payload: str = "say hi") -> bool:
        self._client.publish(f"edge_llm/v1/{topic}", payload, qos=1)
        return self._acknowledged.get(timeout=WAIT_S) != NOT_AUTHORIZED

    def seen_so_far(self) -> set[str]:
        """The topics of all messages that the broker has sent until now."""
        self.may_publish("nobody/query/nobody")  # its acknowledgement comes behind them
        return {self.messages.get_nowait() for _ in range(self.messages.qsize())}


@pytest.fixture
def authority(tmp_path):
    return CertificateAuthority(tmp_path / "certs")


@pytest.fixture
def broker(tmp_path, authority):
    authority.issue_server()
    broker = ExampleBroker(tmp_path)
    broker.start()
    yield broker
    broker.stop()


def secret(folder, user):
    path = folder / f"{user}.secret"
    path.touch(mode=0o600)
    path.write_text(f"{user}'s secret")
    return {"username": user, "password_file": str(path)}


@pytest.fixture
def daemon(broker, tmp_path):
    with RunningGateway(broker.port, **secret(tmp_path, "edge")) as running:
        yield running


def asker(broker, folder, user):
    return Asker(MqttConfig(port=broker.port, **secret(folder, user)), user=user)


def certified(broker, authority, user, ca_file=None):
    """Settings of a client with a certificate."""
    cert_file, key_file = authority.issue(user)
    tls = TlsConfig(
        enabled=True, ca_file=str(ca_file or authority.certificate), cert_file=str(cert_file), key_file=str(key_file)
    )
    return {"port": broker.tls_port, "tls": tls}


def test_everybody_asks_in_their_own_name(broker, daemon, tmp_path):
    for user in ("ann", "bob", "host"):
        with asker(broker, tmp_path, user) as client:
            assert client.wait_online(WAIT_S)["state"] == "online"
            assert client.ask("say hi", timeout_s=WAIT_S)["text"] == "hi"


def test_nobody_asks_in_anothers_name(broker, daemon):
    with User(broker.port, "ann") as ann:
        for kind in ("query", "partial", "cancel", "feedback"):
            assert ann.may_publish(f"edge/{kind}/ann")
            assert not ann.may_publish(f"edge/{kind}/bob")
    assert daemon.scheduler.next().user == "ann"
    assert daemon.scheduler.count == 1


@pytest.mark.parametrize("user", ["ann", "host", "+", "reply"])
def test_nobody_reads_anothers_replies(broker, daemon, tmp_path, user):
    with User(broker.port, user, "#", f"{NODE}/#", f"{NODE}/reply/bob/#", "edge_llm/v1/+/+/+/#") as curious:
        with asker(broker, tmp_path, "bob") as bob:
            bob.wait_online(WAIT_S)
            assert bob.ask("say hi", timeout_s=WAIT_S)["text"] == "hi"
        seen = curious.seen_so_far()
    assert not any("bob" in topic for topic in seen)
    # mosquitto gives nothing to a name that would be a wildcard in a pattern.
    assert (f"{NODE}/status" in seen) == (user != "+")


def test_only_the_daemon_speaks_for_the_node_and_only_the_host_says_how_it_is(broker, daemon):
    with User(broker.port, "ann") as ann, User(broker.port, "host") as host, User(broker.port, "edge") as edge:
        for place in ("status", "info", "metrics", "reply/ann/default", "reply/bob/default"):
            assert not ann.may_publish(f"edge/{place}")
            assert not host.may_publish(f"edge/{place}")
            assert edge.may_publish(f"edge/{place}", "{}")
        assert not edge.may_publish("other/status")
        assert not ann.may_publish("edge/state/range_km", "120")
        assert host.may_publish("edge/state/range_km", "120")


def test_the_values_of_the_host_reach_the_daemon_and_the_metrics_the_host(broker, daemon):
    with User(broker.port, "host", f"{NODE}/metrics") as host, User(broker.port, "ann", f"{NODE}/#") as ann:
        assert host.may_publish("edge/state/range_km", "120")
        assert host.may_publish("edge/query/host")
        daemon.scheduler.next("host")  # what came before it has arrived, too
        assert daemon.gateway.state_values.get("range_km", "integer") == "120"
        with User(broker.port, "edge") as edge:
            assert edge.may_publish("edge/metrics", "{}")
        assert f"{NODE}/metrics" in host.seen_so_far()
        assert f"{NODE}/metrics" not in ann.seen_so_far()


def test_a_stranger_is_refused(broker, tmp_path):
    wrong = secret(tmp_path, "ann")
    Path(wrong["password_file"]).write_text("guess")
    for settings in ({}, wrong):
        with pytest.raises(BrokerUnreachableError, match="refused the connection"):
            Asker(MqttConfig(port=broker.port, **settings), user="ann").connect(2.0)


@pytest.mark.parametrize("protocol", ["5", "3.1.1"])
def test_certificates_say_who_it_is(broker, authority, protocol):
    edge, ann = (certified(broker, authority, user) for user in ("edge", "ann"))
    settings = {"port": edge["port"], "tls": edge["tls"], "protocol": protocol}
    with RunningGateway(**settings) as running:
        with Asker(MqttConfig(**ann, protocol=protocol), user="ann") as client:
            client.wait_online(WAIT_S)
            assert client.ask("say hi", timeout_s=WAIT_S)["text"] == "hi"
        with Asker(MqttConfig(**ann, protocol=protocol), user="bob") as pretender:
            pretender.send("say hi")
        with Asker(MqttConfig(**ann, protocol=protocol), user="ann") as client:
            client.ask("say it again", timeout_s=WAIT_S)
        assert {running.scheduler.next().user for _ in range(2)} == {"ann"}
        assert running.scheduler.count == 2


def test_a_client_without_a_good_certificate_is_refused(broker, authority, tmp_path):
    other = CertificateAuthority(tmp_path / "other")
    strange = certified(broker, other, "ann", ca_file=authority.certificate)
    bare = {"port": broker.tls_port, "tls": TlsConfig(enabled=True, ca_file=str(authority.certificate))}
    for settings in (strange, bare):
        with pytest.raises(BrokerUnreachableError):
            Asker(MqttConfig(**settings), user="ann").connect(2.0)


def test_a_broker_of_another_authority_is_refused(broker, authority, tmp_path):
    other = CertificateAuthority(tmp_path / "other")
    settings = certified(broker, authority, "ann", ca_file=other.certificate)
    with pytest.raises(BrokerUnreachableError, match="certificate verify failed"):
        Asker(MqttConfig(**settings), user="ann").connect(2.0)
    # Nor is one of the right authority whose name is another.
    settings = certified(broker, authority, "bob")
    with pytest.raises(BrokerUnreachableError, match="certificate"):
        Asker(MqttConfig(host="localhost", **settings), user="bob").connect(2.0)


def test_what_is_retained_survives_the_broker(broker, tmp_path):
    with RunningGateway(broker.port, **secret(tmp_path, "edge")):
        pass
    broker.stop()
    broker.start()
    with User(broker.port, "ann", f"{NODE}/status") as ann:
        assert ann.seen_so_far() == {f"{NODE}/status"}
