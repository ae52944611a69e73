"""A domain pack of a kitchen: small enough to read, with every way of writing a line."""

from __future__ import annotations

from pathlib import Path

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from edge_llm.domain.schema import DomainSchema
from edge_llm.engine.tokenizer import Tokenizer
from tests.export.models import tokenizer_json

FILES = {
    "pack.toml": """\
name = "kitchen"
version = "3"
language = "en"
license = "Apache-2.0"
description = "A voice in a kitchen."
failure = "Sorry, please say it again."
max_actions = 2
fillers_before = ["please", "hey"]
fillers_after = ["now"]
joiners = ["and", "then"]

[state.humidity]
type = "integer"
fallback = "I do not know the humidity."
""",
    "actions.toml": """\
[[action]]
name = "light.set"
[action.slots.which]
type = "choice"
values.table = { say = "the table light", spoken = ["table light", "lamp above the table"] }
values.all = { say = "all lights", spoken = [] }
[action.slots.state]
type = "choice"
values.on = { say = "on", spoken = ["on"] }
values.off = { say = "off", spoken = ["off", "out"] }

[[action]]
name = "oven.heat"
confirm = true
[action.slots.degrees]
type = "integer"
min = 50
max = 250
out_of_range = "The oven takes 50 to 250 degrees."

[[action]]
name = "radio.tune"
[action.slots.mhz]
type = "number"
min = 87.5
max = 108.0
out_of_range = "The radio goes from 87.5 to 108."

[[action]]
name = "volume"
one_of = ["level", "change"]
[action.slots.level]
type = "integer"
min = 0
max = 10
out_of_range = "The volume goes to 10."
[action.slots.change]
type = "choice"
values.up = { say = "up", spoken = ["up"] }
values.down = { say = "down", spoken = ["down"] }

[[action]]
name = "call"
[action.slots.contact]
type = "text"
values_file = "contacts.txt"
max_words = 6

[[action]]
name = "status.humidity"
""",
    "values/contacts.txt": """\
# People
Ana
Doctor Patel
Sean O'Brien
""",
    "intents/room.toml": """\
[[intent]]
name = "light"
action = "light.set"
answer = "Turning {which} {state}."
utterances = '''
switch the {which} {state}
[everything](which=all) {state}

it is dark at the table | which=table, state=on
'''
held_out = '''
lights [out](state=off), [all of them](which=all)
'''

[[intent]]
name = "light.off"
action = "light.set"
slots = { state = "off" }
answer = "{which} goes out."
utterances = '''
kill the {which}
'''

[[intent]]
name = "humidity"
action = "status.humidity"
answer = "It is {humidity} percent."
utterances = '''
how humid is it
'''
held_out = '''
is the air damp
'''
""",
    "intents/things.toml": """\
[[intent]]
name = "oven"
action = "oven.heat"
answer = "Heating to {degrees} degrees."
utterances = '''
heat the oven to {degrees} degrees
I bake a cake | degrees=180
pizza time, [as hot as it gets](degrees=250)
'''
held_out = '''
oven {degrees}
'''

[[intent]]
name = "tune"
action = "radio.tune"
answer = "Tuning to {mhz}."
utterances = '''
tune to {mhz} megahertz
'''

[[intent]]
name = "level"
action = "volume"
answer = "Volume {level}."
utterances = '''
volume {level}
'''

[[intent]]
name = "change"
action = "volume"
answer = "Turning it {change}."
utterances = '''
turn the music {change}
[louder](change=up)
'''

[[intent]]
name = "call"
action = "call"
answer = "Calling {contact}."
utterances = '''
call {contact}
ring [my sister](contact) up
I want {contact}'s voice
'''
held_out = '''
get [Granny](contact)'s number
'''

[[mixed]]
utterances = '''
call Ana and after that Doctor Patel | call contact=Ana; call contact="Doctor Patel"
it is hot and dry in here | volume change=down; status.humidity
'''
held_out = '''
music off and oven to ninety | volume level=0; oven.heat degrees=90
'''
""",
    "replies/words.toml": """\
[[reply]]
kind = "fact"
name = "egg"
answer = "Eight minutes."
utterances = '''
how long does an egg take
'''
held_out = '''
when is an egg hard
'''

[[reply]]
kind = "chat"
name = "thanks"
answer = "You are welcome."
utterances = '''
thank you very much
'''

[[reply]]
kind = "refusal"
name = "outside"
answer = "I only look after the kitchen."
utterances = '''
what is the capital of Peru
who won the match
'''
held_out = '''
do my homework
'''
""",
    "held_out/more.toml": """\
[[mixed]]
held_out = '''
Phone Ana, would you? | call contact=Ana
'''
""",
    "blind/others.toml": """\
[[mixed]]
held_out = '''
oven on ninety, and ring Ana | oven.heat degrees=90; call contact=Ana
'''

[[reply]]
name = "egg"
held_out = '''
when is my egg done
my egg is in the water: now what
'''
""",
}


def write_pack(folder: Path, **changes: str) -> Path:
    """The pack in a new folder; ``changes`` are whole files by the stem of their name."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(changes.get(path.stem, text), encoding="utf-8")
    return folder


def tokenizer_for(schema: DomainSchema) -> Tokenizer:
    """A byte-level BPE of 400 tokens with the schema's special tokens."""
    backend = Backend.from_str(tokenizer_json())
    backend.add_special_tokens([AddedToken(token, special=True) for token in schema.special_tokens()])
    return Tokenizer(backend)


def line_of(path: Path, words: str) -> int:
    """The number of the line that is ``words``, or else of the first that holds them."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if words in lines:
        return lines.index(words) + 1
    return next(number for number, line in enumerate(lines, 1) if words in line)
