"""``python -m export distill``: a pack and a tiny teacher become a bundle that answers with actions."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from edge_llm.bundle.manifest import Bundle
from edge_llm.config import Config, EngineConfig
from edge_llm.domain.answer import DomainAnswer
from edge_llm.engine.loading import LoadedModel, load_model
from edge_llm.engine.prompt import Message
from edge_llm.engine.sampler import SamplingParams
from export.cli import main
from export.distill import recipe, teacher
from tests.export.packs.small_pack import FILES, write_pack

Command = Callable[..., int]


@pytest.fixture(autouse=True)
def few_examples(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipe, "_VOCABULARY_EXAMPLES", 300)
    monkeypatch.setattr(recipe, "_CALIBRATION_EXAMPLES", 20)


@pytest.fixture
def distill(gpt2_folder: Path, tmp_path: Path) -> Command:
    """Runs the command on the kitchen; ``out`` names the bundle's folder."""
    pack = write_pack(tmp_path / "kitchen")

    def run(*flags: str, out: str = "bundle", pack: Path = pack) -> int:
        paths = {"--pack": pack, "--teacher": gpt2_folder, "--out": tmp_path / out, "--work": tmp_path / "work"}
        given = [text for flag, path in paths.items() for text in (flag, str(path))]
        small = ["--student", "2x32", "--vocabulary", "380", "--context", "96", "--examples", "200", "--steps", "30"]
        return main(["distill", *given, *small, "--batch-tokens", "512", *flags])

    return run


def answer(model: LoadedModel, text: str) -> DomainAnswer:
    """What a bundle answers, through engine and grammar."""
    prompt_ids = model.renderer.encode([Message("user", text)])
    state = model.engine.start(prompt_ids, SamplingParams(), max_tokens=30)
    while not state.prefilled:
        model.engine.prefill(state)
    while not state.finished:
        model.engine.decode([state])
    assert model.domain is not None
    found = model.domain.answer(lambda: state.sampler, ())
    found.push(state.output_ids)
    found.finish()
    model.engine.release(state)
    return found


def test_a_pack_becomes_a_bundle_that_answers_with_actions(
    distill: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--name", "kitchen", "--bundle-version", "7") == 0
    captured = capsys.readouterr()
    assert f"edge-llm serve --bundle {tmp_path / 'bundle'}" in captured.out
    assert "kind and actions exact" in captured.err
    bundle = Bundle.open(tmp_path / "bundle")
    bundle.verify()
    manifest = bundle.manifest
    assert (manifest.name, manifest.version, manifest.license) == ("kitchen", "7", "Apache-2.0")
    assert manifest.domain_file == "domain.json"
    assert manifest.model.vocab_size == 380
    assert manifest.model.max_seq_len == 96
    report = json.loads((tmp_path / "bundle" / "quality.json").read_text())
    assert report["text"]["held_out_examples"] == report["domain"]["held_out"] == 8
    assert 0 <= report["domain"]["answers_exact"] <= report["domain"]["kind_and_actions_exact"] <= 1
    card = (tmp_path / "bundle" / "README.md").read_text()
    assert "license: apache-2.0" in card
    assert "200 synthetic examples" in card

    config = Config(cache_dir=str(tmp_path / "cache"), engine=EngineConfig(threads=1, slots=1))
    model = load_model(bundle, config)
    assert model.domain is not None
    assert [action.name for action in model.domain.schema.actions][:2] == ["light.set", "oven.heat"]
    kinds = set()
    for text in ("heat the oven to 90 degrees", "switch the table light off", "who won the match", "call Ana", "你好"):
        found = answer(model, text)
        kinds.add(found.kind)
        # Trained for seconds, it may leave an action without its sentence; what is done is always valid.
        assert bool(found.actions or found.dropped_actions) == (found.kind == "command")
        assert all(0 <= call.confidence <= 1 for call in found.actions)
    assert kinds <= {"command", "fact", "refusal", "chat"}


def test_a_student_goes_on_after_the_pack_was_changed(
    distill: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--steps", "120") == 0
    earlier = tmp_path / "earlier"
    (tmp_path / "work" / "student-hf").rename(earlier)
    room = FILES["intents/room.toml"].replace("kill the {which}", "kill the {which}\nzap the {which}")
    grown = write_pack(tmp_path / "grown", room=room)
    losses = {}
    for name, flags in (("anew", []), ("on", ["--start-from", str(earlier)])):
        work = tmp_path / name
        assert distill(*flags, "--steps", "20", "--work", str(work), out=f"{name}-bundle", pack=grown) == 0
        losses[name] = float((work / "student" / "loss.csv").read_text().splitlines()[1].split(",")[1])
    assert losses["on"] < 0.8 * losses["anew"]
    cards = [(tmp_path / f"{name}-bundle" / "README.md").read_text() for name in losses]
    assert ["the weights of an earlier student" in card for card in cards] == [False, True]
    # The checkpoint of the one is not one of the other.
    capsys.readouterr()
    assert distill("--steps", "20", "--work", str(tmp_path / "on"), out="mixed", pack=grown) == 2
    assert "holds a run with another model" in capsys.readouterr().err


def work_files(tmp_path: Path) -> dict[str, bytes]:
    names = ("corpus.npz", "corpus.key", "tokenizer.json", "student/loss.csv", "student-hf/model.safetensors")
    return {name: (tmp_path / "work" / name).read_bytes() for name in names}


def test_the_same_command_goes_on_from_the_work_folder(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill() == 0
    before = work_files(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(recipe, "example_corpus", lambda *_: pytest.fail("wrote the corpus again"))
    monkeypatch.setattr("export.distill.train.batch_loss", lambda *_: pytest.fail("trained again"))
    assert distill(out="again") == 0
    assert work_files(tmp_path) == before
    first, second = (json.loads((tmp_path / out / "manifest.json").read_text()) for out in ("bundle", "again"))
    assert first["files"] == second["files"]


def test_an_interrupted_run_ends_as_an_uninterrupted_one(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(out="whole") == 0
    whole = work_files(tmp_path)
    for path in sorted((tmp_path / "work").rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    interrupted = monkeypatch.context()
    with interrupted as patch:
        original = recipe.Trainer.run

        def stop_early(trainer: recipe.Trainer, **options: object) -> None:
            original(trainer, until=13)
            raise KeyboardInterrupt

        patch.setattr(recipe.Trainer, "run", stop_early)
        assert distill() == 130
    assert "the work folder keeps what was done" in capsys.readouterr().err
    assert not (tmp_path / "bundle").exists()
    assert distill() == 0
    assert "training: steps 13 to 30 of 30" in capsys.readouterr().err
    assert work_files(tmp_path).keys() == whole.keys()
    assert work_files(tmp_path)["student-hf/model.safetensors"] == whole["student-hf/model.safetensors"]


def test_a_teacher_is_tuned_asked_once_and_followed(
    distill: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--teacher-steps", "4") == 0
    assert "asking the teacher about" in capsys.readouterr().err
    (cache,) = (tmp_path / "work").glob("teacher-*")
    assert (cache / "log_probs.npy").exists()
    assert "fine-tuned on the same examples for" in (tmp_path / "bundle" / "README.md").read_text()
    monkeypatch.setattr(teacher.TeacherCache, "_fill_batch", lambda *_: pytest.fail("asked the teacher again"))
    assert distill("--teacher-steps", "4", out="again") == 0


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--vocabulary", "200"), "--vocabulary is too small"),
        (("--context", "20"), "tokens"),
        (("--examples", "201"), "holds a run with another corpus"),
        (("--seed", "1"), "holds a run with another"),
        (("--student", "3x32"), "holds a run with another model"),
        (("--batch-tokens", "100"), "holds a run with another batch_tokens"),
        (("--teacher", "/nowhere/teacher"), "there is no /nowhere/teacher"),
        (("--context", "200", "--teacher-steps", "1"), "the teacher takes at most 96 positions"),
        (("--rephrase", "9"), "--rephrase needs a fine-tuned teacher: give --teacher-steps too"),
        (("--rephrase", "9", "--teacher-steps", "1"), "the teacher found no words that it understands"),
    ],
)
def test_what_cannot_go_on_is_refused_in_one_line(
    flags: tuple[str, ...], words: str, distill: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill("--steps", "1") == 0
    capsys.readouterr()
    assert distill("--steps", "1", *flags, out="other") == 2
    error = capsys.readouterr().err
    assert words in error
    assert "Traceback" not in error
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("flags", [("--student", "3x33"), ("--steps", "0"), ("--vocabulary", "many")])
def test_usage_errors_exit_with_2(flags: tuple[str, ...], distill: Command) -> None:
    with pytest.raises(SystemExit) as caught:
        distill(*flags)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"words": FILES["replies/words.toml"].replace("do my homework", "who won the match")}, "the held-out line"),
        ({"pack": FILES["pack.toml"].replace("version", "versoin")}, "pack.toml:1: "),
    ],
)
def test_a_wrong_pack_is_refused_before_anything_is_done(
    changes: dict[str, str], words: str, distill: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert distill(pack=write_pack(tmp_path / "other", **changes)) == 2
    assert words in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_a_pack_without_held_out_lines_cannot_be_judged(
    distill: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    without = {Path(name).stem: text.replace("held_out = '''", "unused = '''") for name, text in FILES.items()}
    changes = {stem: cut_held_out(text) for stem, text in without.items()}
    folder = write_pack(tmp_path / "other", **changes)
    (folder / "held_out" / "more.toml").unlink()
    (folder / "blind" / "others.toml").unlink()
    assert distill(pack=folder) == 2
    assert "has no held-out lines to judge the student by" in capsys.readouterr().err


def cut_held_out(text: str) -> str:
    kept, is_cut = [], False
    for line in text.splitlines(keepends=True):
        is_cut = is_cut or line.startswith("unused")
        if not is_cut:
            kept.append(line)
        is_cut = is_cut and line != "'''\n"
    return "".join(kept)


def test_an_output_folder_that_is_not_empty_is_refused_first(
    distill: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bundle").mkdir()
    (tmp_path / "bundle" / "precious").write_text("keep me")
    assert distill() == 2
    assert "is not empty" in capsys.readouterr().err
    assert not (tmp_path / "work").exists()


def test_the_module_is_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "export", "distill", "--help"], capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 0
    assert "--teacher-steps" in done.stdout
