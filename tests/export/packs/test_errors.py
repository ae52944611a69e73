"""Whatever is wrong with a pack is refused, with the file and the line."""

from __future__ import annotations

from pathlib import Path

import pytest

from export.errors import ExportError
from export.packs.extra import add_extra
from export.packs.pack import Pack, load_pack
from export.packs.wording import check_wordings
from tests.export.packs.small_pack import FILES, line_of


def refusal_of(folder: Path) -> str:
    with pytest.raises(ExportError) as caught:
        check_wordings(load_pack(folder))
    return str(caught.value)


def replace(folder: Path, file: str, old: str, new: str) -> Path:
    text = FILES[file]
    assert text.count(old) >= 1
    (folder / file).write_text(text.replace(old, new, 1), encoding="utf-8")
    return folder / file


def test_the_pack_that_is_spoilt_here_is_valid(pack_folder: Path) -> None:
    check_wordings(load_pack(pack_folder))


OVEN = [
    ("set it to {heat} degrees", "action oven.heat has no slot 'heat', only: degrees"),
    ("set it to [sixty](heat=60)", "has no slot 'heat'"),
    ("set it | heat=60", "has no slot 'heat'"),
    ("set it to sixty degrees", "oven.heat needs degrees; here: []"),
    ("{degrees} or {degrees}", "slot 'degrees' is given twice"),
    ("{degrees} | degrees=60", "slot 'degrees' is given twice"),
    ("[sixty](degrees=60), {degrees}", "slot 'degrees' is given twice"),
    ("{degrees}, I mean [sixty](degrees=60)", "slot 'degrees' is given twice"),
    ("[sixty](degrees=60), [no, seventy](degrees=70)", "slot 'degrees' is given twice"),
    ("nice and hot | degrees=60, degrees=60", "slot 'degrees' is given twice"),
    ("set it to [ten](degrees=10)", "slot 'degrees' does not allow '10'"),
    ("set it as high as you can | degrees=251", "slot 'degrees' does not allow '251'"),
    ("set it to [a lot](degrees=lots)", "slot 'degrees' wants a number, not 'lots'"),
    ("set it to [ninety and a half](degrees=90.5)", "slot 'degrees' wants a number"),
    ("set it to {degrees", "a bracket is not closed"),
    ("set it to degrees} {degrees}", "a bracket is not closed"),
    ("set it to [sixty] degrees | degrees=60", "a bracket is not closed, or [words] are not followed by (slot=value)"),
    ("set it to [sixty](degrees=60", "a bracket is not closed"),
    ("set it to [ ](degrees=60)", "no words between the brackets"),
    ("set it to [sixty](degrees)", "say what [sixty] means: [sixty](degrees=value)"),
    ("set it to sixty | 60", "'60' is not slot=value"),
]
LIGHT = [
    ("switch the table light", "light.set needs which, state; here: []"),
    ("switch the {which}", "light.set needs which, state; here: ['which']"),
    ("[the fridge](which=fridge) {state}", "slot 'which' does not allow 'fridge'"),
]
OTHER_LINES = [
    ("kill the {which}", "kill the {which} {state}", "slot 'state' is given twice"),
    ("kill the {which}", "kill the {which} | state=off", "slot 'state' is given twice"),
    ("volume {level}", "volume", "volume needs one of level and change; here: []"),
    ("volume {level}", "volume {level} and {change}", "volume needs one of level and change"),
    ("tune to {mhz} megahertz", "tune to [eighty](mhz=80)", "slot 'mhz' does not allow '80'"),
    ("tune to {mhz} megahertz", "tune to [nan](mhz=nan)", "slot 'mhz' does not allow 'nan'"),
    ("how humid is it", "how humid is {humidity}", "action status.humidity has no slot 'humidity', only: none"),
    ("call {contact}", "call home | contact=Ana", "'contact' holds words of the utterance"),
    ("call {contact}", "call [my dad](contact=Sean)", "'contact' holds words of the utterance"),
]
MIXED = [
    ("lights and music off", "the actions are missing: add ` | action slot=value`"),
    ("lights off | lights.set which=all state=off", "there is no action 'lights.set'"),
    ("louder | volume", "volume needs one of level and change"),
    ("louder | volume change=up change=up", "slot 'change' is given twice"),
    ("louder | volume loudness=4", "action volume has no slot 'loudness'"),
    ("louder | volume level=11", "slot 'level' does not allow '11'"),
    ("louder | volume up", "'up' is not slot=value"),
    ("oven on {degrees} | oven.heat degrees=90", "plain words before ` | `, without braces or brackets"),
    (" | oven.heat degrees=90", "the actions are missing"),
    ("a | volume level=1; volume level=2; volume level=3", "at most 2 actions in one utterance"),
    ("call mum | call contact=Ana", "'contact' must be words of the utterance, which has no 'Ana'"),
    ("call Anastasia | call contact=Ana", "'contact' must be words of the utterance, which has no 'Ana'"),
    ("call Ana twice | call contact=Ana; call contact=Ana", "'Ana' cannot be the value of two slots"),
    ("call O'Brien | call contact=O'Brien", "cannot read"),
    ('call Ana | call contact=""', "slot 'contact' does not allow ''"),
]


def spoilt_lines() -> list[tuple[str, str, str, str]]:
    room, things = "intents/room.toml", "intents/things.toml"
    return [
        *((things, "I bake a cake | degrees=180", line, words) for line, words in OVEN),
        *((room, "switch the {which} {state}", line, words) for line, words in LIGHT),
        *((things if old in FILES[things] else room, old, line, words) for old, line, words in OTHER_LINES),
        *((things, "it is hot and dry in here | volume change=down; status.humidity", *pair) for pair in MIXED),
        *(("held_out/more.toml", "Phone Ana, would you? | call contact=Ana", *pair) for pair in MIXED),
        ("replies/words.toml", "who won the match", "who won the {match}", "plain words, without braces or brackets"),
        ("replies/words.toml", "do my homework", "do [my](x) homework", "plain words, without braces or brackets"),
    ]


@pytest.mark.parametrize(("file", "old", "line", "words"), spoilt_lines())
def test_a_wrong_line_is_refused_where_it_stands(file: str, old: str, line: str, words: str, pack_folder: Path) -> None:
    path = replace(pack_folder, file, f"\n{old}\n", f"\n{line}\n")
    message = refusal_of(pack_folder)
    assert message.startswith(f"{path}:{line_of(path, line.strip())}: ")
    assert words in message


PACK, ACTIONS, ROOM, THINGS, WORDS = (
    "pack.toml",
    "actions.toml",
    "intents/room.toml",
    "intents/things.toml",
    "replies/words.toml",
)
# File, what is replaced by what, the line that the message must name, and words of it.
SPOILT_KEYS = {
    "unknown-key-of-pack": (PACK, "language =", "colour = 1\nlanguage =", 1, "unknown field `colour`"),
    "unknown-key-of-action": (ACTIONS, "confirm = true", "confirms = true", 12, "`confirms`"),
    "unknown-key-of-slot": (ACTIONS, "min = 50", "minimum = 50", 12, "`minimum`"),
    "unknown-key-of-intent": (THINGS, 'action = "call"', 'action = "call"\nslot = {}', 39, "`slot`"),
    "unknown-key-of-reply": (WORDS, 'name = "egg"', 'name = "egg"\nid = 1', 1, "`id`"),
    "unknown-table": (WORDS, '[[reply]]\nkind = "chat"', '[[replies]]\nkind = "chat"', 1, "`replies`"),
    "wrong-type-of-version": (PACK, 'version = "3"', "version = 3", 2, "Expected `str`, got `int`"),
    "wrong-type-of-confirm": (ACTIONS, "confirm = true", 'confirm = "yes"', 14, "Expected `bool`, got `str`"),
    "wrong-type-of-answer": (THINGS, 'answer = "Volume {level}."', "answer = 4", 25, "Expected `str`"),
    "wrong-type-of-slots": (ROOM, 'state = "off" }', "state = true }", 18, "Expected `int | float | str`"),
    "empty-answer": (THINGS, 'answer = "Volume {level}."', 'answer = ""', 25, "length >= 1"),
    "missing-answer": (THINGS, 'answer = "Volume {level}."\n', "", 22, "missing required field `answer`"),
    "bad-name-of-slot": (ACTIONS, "slots.degrees]", "slots.Degrees]", 12, "matching regex"),
    "bad-name-of-value": (ACTIONS, "values.table =", "values.Table =", 1, "matching regex"),
    "bad-kind-of-reply": (WORDS, 'kind = "chat"', 'kind = "talk"', 13, "Invalid enum value 'talk'"),
    "no-such-slot-type": (ACTIONS, 'type = "number"', 'type = "float"', 21, "Invalid value 'float'"),
    "negative-minimum": (ACTIONS, "min = 50", "min = -5", 12, ">= 0"),
    "too-many-decimals": (ACTIONS, "max = 108.0", "max = 108.0\ndecimals = 4", 21, "<= 3"),
    "syntax": (THINGS, 'action = "call"', "action = call", 41, "not valid TOML"),
    "syntax-key-twice": (THINGS, 'action = "call"', 'action = "call"\naction = "a"', 42, "not valid TOML"),
    "intents-of-one-name": (THINGS, 'name = "call"', 'name = "light"', 40, "two intents 'light'"),
    "replies-of-one-name": (WORDS, 'name = "thanks"', 'name = "egg"', 14, "two replies 'egg'"),
    "intent-of-no-action": (THINGS, 'action = "call"', 'action = "ring"', 41, "no action 'ring' in"),
    "slots-of-no-slot": (ROOM, '{ state = "off" }', '{ mood = "off" }', 18, "no slot 'mood'"),
    "slots-of-no-value": (ROOM, '{ state = "off" }', '{ state = "dim" }', 18, "does not allow 'dim'"),
    "slots-of-text": (
        THINGS,
        'action = "call"',
        'action = "call"\nslots = { contact = "Ana" }',
        42,
        "words of the utterance, so an intent cannot give it",
    ),
    "placeholder-of-answer": (THINGS, "Calling {contact}.", "Calling {name}.", 42, "{name} is neither a state"),
    "placeholder-of-reply": (WORDS, "Eight minutes.", "{degrees} minutes.", 4, "{degrees} is neither a state"),
    "placeholder-of-range": (ACTIONS, "takes 50 to", "takes {low} to", 15, "{low} is neither a state"),
    "no-utterance": (THINGS, "volume {level}\n", "", 26, "intent 'level' has no utterance"),
    "no-utterance-of-reply": (WORDS, "how long does an egg take\n", "", 5, "reply 'egg' has no utterance"),
    "no-values-file": (ACTIONS, "contacts.txt", "people.txt", 44, "people.txt"),
    "value-of-too-many-words": (ACTIONS, "max_words = 6", "max_words = 1", 44, "more words than max_words"),
    "unspoken": (ACTIONS, 'spoken = ["up"]', "spoken = []", 35, "no value of it has `spoken`"),
    "no-answer": (THINGS, "Turning it {change}.", "Volume {level}.", 35, "no intent of volume has an answer"),
    "trained-on-held-out": (
        "held_out/more.toml",
        "held_out = ",
        "utterances = ",
        1,
        "unknown field `utterances`",
    ),
    "blind-reply": ("blind/others.toml", 'name = "egg"', 'name = "eggs"', 7, "there is no reply 'eggs' in replies/"),
}


@pytest.mark.parametrize("name", SPOILT_KEYS)
def test_a_wrong_key_is_refused_where_it_stands(name: str, pack_folder: Path) -> None:
    file, old, new, line, words = SPOILT_KEYS[name]
    path = replace(pack_folder, file, old, new)
    if name == "unspoken":
        path.write_text(path.read_text().replace('spoken = ["down"]', "spoken = []"))
        path = pack_folder / THINGS
    message = refusal_of(pack_folder)
    assert message.startswith(f"{path}:{line}: ")
    assert words in message


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('name = "oven.heat"', 'name = "light.set"', "defines an action twice"),
        ("min = 50", "min = 300", "has min 300 above max 250"),
        ('one_of = ["level", "change"]', 'one_of = ["level", "loudness"]', "must name two or more of its slots"),
        ("[action.slots.degrees]", "[action.slots.humidity]", "'humidity' is both a slot and a state value"),
    ],
)
def test_actions_that_contradict_themselves(old: str, new: str, words: str, pack_folder: Path) -> None:
    path = replace(pack_folder, ACTIONS, old, new)
    message = refusal_of(pack_folder)
    assert message.startswith(f"{path}: ")
    assert words in message


def test_an_action_that_nobody_asks_for(pack_folder: Path) -> None:
    (pack_folder / ACTIONS).write_text(FILES[ACTIONS] + '[[action]]\nname = "door.open"\n')
    assert refusal_of(pack_folder).startswith(f"{pack_folder}: no intent asks for the action 'door.open'")


def test_a_file_of_values_without_one(pack_folder: Path) -> None:
    (pack_folder / "values/contacts.txt").write_text("# nobody\n\n")
    assert "contacts.txt holds no value" in refusal_of(pack_folder)


def test_a_folder_that_is_no_pack(tmp_path: Path, pack_folder: Path) -> None:
    assert refusal_of(tmp_path) == f"{tmp_path} is not a domain pack: it has no pack.toml"
    (pack_folder / ACTIONS).unlink()
    assert refusal_of(pack_folder) == f"cannot read {pack_folder / ACTIONS}: No such file or directory"


def test_a_file_that_is_no_text(pack_folder: Path) -> None:
    (pack_folder / WORDS).write_bytes(b"\xff\xfe")
    assert refusal_of(pack_folder) == f"{pack_folder / WORDS} is not UTF-8 text"


@pytest.mark.parametrize(
    ("line", "at"),
    [
        ("Heat the oven to forty-five degrees, please!", "heat the oven to {degrees} degrees"),
        ("hey heat the oven to {degrees} degrees now", "heat the oven to {degrees} degrees"),
        ("[pizza time, as hot as it gets](degrees=250)", "pizza time"),
    ],
)
def test_a_held_out_line_that_is_worded_as_a_training_line(line: str, at: str, pack_folder: Path) -> None:
    if "=" not in line and "{" not in line:
        line += " | degrees=60"
    path = replace(pack_folder, THINGS, "oven {degrees}", line)
    message = refusal_of(pack_folder)
    assert message.startswith(f"{path}:{line_of(path, line)}: the held-out line ")
    assert f"is worded as {path}:{line_of(path, at)}, which is trained on" in message


def test_a_held_out_question_that_is_trained_on(pack_folder: Path) -> None:
    path = replace(pack_folder, WORDS, "do my homework", "Who won the match?")
    assert refusal_of(pack_folder).startswith(f"{path}:{line_of(path, 'Who won the match?')}: the held-out line ")


def test_a_blind_line_that_is_trained_on(pack_folder: Path) -> None:
    path = replace(pack_folder, "blind/others.toml", "when is my egg done", "How long does an egg take?")
    at = line_of(path, "How long does an egg take?")
    assert refusal_of(pack_folder).startswith(f"{path}:{at}: the held-out line ")


@pytest.mark.parametrize(
    ("line", "file", "same_as"),
    [
        ("tune to {level} megahertz", THINGS, "tune to {mhz} megahertz"),
        ("who won the match | level=3", WORDS, "who won the match"),
        ("loud, please | level=10\nloud | level=9", THINGS, "loud, please | level=10"),
    ],
    ids=["two-actions", "an-action-and-a-refusal", "two-values"],
)
def test_one_wording_with_two_meanings(line: str, file: str, same_as: str, pack_folder: Path) -> None:
    path = replace(pack_folder, THINGS, "volume {level}", line)
    message = refusal_of(pack_folder)
    assert "which means something else" in message
    later, earlier = (path, line.splitlines()[-1]), (pack_folder / file, same_as)
    if file == WORDS:
        later, earlier = earlier, later
    places = [f"{one}:{line_of(one, words)}" for one, words in (later, earlier)]
    assert sorted(place in message for place in places) == [True, True]


def test_one_wording_with_two_numbers_is_one_meaning(pack_folder: Path) -> None:
    replace(pack_folder, THINGS, "volume {level}", "volume {level}\nvolume [six](level=6)\nvolume [ten](level=10)")
    check_wordings(load_pack(pack_folder))


@pytest.mark.parametrize(
    ("text", "at", "words"),
    [
        ("[[mixed]]\nutterances = '''\nlouder | volume change=high\n'''\n", 3, "does not allow 'high'"),
        ("[[mixed]]\nutterance = ''\n", 1, "unknown field `utterance`"),
        ("[[same_as]]\nreply = 'eggs'\nutterances = '''\neggs\n'''\n", 2, "the pack has no reply 'eggs'"),
        ("[[same_as]]\nreply = 'egg'\nutterances = '''\n\neggs for {n}\n'''\n", 5, "plain words"),
        ("[[same_as]\n", 1, "not valid TOML"),
    ],
)
def test_extra_utterances_are_checked_alike(text: str, at: int, words: str, kitchen: Pack, tmp_path: Path) -> None:
    path = tmp_path / "extra.toml"
    path.write_text(text)
    with pytest.raises(ExportError) as caught:
        add_extra(kitchen, path)
    assert str(caught.value).startswith(f"{path}:{at}: ")
    assert words in str(caught.value)


def test_extra_utterances_join_the_pack(kitchen: Pack, tmp_path: Path) -> None:
    path = tmp_path / "extra.toml"
    path.write_text(
        "[[mixed]]\nutterances = '''\n# heard on Monday\nblast it | volume level=10\n'''\n"
        "[[same_as]]\nreply = 'egg'\nutterances = '''\nboil me one\n'''\n"
    )
    extended = add_extra(kitchen, path)
    assert [template.text for template in extended.mixed[-1:]] == ["blast it"]
    assert [template.text for template in extended.replies[0].templates][-1] == "boil me one"
    assert len(extended.mixed) == len(kitchen.mixed) + 1


def test_asides_are_read_from_their_files(pack_folder: Path) -> None:
    path = replace(pack_folder, "pack.toml", 'joiners = ["and"', 'asides_after_file = "asides.txt"\njoiners = ["and"')
    line = line_of(path, "asides_after_file")
    assert refusal_of(pack_folder).startswith(f"{path}:{line}: cannot read {pack_folder / 'values' / 'asides.txt'}: ")
    (pack_folder / "values" / "asides.txt").write_text("# Remarks\n\nyou know me\nby the way\n", encoding="utf-8")
    pack = load_pack(pack_folder)
    assert (pack.asides_before, pack.asides_after) == ((), ("you know me", "by the way"))
