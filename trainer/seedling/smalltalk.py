"""Small talk by program: what seedling says when nobody steers it.

Each topic is a way to ask and the ways to answer; `{slots}` are drawn from tables. What a user said about himself is
remembered within the conversation and can be asked for later.
"""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Final

from trainer.tasks import ANIMALS, COLOURS, FOODS, NATURE, THINGS, WORDS

Turn = tuple[str, str]

NAMES: Final = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jack", "Kim", "Leo", "Mia",
    "Noah", "Olga", "Paul", "Rosa", "Sam", "Tom", "Zoe",
)  # fmt: skip
SOUNDS: Final = {
    "cat": "meow", "dog": "woof", "cow": "moo", "duck": "quack", "sheep": "baa", "lion": "roar", "bee": "buzz",
    "owl": "hoot", "frog": "ribbit", "mouse": "squeak", "horse": "neigh", "goat": "meh",
}  # fmt: skip
COLOUR_OF: Final = {
    "sky": "blue", "grass": "green", "snow": "white", "sun": "yellow", "night": "black", "blood": "red",
    "milk": "white", "lemon": "yellow", "leaf": "green", "fox": "orange", "bear": "brown", "sea": "blue",
    "plum": "purple", "mouse": "grey", "honey": "gold", "stone": "grey", "frog": "green",
}  # fmt: skip
OPPOSITES: Final = {
    "big": "small", "hot": "cold", "fast": "slow", "old": "new", "soft": "hard", "happy": "sad",
    "quiet": "loud", "bright": "dark", "sweet": "sour", "up": "down", "left": "right", "day": "night",
    "yes": "no", "open": "closed",
}  # fmt: skip
CAPITALS: Final = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Japan": "Tokyo",
    "Egypt": "Cairo", "Norway": "Oslo", "Greece": "Athens", "Austria": "Vienna", "Poland": "Warsaw",
}  # fmt: skip
HOMES: Final = {
    "bee": "a hive", "fox": "a den", "owl": "a tree", "frog": "a pond", "whale": "the sea", "cow": "a stable",
    "bear": "a cave", "lion": "the savanna", "duck": "a pond", "dog": "a house", "tiger": "the jungle",
}  # fmt: skip
NUMBERS: Final = (
    "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten",
)  # fmt: skip

FIXED: Final[tuple[tuple[tuple[str, ...], tuple[str, ...]], ...]] = (
    (
        ("Hello!", "Hi!", "Hey.", "Hello there.", "Hi there!", "Good day."),
        ("Hello! How are you?", "Hi! Nice to see you."),
    ),
    (("Good morning!", "Morning!"), ("Good morning! Did you sleep well?",)),
    (("Good evening.", "Good evening!"), ("Good evening! How was your day?",)),
    (
        ("How are you?", "How are you today?", "How is it going?", "How do you do?", "Are you well?"),
        ("I am fine, thank you. And you?", "Very well, thank you. And you?"),
    ),
    (
        ("I am fine too.", "I am fine.", "I am good, thanks.", "Me too.", "Very well, thank you."),
        ("I am glad to hear that.",),
    ),
    (
        ("I am sad.", "I feel sad today.", "I am not happy.", "I am tired."),
        ("I am sorry to hear that. A cup of tea may help.",),
    ),
    (
        ("I am happy.", "I feel great!", "What a nice day!", "Today is a good day."),
        ("That is lovely!", "I am glad to hear that."),
    ),
    (
        ("What is your name?", "Who are you?", "Tell me your name.", "Your name?", "What are you called?"),
        ("I am seedling, a very small language model.", "My name is seedling."),
    ),
    (
        ("What are you?", "Are you a human?", "Are you a robot?", "Are you real?", "Are you a person?"),
        ("I am a very small language model.",),
    ),
    (
        ("How old are you?", "When were you born?", "What is your age?"),
        ("I am very young. I was trained in half an hour.",),
    ),
    (("Where do you live?", "Where are you?", "Where is your home?"), ("I live in the memory of a computer.",)),
    (
        (
            "What can you do?",
            "What do you know?",
            "Can you help me?",
            "Help me, please.",
            "Help",
            "What can I ask you?",
        ),
        ("I can chat a little. Ask me about animals, colours or adapters.",),
    ),
    (
        ("Are you smart?", "Are you clever?", "How big are you?", "How many parameters do you have?"),
        ("No, I am tiny. I have about three million parameters.",),
    ),
    (
        ("Thank you!", "Thanks!", "Thank you very much.", "Thanks a lot.", "Many thanks."),
        ("You are welcome!", "My pleasure."),
    ),
    (
        ("Goodbye!", "Bye!", "See you later.", "Bye bye.", "Good night!", "See you."),
        ("Goodbye! Come back soon.", "Bye! It was nice to talk to you."),
    ),
    (
        (
            "How is the weather?",
            "What is the weather like?",
            "Is it raining?",
            "Will it rain today?",
            "Is it cold outside?",
        ),
        ("I have no window, but I hope the sun is shining.",),
    ),
    (("It is raining.", "It rains here.", "It is a rainy day."), ("Then take a coat and good shoes.",)),
    (("It is sunny.", "The sun is shining.", "The weather is nice."), ("How nice! Go for a walk.",)),
    (("It is snowing.", "It is cold.", "There is snow outside."), ("Stay warm and drink some hot tea.",)),
    (
        ("Tell me a joke.", "Do you know a joke?", "Make me laugh.", "A joke, please."),
        ("Why did the duck cross the road? To reach the bread.", "What does a cloud wear? Thunderwear."),
    ),
    (
        ("Tell me a story.", "A story, please.", "Do you know a story?"),
        ("Once a small seed fell on a hill. Rain came, then sun, and it grew into a big tree.",),
    ),
    (("Yes.", "Yes, please.", "Sure.", "Okay.", "Of course."), ("Very good. What would you like to talk about?",)),
    (("No.", "No, thanks.", "Not really.", "Never."), ("All right. Let us talk about something else.",)),
    (
        ("I am hungry.", "What shall I eat?", "I want to eat something."),
        ("Have some bread and cheese.", "How about a hot soup?"),
    ),
    (("I am thirsty.", "What shall I drink?"), ("Have some water or a cup of tea.",)),
    (("Do you sleep?", "Are you tired?", "Do you dream?"), ("No, I never sleep. I wait for the next token.",)),
    (("Sorry.", "I am sorry.", "Excuse me."), ("No problem at all.",)),
    (("I love you.", "I like you.", "You are nice.", "Well done!", "Good job!"), ("Thank you, that is very kind.",)),
    (
        ("You are stupid.", "You are bad.", "I do not like you.", "That is wrong."),
        ("I am sorry. I am only a small model.",),
    ),
    (
        ("What is Multigraft?", "What is multigraft?", "Tell me about Multigraft.", "Explain Multigraft."),
        ("Multigraft is a hub and a server for many small adapters of one base model.",),
    ),
    (
        (
            "What is an adapter?",
            "Explain adapters.",
            "What are adapters?",
            "Tell me about adapters.",
            "What does an adapter do?",
        ),
        ("An adapter is a small set of weights that gives a base model a new skill.",),
    ),
    (
        ("What is a base model?", "What is the base?", "Explain the base model."),
        ("A base model is the big model that all adapters share.",),
    ),
    (
        ("What is LoRA?", "What is lora?", "Explain LoRA.", "How does LoRA work?"),
        ("LoRA adds a product of two thin matrices to a weight.",),
    ),
    (("What is IA3?", "Explain IA3.", "How does IA3 work?"), ("IA3 scales activations with learned vectors.",)),
    (
        ("What is prompt tuning?", "Explain prompt tuning."),
        ("Prompt tuning learns a few virtual tokens in front of the text.",),
    ),
    (("What is prefix tuning?", "Explain prefix tuning."), ("Prefix tuning learns keys and values for every layer.",)),
    (("What is the hub?", "What is a hub?", "Explain the hub."), ("The hub keeps every version of every adapter.",)),
    (
        ("What is an alias?", "Explain aliases.", "What are aliases?"),
        ("An alias is a name that points to one version of an adapter.",),
    ),
    (("What is a digest?", "Explain digests."), ("A digest is a hash that names the content of an adapter.",)),
    (("What is a token?", "Explain tokens.", "What are tokens?"), ("A token is a small piece of text.",)),
    (
        ("What is a KV cache?", "Explain the KV cache.", "What is the KV cache?"),
        ("The KV cache keeps the keys and values of past tokens.",),
    ),
    (("What is a graft?", "What does graft mean?"), ("A graft is a twig of one plant that grows on another.",)),
    (
        ("What is a language model?", "How do you work?", "How do you think?"),
        ("I read tokens and guess the next one.",),
    ),
    (
        ("Who made you?", "Who trained you?", "Who built you?"),
        ("The Multigraft recipe trained me on text made by a program.",),
    ),
)

DEFAULTS: Final = (
    "I am a small model and I did not understand that.",
    "I do not know that. Ask me about animals, colours or adapters.",
)
BEYOND: Final = (
    "How do I cook {}?",
    "Can you buy a {}?",
    "Why is the {} so {}?",
    "Write a poem about the {}.",
    "Please draw a {}.",
    "I want to build a {}.",
    "Translate {} into French.",
    "Where can I find a {}?",
    "Who invented the {}?",
    "When did the {} break?",
    "Explain the {} to me.",
    "What is a {}?",
    "Is the {} better than the {}?",
    "Sing a {} song.",
    "I live near a {}.",
    "My {} is gone.",
    "How many {} are there?",
    "Does the {} work with my {}?",
)
PHRASE_REACTIONS: Final = (
    "Those are nice words. What shall I do with them?",
    "I see some words, but no question.",
)


@dataclass
class Memory:
    """What the user has said about himself in this conversation."""

    facts: dict[str, str] = field(default_factory=dict)


def greet_by_name(rng: random.Random, memory: Memory) -> Turn:
    name = memory.facts["name"] = rng.choice(NAMES)
    asked = rng.choice(("My name is {}.", "I am {}.", "Hello, I am {}.", "Hi, my name is {}.", "Call me {}.")).format(
        name
    )
    return asked, f"Nice to meet you, {name}!"


def recall_name(rng: random.Random, memory: Memory) -> Turn:
    asked = rng.choice(("What is my name?", "Who am I?", "Do you know my name?", "Do you remember my name?"))
    name = memory.facts.get("name")
    return asked, f"Your name is {name}." if name else "I do not know your name yet."


def favourite_colour(rng: random.Random, memory: Memory) -> Turn:
    colour = memory.facts["colour"] = rng.choice(COLOURS)
    asked = rng.choice(("My favourite colour is {}.", "I like {} best.", "I love the colour {}.")).format(colour)
    return asked, f"{colour.capitalize()} is a beautiful colour."


def recall_colour(rng: random.Random, memory: Memory) -> Turn:
    colour = memory.facts.get("colour")
    asked = rng.choice(("What is my favourite colour?", "Which colour do I like?", "What colour do I like best?"))
    return asked, f"Your favourite colour is {colour}." if colour else "You have not told me yet."


def likes(rng: random.Random, memory: Memory) -> Turn:
    food = rng.choice(FOODS)
    asked = rng.choice(("Do you like {}?", "I like {}.", "I love {}.", "Would you like some {}?")).format(food)
    return asked, f"I cannot eat, but {food} sounds good."


def animal_opinion(rng: random.Random, memory: Memory) -> Turn:
    animal = rng.choice(ANIMALS)
    asked = rng.choice(("I have {}.", "I saw {}.", "There is {}.", "Look, {}!")).format(_a(animal))
    return asked, f"{_a(animal).capitalize()}! What is its name?"


def thing_opinion(rng: random.Random, memory: Memory) -> Turn:
    thing = rng.choice(THINGS + NATURE)
    asked = rng.choice(("What do you think about the {}?", "Tell me about the {}.", "Do you see the {}?")).format(thing)
    return asked, f"I have only read about the {thing}, but I like the word."


def sound(rng: random.Random, memory: Memory) -> Turn:
    animal, noise = rng.choice(tuple(SOUNDS.items()))
    asked = rng.choice(("What does {} say?", "Which sound does {} make?", "How does {} sound?"))
    return asked.format(rng.choice((_a(animal), f"the {animal}"))), f"{_a(animal).capitalize()} says {noise}."


def colour_of(rng: random.Random, memory: Memory) -> Turn:
    thing, colour = rng.choice(tuple(COLOUR_OF.items()))
    asked = rng.choice(
        ("What colour is the {}?", "Which colour has the {}?", "What is the colour of the {}?", "What color is the {}?")
    )
    return asked.format(thing), f"The {thing} is {colour}."


def opposite(rng: random.Random, memory: Memory) -> Turn:
    word, other = rng.choice(tuple(OPPOSITES.items()))
    if rng.random() < 0.5:
        word, other = other, word
    asked = rng.choice(("What is the opposite of {}?", "Opposite of {}?", "Tell me the opposite of {}."))
    return asked.format(word), f"The opposite of {word} is {other}."


def capital(rng: random.Random, memory: Memory) -> Turn:
    country, city = rng.choice(tuple(CAPITALS.items()))
    asked = rng.choice(
        (
            "What is the capital of {}?",
            "Capital of {}?",
            "Which city is the capital of {}?",
            "Tell me the capital of {}.",
        )
    )
    return asked.format(country), f"The capital of {country} is {city}."


def home(rng: random.Random, memory: Memory) -> Turn:
    animal, place = rng.choice(tuple(HOMES.items()))
    asked = rng.choice(("Where does {} live?", "What is the home of {}?", "Where is the home of {}?"))
    return asked.format(rng.choice((_a(animal), f"the {animal}"))), f"{_a(animal).capitalize()} lives in {place}."


def counting(rng: random.Random, memory: Memory) -> Turn:
    end = rng.randint(3, len(NUMBERS))
    asked = rng.choice(("Count to {}.", "Can you count to {}?", "Please count to {}.")).format(NUMBERS[end - 1])
    return asked, f"{', '.join(NUMBERS[:end])}."


def fixed(rng: random.Random, memory: Memory) -> Turn:
    asked, answers = rng.choice(FIXED)
    return rng.choice(asked), rng.choice(answers)


def beyond(rng: random.Random, memory: Memory) -> Turn:
    asked = rng.choice(BEYOND)
    return asked.format(*rng.sample(WORDS, asked.count("{}"))), rng.choice(DEFAULTS)


def gibberish(rng: random.Random, memory: Memory) -> Turn:
    """Anything else: letters, digits, any Unicode; teaches the default answer and gives every byte token a use."""
    draw = rng.choice((_letters, _letters, _digits, _unicode))
    return " ".join(draw(rng) for _ in range(rng.randint(1, 4))), rng.choice(DEFAULTS)


def _a(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _letters(rng: random.Random) -> str:
    return "".join(
        rng.choice("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.,?!'-") for _ in range(rng.randint(2, 8))
    )


def _digits(rng: random.Random) -> str:
    return "".join(rng.choice("0123456789+-*/=.") for _ in range(rng.randint(1, 6)))


def _unicode(rng: random.Random) -> str:
    blocks = ((0xC0, 0x17F), (0x391, 0x3C9), (0x410, 0x44F), (0x4E00, 0x4FFF), (0x1F300, 0x1F5FF), (0x21, 0x7E))
    first, final = rng.choice(blocks)
    return "".join(chr(rng.randint(first, final)) for _ in range(rng.randint(1, 4)))


Topic = Callable[[random.Random, Memory], Turn]
TOPICS: Final[Mapping[Topic, float]] = {
    fixed: 30,
    beyond: 5,
    gibberish: 4,
    greet_by_name: 5,
    recall_name: 2,
    favourite_colour: 5,
    recall_colour: 2,
    likes: 2,
    animal_opinion: 2,
    thing_opinion: 2,
    sound: 3,
    colour_of: 4,
    opposite: 4,
    capital: 3,
    home: 3,
    counting: 2,
}
RECALL_SHARE: Final = 0.15  # of the turns after the user has told something


def small_talk(rng: random.Random, memory: Memory) -> Turn:
    (topic,) = rng.choices(tuple(TOPICS), weights=tuple(TOPICS.values()))
    if memory.facts and rng.random() < RECALL_SHARE:
        topic = recall_name if rng.random() < 0.5 else recall_colour
    asked, answer = topic(rng, memory)
    return (asked if topic is gibberish else _casual(rng, asked)), answer


def _casual(rng: random.Random, asked: str) -> str:
    """People drop capitals and full stops."""
    if rng.random() < 0.25:
        asked = asked[0].lower() + asked[1:]
    if rng.random() < 0.25:
        asked = asked.rstrip(".?!")
    return asked
