"""The README's own snippets, run as they stand there."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.mark.broker
def test_the_ten_lines_of_python_get_an_answer(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port)
    connect(mosquitto.port)
    (code,) = blocks("python")
    assert "1883" in code
    result = subprocess.run(
        [sys.executable, "-c", code.replace("1883", str(mosquitto.port))],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert len(result.stdout.strip().splitlines()) >= 2


@pytest.mark.broker
def test_the_mosquitto_lines_get_an_answer(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port)
    connect(mosquitto.port)
    (code,) = [block for block in blocks("sh") if "mosquitto_sub" in block]
    subscribe = next(line for line in code.splitlines() if line.startswith("mosquitto_sub"))
    publish = next(line for line in code.splitlines() if line.startswith("mosquitto_pub"))
    port = f"-p {mosquitto.port} "
    script = (
        subscribe.replace("mosquitto_sub ", f"timeout 20 mosquitto_sub -C 1 -R -v {port}").replace(" &", " > $OUT &")
        + "\nsub=$!\n"
        + "sleep 0.5\n"
        + publish.replace("mosquitto_pub ", f"mosquitto_pub {port}").replace('"max_tokens": 40', '"max_tokens": 4')
        + "\nwait $sub\ncat $OUT"
    )
    result = subprocess.run(
        ["bash", "-c", f"OUT=$(mktemp); {script}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert '"id":"q1"' in result.stdout, result.stderr


@pytest.mark.broker
def test_the_partials_are_prefilled_before_the_query(mosquitto, start_daemon, connect):
    start_daemon(mosquitto.port)
    connect(mosquitto.port)
    (code,) = [block for block in blocks("sh") if "/partial/" in block]
    *partials, query = code.replace("mosquitto_pub ", f"mosquitto_pub -p {mosquitto.port} ").splitlines()
    script = "\n".join(
        [
            f"mosquitto_sub -p {mosquitto.port} -W 5 -t 'edge_llm/v1/edge/reply/kitchen/#' > $OUT &",
            "sleep 0.5",
            *partials,
            "sleep 0.5",
            query,
            "until grep -q final $OUT; do sleep 0.1; done",
            "cat $OUT",
        ]
    )
    result = subprocess.run(
        ["bash", "-c", f"OUT=$(mktemp); {script}"], capture_output=True, text=True, timeout=60, check=False
    )
    assert '"cached_from":"partial"' in result.stdout, result.stderr


def test_every_command_and_file_that_it_names_is_there():
    for link in re.findall(r"\]\(((?:docs|export|examples)/[^)#]+)\)", README):
        assert (ROOT / link).exists(), link
    makefile = (ROOT / "Makefile").read_text()
    for target in re.findall(r"`?make ([a-z-]+)", README):
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target
    help_text = subprocess.run(
        [sys.executable, "-m", "edge_llm.cli", "--help"], capture_output=True, text=True, check=True
    ).stdout
    for command in re.findall(r"edge-llm ([a-z]+) ", README):
        assert command in help_text, command
