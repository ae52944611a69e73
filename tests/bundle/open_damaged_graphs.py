"""Opens damaged bundles one after the other, as a process of its own: a crash in native code is a result, too.

``python -m tests.bundle.open_damaged_graphs FOLDER SEED COUNT`` prints a line for each: what came of it.
"""

from __future__ import annotations

import random
import sys
from pathlib import Path

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.engine.loading import load_model
from edge_llm.errors import EdgeLlmError
from tests.bundle.sealing import reseal
from tests.paths import TINY_BUNDLE

GRAPH = "graphs/cpu-int8/model.onnx"


def damaged(raw: bytes, rng: random.Random) -> bytes:
    """Truncated, or with some bits flipped, bytes replaced, a piece left out or put in twice."""
    changed = bytearray(raw)
    how = rng.randrange(5)
    if how == 0:
        return bytes(changed[: rng.randrange(len(changed))])
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        at = rng.randrange(len(changed))
        length = rng.randrange(1, 64)
        if how == 1:
            changed[at] ^= 1 << rng.randrange(8)
        elif how == 2:
            changed[at] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif how == 3:
            del changed[at : at + length]
        else:
            changed[at:at] = changed[at : at + length]
        if not changed:
            return b""
    return bytes(changed)


def main(folder: Path, seed: int, count: int) -> None:
    raw = (TINY_BUNDLE / GRAPH).read_bytes()
    # The bundle's own graph: a prepared copy would be built in another process.
    config = Config(engine=EngineConfig(prepare=False, slots=1, threads=1, target="cpu-int8"))
    for number in range(seed, seed + count):
        content = damaged(raw, random.Random(number))
        print(number, end=" ", flush=True)
        if content == raw:
            print("the same", flush=True)
            continue
        (folder / GRAPH).write_bytes(content)
        reseal(folder)
        try:
            load_model(Bundle.open(folder), config)
        except EdgeLlmError as error:
            print(f"refused by {type(error).__name__}: {str(error)[:200]!r}", flush=True)
        else:
            print("answers right all the same", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
