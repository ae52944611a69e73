"""``edge-llm install``: shows what it is going to do to this machine, asks, and does it."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import msgspec

from edge_llm.bundle.manifest import Bundle
from edge_llm.bundle.shipped import shipped_bundle
from edge_llm.config import PASSWORD_CREDENTIAL, Config, cache_dir, load_config, merge
from edge_llm.device.board import detect_board
from edge_llm.device.profile import device_layer, tuned_layer
from edge_llm.errors import ConfigError
from edge_llm.installation import CONFIG_FILE, MACHINE_DROP_IN_FILE, Installation, Step
from edge_llm.unit_files import SERVICE_USER, UNIT, Machine, folders_elsewhere

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

SYSTEM_ROOT: Final = Path("/")
# As in the unit; so that `edge-llm cache --config …` finds what the daemon keeps.
_FOLDERS: Final = {"cache_dir": "/var/cache/edge-llm", "state_dir": "/var/lib/edge-llm"}
_IMAGE_COMMAND: Final = "/opt/edge-llm/bin/edge-llm"
# The unit hides these from the daemon: ProtectHome= and PrivateTmp=.
_HIDDEN: Final = ("/home", "/root", "/run/user", "/tmp", "/var/tmp")  # noqa: S108 - nothing is put there


@dataclass(frozen=True)
class InstallOptions:
    """What was said on the command line.

    Attributes:
        root: the machine's ``/``; another folder for an image.
        flags: settings, nested like ``Config``.
        config_file: what becomes the machine's config file, instead of ``flags``.
        command: the program that the service starts.
        dry_run: only show the plan.
        yes: do not ask.
    """

    root: Path = SYSTEM_ROOT
    flags: Mapping[str, Any] | None = None
    config_file: str | None = None
    command: str | None = None
    dry_run: bool = False
    yes: bool = False


def install(options: InstallOptions) -> int:
    """Install or renew the service; returns the exit status.

    Raises:
        ConfigError: a setting is wrong, a path is out of the service's sight, or a file cannot be written.
        BundleError: there is no usable bundle.
    """
    installation = Installation(options.root)
    machine, config_text = _machine(options, installation)
    steps = installation.plan_install(machine, config_text)
    manifest = machine.bundle.manifest
    print(f"edge-llm install, for {machine.config.device} and the bundle {manifest.name} {manifest.version}:")
    if not _agree(steps, options):
        return 0 if options.dry_run else 1
    failed = _carry_out(installation, steps)
    if options.root == SYSTEM_ROOT and not failed:
        print(f"installed. To start it now and at every boot: systemctl enable --now {UNIT}")
    return 1 if failed else 0


def uninstall(options: InstallOptions) -> int:
    """Remove what ``install`` has written and nobody has changed; returns the exit status.

    Raises:
        ConfigError: nothing was installed, or a file cannot be removed.
    """
    installation = Installation(options.root)
    steps = installation.plan_uninstall()
    print("edge-llm install --uninstall:")
    if not _agree(steps, options):
        return 0 if options.dry_run else 1
    failed = _carry_out(installation, steps)
    if not failed:
        installation.forget()
    folders = ", ".join((*_FOLDERS.values(), str(CONFIG_FILE.parent)))
    print(f"Kept, if they are there: caches, what users have said, and secrets, in {folders}")
    return 1 if failed else 0


def _agree(steps: list[Step], options: InstallOptions) -> bool:
    """Show the plan; whether it is to be carried out."""
    for step in steps:
        print(step)
    for step in steps:
        if step.content and step.what in (str(CONFIG_FILE), str(MACHINE_DROP_IN_FILE)):
            print(f"\n{step.what}:")
            print("".join(f"    {line}\n" for line in step.content.splitlines()), end="")
    if options.dry_run:
        return False
    if options.root == SYSTEM_ROOT and os.geteuid() != 0:
        raise ConfigError("run it as root, or with --dry-run, or with --root for another folder")
    if options.yes:
        return True
    if not sys.stdin.isatty():
        raise ConfigError("nobody is there to agree: give --yes")
    return input("\nGo on? [y/N] ").strip().lower() in ("y", "yes")


def _carry_out(installation: Installation, steps: list[Step]) -> bool:
    """Returns whether something failed."""
    failed = False
    for trouble in installation.apply(steps):
        print(f"edge-llm: {trouble}", file=sys.stderr)
        failed = True
    return failed


def _machine(options: InstallOptions, installation: Installation) -> tuple[Machine, str]:
    """What the drop-in is for, and the text of the config file if there is none yet."""
    flags = dict(options.flags or {})
    config_file = options.config_file
    if installation.has_config:
        if flags or config_file:
            raise ConfigError(f"there is a {CONFIG_FILE} already: change it there, and leave the settings out here")
        config_file = str(installation.below_root(CONFIG_FILE))
    elif config_file is None:
        if "bundle" in flags:
            flags["bundle"] = os.path.abspath(flags["bundle"])
        if keys := load_config(flags=flags).bundle_keys:
            flags["bundle_keys"] = [os.path.abspath(key) for key in keys]
        flags = {**_FOLDERS, **flags}
    elif flags:
        raise ConfigError("give --config, or the settings one by one, but not both")
    config = _config(options, config_file, flags)
    folder = config.bundle or str(shipped_bundle())
    _check_visible("the bundle", folder)
    _check_paths(config)
    if options.root == SYSTEM_ROOT:
        _check_owners(config, installation)
    in_image = installation.below_root(Path(folder)) if os.path.isabs(folder) else Path(folder)
    bundle = Bundle.open(in_image if in_image.exists() else folder, _keys(options, config))
    command = (*_command(options), "serve", "--config", str(CONFIG_FILE))
    text = Path(options.config_file).read_text(encoding="utf-8") if options.config_file else config_text(flags)
    return Machine(command, config, bundle, installation.groups), text


def _keys(options: InstallOptions, config: Config) -> list[Path]:
    """Where the trusted keys are now; the service finds them below its own root."""
    in_image = [(options.root / file.lstrip("/"), Path(file)) for file in config.bundle_keys]
    return [inside if inside.exists() else outside for inside, outside in in_image]


def _config(options: InstallOptions, config_file: str | None, flags: Mapping[str, Any]) -> Config:
    """The settings that the daemon will have: the environment of this shell is not among them."""
    first = load_config(config_file=config_file, flags=flags)
    device = first.device
    if device == "auto":
        if options.root != SYSTEM_ROOT:
            raise ConfigError("--root: the board of an image cannot be detected, name it with --device")
        device = detect_board().device
    tuned = tuned_layer(options.root / cache_dir(first).relative_to("/"), device)
    layer = merge(merge(device_layer(device), tuned), {"device": device})
    config = load_config(device_layer=layer, config_file=config_file, flags=flags)
    return msgspec.structs.replace(config, device=device)


def _command(options: InstallOptions) -> tuple[str, ...]:
    if options.command is not None or options.root != SYSTEM_ROOT:
        command = options.command or _IMAGE_COMMAND
        if not os.path.isabs(command):
            raise ConfigError(f"--command {command}: give the whole path")
        _check_visible("the command", command)
        return (command,)
    _check_visible("the Python of this installation", sys.base_prefix)
    _check_visible("this installation", sys.executable)
    script = Path(sys.executable).with_name("edge-llm")
    return (str(script),) if script.exists() else (sys.executable, "-m", "edge_llm.cli")


def _check_visible(what: str, path: str) -> None:
    for candidate in (os.path.abspath(path), os.path.realpath(path)):
        if any(candidate == folder or candidate.startswith(f"{folder}/") for folder in _HIDDEN):
            raise ConfigError(
                f"{what} is at {candidate}, which the service cannot see (ProtectHome=, PrivateTmp=): use /opt, say"
            )


def _check_paths(config: Config) -> None:
    """See that the service would find what the settings name: it runs in another folder, and sees no homes."""
    tls = config.mqtt.tls
    named = [("bundle_keys", key) for key in config.bundle_keys]
    optional = {
        "bundle": config.bundle,
        "cache_dir": config.cache_dir,
        "state_dir": config.state_dir,
        "bundle_store": config.bundle_store,
        "mqtt.password_file": config.mqtt.password_file,
        "mqtt.tls.ca_file": tls.ca_file,
        "mqtt.tls.cert_file": tls.cert_file,
        "mqtt.tls.key_file": tls.key_file,
    }
    for setting, path in (*named, *optional.items()):
        if path is None:
            continue
        if not os.path.isabs(path):
            raise ConfigError(f"{setting} {path}: give the whole path")
        _check_visible(setting, path)


def _check_owners(config: Config, installation: Installation) -> None:
    """See that folders which systemd does not make for the service are there, and somebody's."""
    for setting, folder in folders_elsewhere(config).items():
        try:
            if setting == "bundle_store" and installation.below_root(Path(folder)).is_dir():
                continue  # root's own: the daemon reads it, and root alone changes it
            is_roots = installation.below_root(Path(folder)).stat().st_uid == 0
        except OSError:
            is_roots = True
        if is_roots:
            raise ConfigError(
                f"{setting} {folder}: the service could not write there. Leave it out, or make the folder its own "
                f"first: useradd --system {SERVICE_USER}; install -d -o {SERVICE_USER} -g {SERVICE_USER} {folder}"
            )


def config_text(settings: Mapping[str, Any]) -> str:
    """A new config file that says ``settings``, nested like ``Config``."""
    lines = (
        "# Settings of this device's edge-llm, yours to change. Every key: edge_llm/config.py and docs/deployment.md.",
        f"# With mqtt.username, the broker's password goes into {CONFIG_FILE.parent / PASSWORD_CREDENTIAL}, mode 0600.",
        "# After a change of bundle, [engine], [cache] or mqtt.host run `edge-llm install` again: the unit's limits",
        "# follow from them.",
        "",
        *_toml_lines(settings, ()),
    )
    return "\n".join(lines) + "\n"


def _toml_lines(table: Mapping[str, Any], path: tuple[str, ...]) -> Iterator[str]:
    nested = {key: value for key, value in table.items() if isinstance(value, dict)}
    for key, value in table.items():
        if key not in nested:
            # JSON's numbers, strings and arrays are TOML's, but for characters that no setting has.
            yield f"{key} = {msgspec.json.encode(value).decode()}"
    for key, value in nested.items():
        if value:
            yield from ("", f"[{'.'.join((*path, key))}]")
            yield from _toml_lines(value, (*path, key))
