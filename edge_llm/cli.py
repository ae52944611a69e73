"""The ``edge-llm`` command; ``edge-llm --help`` lists what it can do.

Exit status: 0 done, 1 a check or an answer failed, 2 bad input or configuration.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from edge_llm import __version__
from edge_llm.arguments import OneLineParser, non_negative, positive_int, utf8_text
from edge_llm.config import Config, cache_dir, load_config, merge
from edge_llm.device.board import detect_board
from edge_llm.device.profile import device_layer, tuned_layer
from edge_llm.errors import BundleError, ConfigError, EdgeLlmError
from edge_llm.logs import configure_logging

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from edge_llm.cache_command import Cleared

# Only what a command needs is imported when it runs: `edge-llm ask` on a client needs no onnxruntime.


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    args = _parser().parse_args(argv)
    try:
        status: int = args.run(args)
    except EdgeLlmError as error:
        print(f"edge-llm: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone, as after `| head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return status


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog="edge-llm", description="A language model that answers on the device itself, over MQTT, with no network."
    )
    parser.add_argument("--version", action="version", version=f"edge-llm {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    serve = _command(commands, "serve", _serve, "answer queries from the broker until stopped")
    serve.add_argument("--log-format", choices=("json", "text"), help="how log lines on stderr look")

    ask = _command(commands, "ask", _ask, "ask a running daemon over MQTT and stream the answer")
    ask.add_argument("text", type=utf8_text, help="the question")
    ask.add_argument("--user", default="cli", help="the user level of the query topic (default: cli)")
    ask.add_argument("--session", help="continue this conversation")
    ask.add_argument("--max-tokens", type=positive_int)
    ask.add_argument("--temperature", type=non_negative)
    ask.add_argument(
        "--timeout-s", type=non_negative, default=60.0, help="give up after this long a silence (default: 60)"
    )
    ask.add_argument("--json", action="store_true", help="print the events as they come, one JSON object a line")
    ask.add_argument("--mqtt3", action="store_true", help="use MQTT 3.1.1")

    demo = _command(commands, "demo", _demo, "start a broker and a daemon, ask some questions, print the times")
    demo.add_argument("--interactive", action="store_true", help="keep a prompt open instead of the questions")

    bench = _command(commands, "bench", _bench, "measure load, memory, prefill and decode of a bundle")
    bench.add_argument("--rounds", type=positive_int, default=5, help="repetitions (default: 5)")
    bench.add_argument("--json", action="store_true")

    doctor = _command(commands, "doctor", _doctor, "check machine, providers, bundle, broker; exit 1 if one fails")
    doctor.add_argument("--json", action="store_true")
    doctor.add_argument("--device-configs", action="store_true", help="check every device file, and nothing else")
    doctor.add_argument("--no-build", action="store_true", help="build no TensorRT engines, which takes minutes")

    verify = _command(commands, "verify", _verify, "check every file of a bundle, and its signature; exit 1 if not")
    verify.add_argument(
        "--public-key",
        action="append",
        default=[],
        metavar="FILE",
        help="a key that may have signed it, may be repeated (default: bundle_keys)",
    )

    _command(commands, "tune", _tune, "measure threads, chunk and slots here, and use the best from now on")

    _command(commands, "prepare", _prepare, "build the device-local copy of a bundle's graph now")

    install = _command(commands, "install", _install, "make it a systemd service of this machine, or remove that again")
    install.add_argument("--uninstall", action="store_true", help="remove what was installed; changed files are kept")
    install.add_argument("--dry-run", action="store_true", help="only show what would be done")
    install.add_argument("--yes", action="store_true", help="do not ask")
    install.add_argument(
        "--root", type=Path, default=Path("/"), metavar="DIR", help="install into this folder, which is to become a /"
    )
    install.add_argument(
        "--command",
        metavar="PATH",
        help="the program to start (default: this one; with --root, /opt/edge-llm/bin/edge-llm)",
    )

    _add_kept(commands)
    _add_bundles(commands)
    return parser


def _add_bundles(commands: Any) -> None:
    """The commands about the bundles of this device."""
    about_bundles = "the bundles of this device, side by side, and which one is served"
    bundle = commands.add_parser("bundle", help=about_bundles, description=about_bundles.capitalize())
    bundle_commands = bundle.add_subparsers(required=True, metavar="COMMAND")
    install = _command(bundle_commands, "install", _bundle_install, "check a bundle and copy it into the store")
    install.add_argument("source", type=Path, metavar="PATH", help="a folder, or a .tar, .tar.gz or .zip of one")
    install.add_argument("--activate", action="store_true", help="and serve it from now on")
    listing = _command(bundle_commands, "list", _bundle_list, "show what is installed, and how each did")
    listing.add_argument("--json", action="store_true")
    activate = _command(
        bundle_commands, "activate", _bundle_activate, "serve another one, if it answers its health prompt"
    )
    _command(bundle_commands, "rollback", _bundle_rollback, "serve the one before again")
    remove = _command(bundle_commands, "remove", _bundle_remove, "delete one that is not current")
    for parser in (activate, remove):
        parser.add_argument("name", metavar="BUNDLE", help="its name, NAME@VERSION, or how its hash begins")


def _add_kept(commands: Any) -> None:
    """The commands about what is kept of earlier queries."""
    about_cache = "show or remove what is kept of earlier queries"
    cache = commands.add_parser("cache", help=about_cache, description=about_cache.capitalize())
    cache_commands = cache.add_subparsers(required=True, metavar="COMMAND")
    info = _command(cache_commands, "info", _cache_info, "show what is kept on disk")
    info.add_argument("--json", action="store_true")
    clear = _command(cache_commands, "clear", _cache_clear, "remove it: all of it, or the parts that are named")
    clear.add_argument("--user", help="only what belongs to this user")
    clear.add_argument("--responses", action="store_true", help="answers")
    clear.add_argument("--popular", action="store_true", help="what was asked often")
    clear.add_argument("--feedback", action="store_true", help="what was refused, failed or rated")
    clear.add_argument("--prefixes", action="store_true", help="snapshots of prompt prefixes")
    forget = _command(commands, "forget", _forget, "remove all that one user has said and been told")
    forget.add_argument("user", metavar="USER")
    about_feedback = "look through what was refused, failed or rated"
    feedback = commands.add_parser("feedback", help=about_feedback, description=about_feedback.capitalize())
    feedback_commands = feedback.add_subparsers(required=True, metavar="COMMAND")
    export = _command(feedback_commands, "export", _feedback_export, "print it as utterances for the domain pack")
    export.add_argument("--out", type=Path, metavar="FILE", help="write a file instead, for its owner alone")
    export.add_argument("--user", help="only of this user")
    erase = _command(feedback_commands, "clear", _feedback_clear, "remove it")
    erase.add_argument("--user", help="only what belongs to this user")


def _command(commands: Any, name: str, run: Any, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text, description=help_text.capitalize())
    parser.set_defaults(run=run)
    settings = parser.add_argument_group("settings", "each overrides the environment, the config and the device file")
    settings.add_argument("--config", metavar="FILE", help="a TOML config file")
    settings.add_argument("--device", metavar="NAME", help="a device file by name (default: detect)")
    settings.add_argument("--bundle", metavar="DIR", help="the bundle folder (default: the current one)")
    settings.add_argument("--host", help="the broker's host (mqtt.host)")
    settings.add_argument("--port", type=int, help="the broker's port (mqtt.port)")
    settings.add_argument("--node", help="this device's name in the topics (mqtt.node)")
    settings.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting, e.g. --set engine.slots=2"
    )
    return parser


def settings(args: argparse.Namespace) -> Config:
    """The configuration of a command: every layer from the device file to the flags."""
    flags = _flags(args)
    # The device's name may itself come from any layer, so it is read first.
    first = load_config(config_file=args.config, environ=os.environ, flags=flags)
    named = args.device or first.device
    if named == "auto":
        named = detect_board().device
    flags["device"] = named
    layer = merge(device_layer(named), tuned_layer(cache_dir(first), named))
    return load_config(device_layer=layer, config_file=args.config, environ=os.environ, flags=flags)


def _flags(args: argparse.Namespace) -> dict[str, Any]:
    """The settings on the command line, nested like ``Config``."""
    flags: dict[str, Any] = {"mqtt": {}}
    for table, key in (
        (flags, "bundle"),
        (flags, "log_format"),
        *((flags["mqtt"], key) for key in ("host", "port", "node")),
    ):
        if getattr(args, key, None) is not None:
            table[key] = getattr(args, key)
    for assignment in args.set:
        _assign(flags, assignment)
    return flags


def _assign(flags: dict[str, Any], assignment: str) -> None:
    key, equals, value = assignment.partition("=")
    if not equals:
        raise ConfigError(f"--set {assignment}: write KEY=VALUE, for example engine.slots=2")
    *tables, name = key.split(".")
    table = flags
    for part in tables:
        table = table.setdefault(part, {})
        if not isinstance(table, dict):
            raise ConfigError(f"--set {assignment}: {part} is a setting, not a table")
    try:
        table[name] = msgspec.toml.decode(f"value = {value}")["value"]
    except msgspec.DecodeError:
        table[name] = value  # a bare word is a string


def _bundle_of(config: Config) -> Any:
    from edge_llm.bundle.manifest import Bundle
    from edge_llm.bundle.shipped import bundle_folder

    return Bundle.open(bundle_folder(config), config.bundle_keys)


def _serve(args: argparse.Namespace) -> int:
    from edge_llm.daemon import serve

    config = settings(args)
    configure_logging(config.log_level, config.log_format, private=config.privacy == "strict")
    return serve(config, None if config.bundle is None else _bundle_of(config))


def _ask(args: argparse.Namespace) -> int:
    from edge_llm.ask import Question, ask

    config = settings(args)
    mqtt = msgspec.structs.replace(config.mqtt, protocol="3.1.1") if args.mqtt3 else config.mqtt
    configure_logging("error", "text")
    question = Question(args.text, args.user, args.session, args.max_tokens, args.temperature, args.timeout_s)
    return ask(mqtt, question, as_json=args.json)


def _demo(args: argparse.Namespace) -> int:
    from edge_llm.demo import demo

    config = settings(args)
    return demo(config, _bundle_of(config), interactive=args.interactive)


def _bench(args: argparse.Namespace) -> int:
    from edge_llm.bench import format_bench, run_bench
    from edge_llm.engine.loading import load_model

    config = settings(args)
    configure_logging("warning", "text")
    result = run_bench(load_model(_bundle_of(config), config), config.engine.threads, args.rounds)
    print(msgspec.json.encode(result).decode() if args.json else format_bench(result))
    return 0


def _doctor(args: argparse.Namespace) -> int:
    from edge_llm.doctor import check_device_files, format_check, run_doctor

    config = settings(args)
    configure_logging("error", "text")
    checks = []
    for check in check_device_files() if args.device_configs else run_doctor(config, build=not args.no_build):
        checks.append(check)
        if not args.json:
            print(format_check(check), flush=True)
    failed = any(check.ok is False for check in checks)
    if args.json:
        print(msgspec.json.encode({"ok": not failed, "checks": checks}).decode())
    return 1 if failed else 0


def _verify(args: argparse.Namespace) -> int:
    from edge_llm.bundle.shipped import bundle_folder
    from edge_llm.verify_command import verify_bundle

    config = settings(args)
    try:
        print(verify_bundle(bundle_folder(config), args.public_key or config.bundle_keys))
    except BundleError as error:
        print(f"edge-llm: {error}", file=sys.stderr)
        return 1
    return 0


def _tune(args: argparse.Namespace) -> int:
    import onnxruntime

    from edge_llm.device.profile import write_tuned
    from edge_llm.tune import tune

    config = settings(args)
    configure_logging("error", "text")
    bundle = _bundle_of(config)
    tuned = tune(bundle, config, lambda line: print(f"  {line}", flush=True))
    name = f"{bundle.manifest.name} {bundle.manifest.version}"
    remark = f"edge-llm tune: measured with {name} on onnxruntime {onnxruntime.__version__}; delete it to undo"
    path = write_tuned(cache_dir(config), config.device, tuned.settings(), remark)
    chosen = ", ".join(f"{key} = {value}" for key, value in tuned.settings().items())
    print(f"best here: {chosen}\nwritten to {path}, which is used from now on; a config file still overrides it")
    return 0


def _prepare(args: argparse.Namespace) -> int:
    from edge_llm.bundle.prepare import prepared_graph
    from edge_llm.device.providers import cpu_graph

    config = settings(args)
    configure_logging("info", "text")
    bundle = _bundle_of(config)
    path = prepared_graph(bundle, cpu_graph(config.engine, bundle.manifest).target, cache_dir(config))
    print(f"prepared: {path.parent}")
    return 0


def _install(args: argparse.Namespace) -> int:
    from edge_llm.install_command import InstallOptions, install, uninstall

    configure_logging("error", "text")
    flags = {key: value for key, value in _flags(args).items() if value != {}}
    if args.device is not None:
        flags["device"] = args.device
    options = InstallOptions(
        root=args.root.resolve(),
        flags=flags,
        config_file=args.config,
        command=args.command,
        dry_run=args.dry_run,
        yes=args.yes,
    )
    if args.uninstall:
        if flags or args.config or args.command:
            raise ConfigError("--uninstall needs no settings: it removes what was recorded")
        return uninstall(options)
    return install(options)


def _cache_info(args: argparse.Namespace) -> int:
    from edge_llm.cache_command import cache_info, format_info

    configure_logging("error", "text")
    info = cache_info(settings(args))
    print(msgspec.json.encode(info).decode() if args.json else format_info(info))
    return 0


def _cache_clear(args: argparse.Namespace) -> int:
    from edge_llm.cache_command import PARTS, clear_cache

    configure_logging("error", "text")
    return _report(clear_cache(settings(args), args.user, [part for part in PARTS if getattr(args, part)]))


def _forget(args: argparse.Namespace) -> int:
    from edge_llm.cache_command import clear_cache

    configure_logging("error", "text")
    return _report(clear_cache(settings(args), args.user, ()))


def _report(all_cleared: Iterable[Cleared]) -> int:
    failed = False
    for cleared in all_cleared:
        print(cleared, flush=True)
        failed = failed or cleared.removed is None
    return 1 if failed else 0


def _feedback_export(args: argparse.Namespace) -> int:
    from edge_llm.feedback_command import export_feedback, write_export

    configure_logging("error", "text")
    text = export_feedback(settings(args), args.user)
    if args.out is None:
        print(text, end="")
    else:
        write_export(text, args.out)
    return 0


def _feedback_clear(args: argparse.Namespace) -> int:
    from edge_llm.feedback_command import erase_feedback

    configure_logging("error", "text")
    removed = erase_feedback(settings(args), args.user)
    if removed is None:
        raise ConfigError("the feedback could not be removed: the state file is in use or cannot be written")
    print(f"removed {removed} feedback entries")
    return 0


def _bundle_install(args: argparse.Namespace) -> int:
    from edge_llm.bundle_command import activate_bundle, install_bundle

    configure_logging("error", "text")
    config = settings(args)
    digest, said = install_bundle(config, args.source)
    print(said, flush=True)
    return _say(activate_bundle(config, digest)) if args.activate else 0


def _bundle_list(args: argparse.Namespace) -> int:
    from edge_llm.bundle_command import format_list, list_bundles

    configure_logging("warning", "text")
    config = settings(args)
    listed = list_bundles(config)
    print(msgspec.json.encode({"bundles": listed}).decode() if args.json else format_list(listed, config))
    return 0


def _bundle_activate(args: argparse.Namespace) -> int:
    from edge_llm.bundle_command import activate_bundle

    configure_logging("error", "text")
    return _say(activate_bundle(settings(args), args.name))


def _bundle_rollback(args: argparse.Namespace) -> int:
    from edge_llm.bundle_command import roll_back

    configure_logging("error", "text")
    return _say(roll_back(settings(args)))


def _bundle_remove(args: argparse.Namespace) -> int:
    from edge_llm.bundle_command import remove_bundle

    configure_logging("error", "text")
    print(remove_bundle(settings(args), args.name))
    return 0


def _say(lines: Iterable[str]) -> int:
    """Print what a command does, as it does it; 1 if the bundle is not served in the end."""
    try:
        for line in lines:
            print(line, flush=True)
    except BundleError as error:
        print(f"edge-llm: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
