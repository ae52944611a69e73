"""``edge-llm install`` into a folder, as for an image."""

from __future__ import annotations

import json
import os

import msgspec
import pytest

from edge_llm import cli
from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig, MqttConfig, load_config, read_toml
from edge_llm.device.session import CPU, CUDA
from edge_llm.engine.loading import memory_needs
from edge_llm.unit_files import Machine, drop_in_text, is_loopback, memory_limit_bytes, quoted, unit_text
from tests.bundle.test_signature import copy, key, public, signed  # noqa: F401 - fixtures
from tests.paths import TINY_BUNDLE

CONFIG = "etc/edge-llm/config.toml"
UNIT = "etc/systemd/system/edge-llm.service"
DROP_IN = f"{UNIT}.d/10-machine.conf"
GPU = f"{UNIT}.d/20-gpu.conf"
BUNDLE = ("--bundle", str(TINY_BUNDLE))


@pytest.fixture
def install(tmp_path):
    def install(*arguments, device="raspberry-pi-5", status=0):
        named = () if device is None else ("--device", device)
        assert cli.main(["install", "--root", str(tmp_path), *named, *arguments]) == status

    return install


def files(root):
    return {str(path.relative_to(root)) for path in root.rglob("*") if path.is_file()}


def test_it_writes_unit_config_and_limits(install, tmp_path):
    install(*BUNDLE, "--host", "10.0.0.7", "--node", "car7", "--set", "engine.threads=3", "--yes")
    assert files(tmp_path) == {CONFIG, UNIT, DROP_IN, "etc/edge-llm/install.json"}
    assert (tmp_path / UNIT).read_text() == unit_text("edge-llm.service")
    config = load_config(config_file=tmp_path / CONFIG)
    assert (config.mqtt.host, config.mqtt.node, config.device) == ("10.0.0.7", "car7", "raspberry-pi-5")
    assert (config.bundle, config.cache_dir) == (str(TINY_BUNDLE), "/var/cache/edge-llm")
    lines = (tmp_path / DROP_IN).read_text().splitlines()
    assert "ExecStart=/opt/edge-llm/bin/edge-llm serve --config /etc/edge-llm/config.toml" in lines
    assert "CPUQuota=400%" in lines
    assert any(line.startswith("MemoryMax=") for line in lines)
    assert not any(line.startswith("IPAddress") for line in lines)


def test_what_the_daemon_must_read_is_readable_whatever_the_umask(install, tmp_path):
    before = os.umask(0o077)
    try:
        install(*BUNDLE, "--yes")
    finally:
        os.umask(before)
    assert (tmp_path / CONFIG).stat().st_mode & 0o777 == 0o644
    assert (tmp_path / CONFIG).parent.stat().st_mode & 0o777 == 0o755


def test_a_dry_run_shows_all_and_writes_nothing(install, tmp_path, capsys):
    install(*BUNDLE, "--dry-run")
    assert files(tmp_path) == set()
    shown = capsys.readouterr().out
    for name in (CONFIG, UNIT, DROP_IN, "MemoryMax="):
        assert name in shown


@pytest.mark.parametrize(("answer", "written"), [("y", True), ("", False), ("no", False)])
def test_it_asks(install, tmp_path, monkeypatch, answer, written):
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda _prompt: answer)
    install(*BUNDLE, status=0 if written else 1)
    assert bool(files(tmp_path)) == written


def test_without_a_terminal_it_wants_to_be_told(install, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    install(*BUNDLE, status=2)
    assert "--yes" in capsys.readouterr().err


def test_a_config_that_is_there_is_used_and_kept(install, tmp_path, capsys):
    config = tmp_path / CONFIG
    config.parent.mkdir(parents=True)
    config.write_text(f'bundle = "{TINY_BUNDLE}"\ndevice = "x86-64"\n[mqtt]\nhost = "localhost"\n')
    before = config.read_text()
    install("--yes", device=None)
    assert config.read_text() == before
    assert "IPAddressAllow=localhost" in (tmp_path / DROP_IN).read_text()
    install("--host", "elsewhere", "--yes", status=2)
    assert "change it there" in capsys.readouterr().err
    install("--uninstall", "--yes", device=None)
    assert files(tmp_path) == {CONFIG}
    assert "it is yours" in capsys.readouterr().out


def test_a_config_file_is_taken_as_it_is(install, tmp_path):
    source = tmp_path / "mine.toml"
    source.write_text(f'# mine\nbundle = "{TINY_BUNDLE}"\ndevice = "x86-64"\n')
    install("--config", str(source), "--yes", device=None)
    assert (tmp_path / CONFIG).read_text() == source.read_text()
    (tmp_path / CONFIG).unlink()
    install("--config", str(source), "--yes", status=2)


def test_uninstall_leaves_nothing_behind(install, tmp_path):
    (tmp_path / "etc/systemd/system").mkdir(parents=True)
    (tmp_path / "etc/systemd/system/other.service").write_text("[Service]\n")
    install(*BUNDLE, "--yes")
    install("--yes", device=None)  # again, as after an upgrade
    install("--uninstall", "--yes", device=None)
    assert files(tmp_path) == {"etc/systemd/system/other.service"}
    assert not (tmp_path / "etc/edge-llm").exists()
    assert not (tmp_path / DROP_IN).parent.exists()
    install("--uninstall", "--yes", device=None, status=2)


def test_uninstall_keeps_what_was_changed_and_what_others_wrote(install, tmp_path, capsys):
    install(*BUNDLE, "--yes")
    with (tmp_path / CONFIG).open("a") as config:
        config.write("\n[serving]\nmax_queued = 5\n")
    (tmp_path / f"{UNIT}.d/override.conf").write_text("[Service]\nNice=5\n")
    (tmp_path / "etc/edge-llm/mqtt-password").write_text("secret\n")
    (tmp_path / DROP_IN).unlink()
    install("--uninstall", "--yes", device=None)
    assert files(tmp_path) == {CONFIG, f"{UNIT}.d/override.conf", "etc/edge-llm/mqtt-password"}
    assert "changed since" in capsys.readouterr().out


def test_a_changed_unit_is_renewed_and_the_old_one_stays_beside_it(install, tmp_path, capsys):
    install(*BUNDLE, "--yes")
    (tmp_path / UNIT).write_text("[Service]\n# mine\n")
    install("--yes", device=None)
    assert (tmp_path / UNIT).read_text() == unit_text("edge-llm.service")
    assert (tmp_path / f"{UNIT}.old").read_text() == "[Service]\n# mine\n"
    assert f"/{UNIT}.old" in capsys.readouterr().out


def test_the_gpu_drop_in_comes_and_goes_with_the_provider(install, tmp_path):
    install(*BUNDLE, "--yes", device="jetson-orin-nano")
    assert (tmp_path / GPU).read_text() == unit_text("edge-llm-gpu.conf")
    text = (tmp_path / CONFIG).read_text()
    (tmp_path / CONFIG).write_text(f'{text}\n[engine]\nproviders = ["CPUExecutionProvider"]\n')
    install("--yes", device=None)
    assert not (tmp_path / GPU).exists()
    assert GPU not in json.loads((tmp_path / "etc/edge-llm/install.json").read_text())["written"]


@pytest.mark.parametrize("there", [True, False])
def test_only_a_group_that_exists_is_named(install, tmp_path, there):
    (tmp_path / "etc").mkdir()
    (tmp_path / "etc/group").write_text("video:x:44:\nrender:x:104:\n" if there else "video:x:44:\n")
    install(*BUNDLE, "--yes", device="jetson-orin-nano")
    assert ("SupplementaryGroups=render" in (tmp_path / DROP_IN).read_text()) == there


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--bundle", "/home/ann/bundle"), "/home/ann/bundle, which the service cannot see"),
        ((*BUNDLE, "--command", "/root/venv/bin/edge-llm"), "which the service cannot see"),
        ((*BUNDLE, "--command", "edge-llm"), "give the whole path"),
        ((*BUNDLE, "--set", "engine.thread=1"), "thread"),
    ],
)
def test_what_could_not_run_is_refused(install, tmp_path, capsys, arguments, message):
    install(*arguments, "--yes", status=2)
    assert message in capsys.readouterr().err
    assert files(tmp_path) == set()


def test_no_name_of_a_bundle_becomes_a_line_of_the_drop_in():
    bundle = Bundle.open(TINY_BUNDLE)
    hostile = "\n[Service]\r\nExecStartPre=+/bin/sh\u2028\n"
    manifest = msgspec.structs.replace(bundle.manifest, name=hostile, version=hostile)
    named = Bundle(bundle.path, manifest, bundle.digest)
    usual, hidden = (drop_in_text(Machine(("/x",), Config(), one)).splitlines() for one in (bundle, named))
    assert hidden[1:] == usual[1:]
    assert hidden[0].startswith("# For ")


def test_keys_are_found_from_wherever_the_service_runs(install, tmp_path, monkeypatch, signed, public):  # noqa: F811
    monkeypatch.chdir(public.parent)
    config = msgspec.json.encode([public.name]).decode()
    monkeypatch.setattr("edge_llm.install_command._HIDDEN", ("/home",))  # the test's own folder is below /tmp
    install("--bundle", str(signed), "--set", f"bundle_keys={config}", "--yes")
    assert load_config(config_file=tmp_path / CONFIG).bundle_keys == (str(public),)


@pytest.mark.parametrize("setting", ["bundle", "bundle_keys", "mqtt.password_file", "mqtt.tls.ca_file"])
@pytest.mark.parametrize(("path", "message"), [("x.pem", "give the whole path"), ("/home/ann/x.pem", "cannot see")])
def test_files_that_the_service_would_not_find_are_refused(install, tmp_path, capsys, setting, path, message):
    table, _, name = setting.rpartition(".")
    value = f'["{path}"]' if name == "bundle_keys" else f'"{path}"'
    bundle = "" if name == "bundle" else f'bundle = "{TINY_BUNDLE}"\n'
    head = f"[{table}]\n" if table else ""
    source = tmp_path / "mine.toml"
    source.write_text(f'{bundle}device = "x86-64"\n{head}{name} = {value}\n')
    install("--config", str(source), "--yes", device=None, status=2)
    assert message in capsys.readouterr().err
    assert not (tmp_path / CONFIG).exists()


@pytest.mark.parametrize("setting", ["bundle_store", "state_dir", "cache_dir"])
def test_a_folder_elsewhere_is_opened_to_the_service(install, tmp_path, setting):
    install(*BUNDLE, "--set", f'{setting}="/data//models/../bundles"', "--yes")
    lines = (tmp_path / DROP_IN).read_text().splitlines()
    assert "ReadWritePaths=-/data/bundles" in lines
    assert f"# {setting}; the user edge-llm must own them." in lines


@pytest.mark.parametrize(
    "folder", ["/var/lib/edge-llm/others", "/var/cache/private/edge-llm", "/run/edge-llm", "//var/lib/edge-llm"]
)
def test_what_systemd_makes_is_the_services_already(install, tmp_path, folder):
    install(*BUNDLE, "--set", f'bundle_store="{folder}"', "--yes")
    assert "ReadWritePaths" not in (tmp_path / DROP_IN).read_text()


@pytest.mark.parametrize(
    ("folder", "message"),
    [
        ("bundles", "give the whole path"),
        ("/home/ann/bundles", "cannot see"),
        ("/data/%h", "may have letters"),
        ("/data/a b", "may have letters"),
        ("/data\\nExecStartPre=/bin/sh", "may have letters"),
        ("/", "may have letters"),
    ],
)
def test_a_store_that_the_service_could_not_have_is_refused(install, tmp_path, capsys, folder, message):
    install(*BUNDLE, "--set", f'bundle_store="{folder}"', "--yes", status=2)
    assert message in capsys.readouterr().err
    assert files(tmp_path) == set()


@pytest.mark.parametrize(
    ("setting", "owner", "is_taken"),
    [
        ("state_dir", None, False),
        ("state_dir", 0, False),
        ("state_dir", 65534, True),
        ("bundle_store", None, False),
        ("bundle_store", 0, True),  # root alone changes what the daemon serves
    ],
)
def test_on_the_machine_itself_somebody_must_own_a_folder_elsewhere(
    install, tmp_path, monkeypatch, capsys, setting, owner, is_taken
):
    monkeypatch.setattr("edge_llm.install_command.SYSTEM_ROOT", tmp_path)
    if owner is not None:
        (tmp_path / "data/bundles").mkdir(parents=True)
        real = os.stat(tmp_path / "data/bundles")
        owned = os.stat_result((*real[:4], owner, *real[5:10]))
        monkeypatch.setattr("pathlib.Path.stat", lambda path, **_: owned if path.name == "bundles" else os.stat(path))
    settings = ("--command", "/opt/x", "--set", f'{setting}="/data/bundles"')
    install(*BUNDLE, *settings, "--dry-run", status=0 if is_taken else 2)
    said = "".join(capsys.readouterr())
    assert ("ReadWritePaths=-/data/bundles" in said) == is_taken
    assert ("install -d -o edge-llm -g edge-llm /data/bundles" in said) != is_taken


def test_the_board_of_an_image_has_to_be_named(install, capsys):
    install(*BUNDLE, "--yes", device=None, status=2)
    assert "--device" in capsys.readouterr().err


def test_a_record_that_cannot_be_read_is_named(install, tmp_path, capsys):
    install(*BUNDLE, "--yes")
    (tmp_path / "etc/edge-llm/install.json").write_text("{")
    install("--uninstall", "--yes", device=None, status=2)
    assert "install.json" in capsys.readouterr().err


def test_the_memory_limit_holds_what_the_bundle_needs():
    bundle = Bundle.open(TINY_BUNDLE)
    small, large = (Config(engine=EngineConfig(slots=slots)) for slots in (1, 64))
    assert memory_limit_bytes(bundle, small) < memory_limit_bytes(bundle, large)
    for graph in bundle.manifest.graphs:
        assert sum(memory_needs(bundle, large, graph).values()) < memory_limit_bytes(bundle, large)


def memory_comment(engine: EngineConfig) -> str:
    text = drop_in_text(Machine(("/bin/x",), Config(engine=engine), Bundle.open(TINY_BUNDLE)))
    return next(line for line in text.splitlines() if "prefix cache" in line)


def test_memory_is_planned_for_the_graph_and_the_provider_that_the_board_would_use():
    """On a machine whose onnxruntime has no CUDA, as where an image is made."""
    targets = {CUDA: ("cpu-fp32",), CPU: ("cpu-int8",)}
    own, both = (EngineConfig(providers=names, targets=targets, context=32) for names in ((CPU,), (CUDA, CPU)))
    bundle = Bundle.open(TINY_BUNDLE)
    positions = bundle.manifest.model.max_seq_len
    assert positions > 32
    assert "# the cpu-int8 graph on CPUExecutionProvider: weights " in memory_comment(own)
    assert "slots of 32 tokens" in memory_comment(own)
    # The device takes the graph's whole cache; its memory is the board's.
    assert "# the cpu-fp32 graph on CUDAExecutionProvider: weights " in memory_comment(both)
    assert f"slots of {positions} tokens" in memory_comment(both)
    needs = sum(memory_needs(bundle, Config(engine=both), bundle.manifest.graph("cpu-fp32"), CUDA).values())
    assert needs < memory_limit_bytes(bundle, Config(engine=both))


def test_memory_is_planned_for_the_provider_that_comes_when_the_first_one_fails():
    slots = {"slots": 64, "targets": {CUDA: ("cpu-int8",), CPU: ("cpu-fp32",)}}
    assert "the cpu-fp32 graph on CPU" in memory_comment(EngineConfig(providers=(CUDA, CPU), **slots))


def test_without_a_graph_to_choose_the_largest_is_planned_for():
    for engine in (EngineConfig(target="cuda"), EngineConfig(providers=(CUDA,), targets={CUDA: ("cuda",)})):
        assert "the cpu-fp32 graph on CPU" in memory_comment(engine)


def test_the_processors_of_affinity_are_those_of_the_service():
    engine = EngineConfig(affinity=(5, 4), threads=2)
    text = drop_in_text(Machine(("/bin/x",), Config(engine=engine), Bundle.open(TINY_BUNDLE)))
    assert "AllowedCPUs=4 5" in text
    assert "CPUQuota" not in text


def test_a_local_broker_is_all_that_is_reached():
    hosts = {"127.0.0.1": True, "::1": True, "localhost": True, "broker": False, "10.0.0.1": False}
    for host, local in hosts.items():
        assert is_loopback(host) == local
        config = Config(mqtt=MqttConfig(host=host))
        text = drop_in_text(Machine(("/bin/x",), config, Bundle.open(TINY_BUNDLE)))
        assert ("IPAddressDeny=any" in text) == local


@pytest.mark.parametrize(
    ("argument", "written"),
    [("/opt/a", "/opt/a"), ("/opt/a b", '"/opt/a b"'), ("50%$x", "50%%$$x"), ('a"b\\', '"a\\"b\\\\"'), ("", '""')],
)
def test_arguments_are_quoted_as_systemd_reads_them(argument, written):
    assert quoted(argument) == written


def test_settings_survive_the_config_file(install, tmp_path):
    install(*BUNDLE, "--yes", "--set", 'serving.system_prompt="Say \\"hi\\"\\nÄ"', "--set", "power.warm_c=61.5")
    table = read_toml(tmp_path / CONFIG)
    assert table["serving"]["system_prompt"] == 'Say "hi"\nÄ'
    assert table["power"]["warm_c"] == 61.5
