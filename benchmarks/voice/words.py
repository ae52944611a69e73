"""What people say to a car, a kiosk and a home: templates of 4 to 14 words and what fills them."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import random

MIN_WORDS: Final = 4
MAX_WORDS: Final = 14
_SLOT: Final = re.compile(r"\{(\w+)\}")

# About 200 tokens of SmolLM2's with the template around it; a test counts them.
SYSTEM_PROMPT: Final = (
    "You are the voice assistant of a car, of its owner's home and of the visitor desk where it is parked. Answer in "
    "one or two short sentences that can be spoken aloud. Speak plainly and politely, and use the units of the "
    "country that the car is in. The driver is watching the road: give the most important fact first, and never ask "
    "more than one question back. When something is asked to be switched on or off, opened, closed, heated or "
    "cooled, say in a few words what you are doing. When you need a place, a time or a name that was not said, ask "
    "for it. Do not guess the battery, the range, the traffic or the weather: if no value is known, say that you "
    "cannot see it at the moment. Never give medical or legal advice. In an emergency, tell the driver to stop where "
    "it is safe and to call the emergency number. If you did not understand a question, say so."
)

# A user speaks of one domain.
USERS: Final = {"driver": "car", "passenger": "car", "desk": "kiosk", "kitchen": "home"}

TEMPLATES: Final = {
    "car": (
        "How far is it to {city} from here?",
        "Can we reach {city} without charging on the way?",
        "What is the fastest way to {city} right now?",
        "Is there a charging station near {street}?",
        "Find a {food} restaurant close to {street} please",
        "Set the temperature on the {side} side to {number} degrees",
        "Turn the {part} heating {onoff} please",
        "Open the {part} window a little bit",
        "How much charge will be left when we arrive in {city}?",
        "Take me to the {shop} on {street}",
        "Call {name} and say that we will be {number} minutes late",
        "Send a message to {name} that I am on my way to {city}",
        "Play the latest album by {band} from the beginning",
        "Turn the volume down to {number} percent",
        "What will the weather be like in {city} {day}?",
        "How long does it take to drive from {city} to {city2}?",
        "Why is the {warning} light on in the dashboard?",
        "What is the right tyre pressure for {number} people and {thing}?",
        "Remind me to buy {thing} when we pass the {shop}",
        "Avoid the motorway and drive through {city} instead",
        "Is there a traffic jam on the way to {city}?",
        "Read me the last message from {name}",
        "How many kilometres have we driven since {day}?",
        "Find parking near the {shop} in {city}",
        "Switch the ambient light to {colour} and dim it",
        "When do we have to stop for a break before {city}?",
        "Add a stop at the {shop} before {city}",
        "What does the {warning} symbol next to the speed mean?",
        "Keep the car below {number} kilometres an hour on {street}",
        "Tell {name} I will call back after {hour}",
    ),
    "kiosk": (
        "Where do I find the {shop} in this building?",
        "When does the next train to {city} leave?",
        "Which platform does the bus to {city} stop at {day}?",
        "I have an appointment with {name} at {hour}",
        "How much is a ticket to {city} for {number} people?",
        "Is there a {food} place that is open after {hour}?",
        "Please print my ticket to {city} again",
        "Can I leave my {thing} here until {hour}?",
        "Which floor is the office of {name} on?",
        "Do you sell {thing} or does the {shop} next door?",
        "How do I get from here to {street} on foot?",
        "Is the {shop} on {street} open on {day}?",
        "I lost my {colour} {thing} near the {shop} this morning",
        "What is on in the main hall on {day} at {hour}?",
        "Could you call a taxi to {street} for {hour}?",
        "Book a table for {number} at the {food} restaurant on {day}",
        "Does the {city} train have a quiet coach on {day}?",
        "What time does the tour in room {number} begin?",
        "Who is the contact for {thing} deliveries on {day}?",
        "Tell {name} that a visitor with a {thing} is here",
    ),
    "home": (
        "Turn the {room} lights {onoff} at {hour}",
        "Set the {room} to {number} degrees until {hour}",
        "Dim the {colour} lamp in the {room} to {number} percent",
        "Wake me at {hour} on {day} with {band}",
        "Put {thing} and {thing2} on the shopping list",
        "Is the window in the {room} still open?",
        "How long do I have to boil {food2} for {number} people?",
        "What can I cook with {food2} and {food3} tonight?",
        "Set a timer for {number} minutes for the {food2}",
        "Close the blinds in the {room} when it gets dark",
        "Did anybody ring the bell after {hour} on {day}?",
        "Start the washing machine so that it is done by {hour}",
        "How much energy did the {room} use on {day}?",
        "Remind {name} to bring {thing} on {day}",
        "Play something quiet by {band} in the {room}",
        "When did I last water the plants in the {room}?",
        "Lock the {part} door and switch the {room} camera {onoff}",
        "What is on the calendar for {name} on {day}?",
        "Tell everyone in the {room} that dinner is at {hour}",
        "How warm was it in the {room} at {hour}?",
        "Make the {room} a bit warmer before {hour}",
        "Which of the {colour} lamps is on right now?",
    ),
}

_CITIES: Final = (
    "Bremen", "Lyon", "Porto", "Ghent", "Turin", "Graz", "Oslo", "Leeds", "Cork", "Basel", "Brno", "Gdansk", "Malmo",
    "Utrecht", "Bilbao", "Verona", "Dresden", "Aarhus", "Bergen", "Tartu", "Split", "Nantes", "Bristol", "Salzburg",
)  # fmt: skip
_THINGS: Final = (
    "milk", "bread", "an umbrella", "batteries", "flowers", "a charger", "apples", "candles", "a suitcase", "coffee",
    "stamps", "a bicycle", "paper", "soap", "a jacket", "newspapers", "butter", "gloves", "tea", "a ladder",
)  # fmt: skip
_FOODS: Final = (
    "rice", "pasta", "potatoes", "lentils", "eggs", "salmon", "carrots", "beans", "mushrooms", "spinach", "pumpkin",
    "chicken", "tomatoes", "noodles",
)  # fmt: skip

FILLERS: Final = {
    "city": _CITIES,
    "city2": _CITIES,
    "street": (
        "Station Road", "Mill Lane", "Harbour Street", "Castle Hill", "Park Avenue", "Church Square", "River Walk",
        "Garden Street", "Museum Road", "Bridge Street", "Market Place", "Airport Road", "Forest Way", "King Street",
    ),
    "shop": (
        "pharmacy", "bakery", "post office", "supermarket", "hospital", "library", "bank", "cinema", "swimming pool",
        "hardware store", "town hall", "museum", "book shop", "car wash",
    ),
    "food": ("Greek", "Thai", "vegan", "Italian", "Indian", "Lebanese", "Mexican", "Korean", "French", "Turkish"),
    "food2": _FOODS,
    "food3": _FOODS,
    "name": (
        "Anna", "Peter", "Doctor Weber", "Maria", "Jonas", "Mrs Keller", "Sofia", "Tom", "Lena", "Mister Brown",
        "Carla", "Henrik", "Yusuf", "Olga", "Grandma", "Felix",
    ),
    "band": (
        "the Beatles", "Nina Simone", "Daft Punk", "Miles Davis", "Adele", "Mozart", "Queen", "Bob Marley", "Vivaldi",
        "Johnny Cash",
    ),
    "side": ("left", "right", "driver", "passenger", "back"),
    "part": ("front left", "front right", "rear left", "rear right", "back", "driver's", "front", "rear"),
    "onoff": ("on", "off"),
    "number": (
        "two", "three", "four", "five", "six", "eight", "nine", "ten", "twelve", "fifteen", "eighteen", "twenty",
        "twenty two", "twenty five", "thirty", "forty",
    ),
    "day": ("today", "tomorrow", "Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "hour": (
        "six", "half past six", "seven", "quarter past seven", "eight", "nine", "ten thirty", "noon", "one",
        "half past two", "three", "four", "quarter to five", "midnight",
    ),
    "room": (
        "kitchen", "living room", "bedroom", "bathroom", "hall", "garage", "cellar", "office", "nursery", "garden",
        "attic", "guest room",
    ),
    "colour": ("red", "blue", "green", "white", "yellow", "orange", "purple", "grey"),
    "warning": ("battery", "oil", "brake", "engine", "tyre", "airbag", "triangle", "snowflake"),
    "thing": _THINGS,
    "thing2": _THINGS,
}  # fmt: skip

# What a recogniser hears first, before the next words put it right.
SOUND_ALIKES: Final = {
    "the": "a",
    "to": "two",
    "for": "four",
    "is": "his",
    "and": "end",
    "in": "and",
    "on": "an",
    "at": "that",
    "of": "off",
    "how": "who",
    "what": "watt",
    "when": "then",
    "where": "wear",
    "which": "witch",
    "weather": "whether",
    "lights": "likes",
    "light": "like",
    "right": "write",
    "four": "for",
    "eight": "ate",
    "two": "to",
    "one": "won",
    "way": "weigh",
    "there": "their",
    "here": "hear",
    "brake": "break",
    "find": "fined",
    "send": "sand",
    "play": "plate",
    "tell": "tall",
    "room": "rum",
    "train": "rain",
    "set": "said",
    "turn": "torn",
    "long": "lung",
    "much": "mush",
}


def say(rng: random.Random, domain: str) -> str:
    """A question or command of a domain, as the recogniser writes it when all is said.

    A few fillings make a template longer than ``MAX_WORDS``: those are drawn again.
    """
    while True:
        template = rng.choice(TEMPLATES[domain])
        text = _SLOT.sub(lambda slot: rng.choice(FILLERS[slot[1]]), template)
        if MIN_WORDS <= len(text.split()) <= MAX_WORDS:
            return text
