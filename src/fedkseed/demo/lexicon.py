"""The small world that the demo's texts are about: its words and what is true of them.

Every content word is meant to be one token of the demo's tokenizer, so that it can be copied whole.
"""

from string import ascii_lowercase

CATEGORIES: dict[str, tuple[str, ...]] = {
    "animal": ("cat", "dog", "cow", "horse", "lion", "bear", "goat", "duck", "hen", "frog", "tiger", "pig"),
    "fruit": ("apple", "pear", "plum", "lemon", "melon", "grape", "fig", "banana", "date", "mango"),
    "tool": ("hammer", "saw", "drill", "spade", "rake", "chisel", "wrench", "pliers", "file", "shovel"),
    "garment": ("hat", "coat", "shirt", "scarf", "sock", "glove", "skirt", "belt", "jacket", "boot"),
    "vehicle": ("car", "truck", "train", "tram", "boat", "ship", "bike", "plane", "van", "taxi"),
    "furniture": ("table", "chair", "bed", "desk", "sofa", "shelf", "stool", "bench", "cabinet", "couch"),
    "instrument": ("drum", "flute", "piano", "violin", "guitar", "harp", "horn", "organ", "bell", "trumpet"),
    "drink": ("milk", "tea", "coffee", "juice", "water", "cocoa", "cider", "soda", "wine", "beer"),
}
"""Each category's words. A word is in one category only."""

IRREGULAR = frozenset({"shelf", "pliers", "bench", "couch", *CATEGORIES["drink"]})
"""Nouns whose plural is not the word with an s."""

OPPOSITES: tuple[tuple[str, str], ...] = (
    ("hot", "cold"), ("big", "small"), ("tall", "short"), ("fast", "slow"), ("old", "young"), ("wet", "dry"),
    ("hard", "soft"), ("light", "heavy"), ("full", "empty"), ("open", "shut"), ("rich", "poor"), ("happy", "sad"),
    ("loud", "quiet"), ("clean", "dirty"), ("strong", "weak"), ("thick", "thin"), ("wide", "narrow"), ("deep", "shallow"),
    ("sweet", "sour"), ("early", "late"), ("near", "far"), ("high", "low"), ("new", "ancient"), ("bright", "dim"),
    ("sharp", "blunt"), ("smooth", "rough"), ("brave", "timid"), ("safe", "risky"), ("cheap", "costly"), ("calm", "angry"),
    ("true", "false"), ("right", "wrong"), ("kind", "cruel"), ("lazy", "busy"), ("awake", "asleep"), ("raw", "cooked"),
    ("tight", "loose"), ("simple", "complex"), ("polite", "rude"), ("public", "secret"),
)  # fmt: skip
"""Pairs of adjectives; a word is in one pair only."""

SEQUENCES: tuple[tuple[str, ...], ...] = (
    ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve", "thirteen", "fourteen",
     "fifteen", "sixteen"),
    ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November", "December"),
    tuple(ascii_lowercase),
)  # fmt: skip
"""Things in an order that everybody knows."""

COLOURS = ("red", "blue", "green", "white", "black", "brown", "pink", "grey", "yellow", "purple")
NAMES = ("Tom", "Ann", "Ben", "Eva", "Max", "Lily", "Sam", "Mia", "Leo", "Zoe", "Jack", "Rosa")
PLACES = ("garden", "house", "street", "park", "forest", "school", "market", "river", "kitchen", "field")
THINGS = tuple(word for kind in ("tool", "garment", "furniture", "instrument") for word in CATEGORIES[kind] if word != "pliers")
"""What a person can have one of, with a colour."""

NOUNS = tuple(word for words in CATEGORIES.values() for word in words)
ADJECTIVES = tuple(word for pair in OPPOSITES for word in pair)
WORDS = NOUNS + ADJECTIVES + COLOURS
"""What lists are made of, and what has a first letter."""
