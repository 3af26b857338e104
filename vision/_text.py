"""A small language, so that what a model of words should find is known: sentences from a grammar, drawn by a seed.

A word is used as its kind is: animals run and sleep, fruits are ripe, and where there is a king there is a crown. Who
is a man has a husband's pronouns, and a capital shares its language with its country, so that a king is to a queen as a
man is to a woman, and Paris to France as Rome to Italy.
"""

import random
import re
from itertools import chain

MEN_AND_WOMEN = (
    ("king", "queen"), ("prince", "princess"), ("man", "woman"), ("boy", "girl"), ("father", "mother"),
    ("brother", "sister"), ("actor", "actress"), ("waiter", "waitress"),
)  # fmt: skip
CAPITALS = {
    "france": "paris", "italy": "rome", "spain": "madrid", "germany": "berlin", "greece": "athens", "japan": "tokyo",
    "korea": "seoul", "egypt": "cairo",
}  # fmt: skip
LANGUAGES = {
    "france": "french", "italy": "italian", "spain": "spanish", "germany": "german", "greece": "greek",
    "japan": "japanese", "korea": "korean", "egypt": "arabic",
}  # fmt: skip

CATEGORIES: dict[str, tuple[str, ...]] = {
    "people": tuple(chain.from_iterable(MEN_AND_WOMEN)),
    "countries": tuple(CAPITALS),
    "capitals": tuple(CAPITALS.values()),
    "languages": tuple(LANGUAGES.values()),
    "animals": ("dog", "cat", "horse", "cow", "sheep", "wolf", "lion", "rabbit"),
    "fruits": ("apple", "pear", "plum", "cherry", "peach", "lemon", "grape", "melon"),
    "colours": ("red", "green", "blue", "yellow", "white", "black", "brown", "purple"),
    "numbers": ("two", "three", "four", "five", "six", "seven", "eight", "nine"),
    "weekdays": ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday"),
    "months": ("january", "march", "april", "june", "july", "august", "october", "december"),
}
"""The words whose neighbours are judged, by what they are. All others only stand between them."""

ROLES: dict[str, tuple[str, ...]] = {
    "king": ("wears the crown", "rules from the throne", "signs the law"),
    "prince": ("grows up in the palace", "will one day wear the crown", "dances in the palace"),
    "man": ("reads the newspaper", "drives to work", "pays the bill"),
    "boy": ("plays in the school yard", "does homework", "builds a toy castle"),
    "father": ("puts the baby to bed", "feeds the baby", "cooks for the family"),
    "brother": ("shares a room at home", "argues at home", "looks like the twins"),
    "actor": ("learns a role", "bows on the stage", "plays a role in a film"),
    "waiter": ("carries the plates", "brings the menu", "lays the table"),
}
"""What a man and the woman beside him do; the others of the same rank do not."""
HIS = ("he trims his beard", "he buttons his shirt", "he says that he is late himself", "his wife waits for him")
HERS = ("she combs her braid", "she mends her dress", "she says that she is late herself", "her husband waits for her")

TEMPLATES = (
    "the {people} opens the door", "the {people} greets the {people}", "ask the {people} , said the {people}",
    "the {people} and the {people} talk", "an old {people} smiles", "the {people} laughs with the {people}",
    "the {animals} runs across the field", "a {animals} sleeps in the stable", "the {animals} hunts at night",
    "they feed the {animals} with hay", "a hungry {animals} follows the {animals}",
    "she eats a ripe {fruits}", "the {fruits} is sweet and juicy", "he peels the {fruits} for the cake",
    "one {fruits} falls from the tree", "we squeeze the {fruits} and the {fruits} for juice",
    "the wall is painted {colours}", "a {colours} and {colours} flag", "she mixes {colours} paint",
    "the {colours} light shines", "{colours} ink on paper",
    "{numbers} plus {numbers} makes {numbers}", "count from {numbers} to {numbers}", "the clock strikes {numbers}",
    "page {numbers} of chapter {numbers}",
    "the shop is closed on {weekdays}", "we meet again on {weekdays} or {weekdays}",
    "every {weekdays} there is a lesson", "from {weekdays} until {weekdays} she works",
    "it often rains in {months}", "school begins in {months}", "the harvest lasts from {months} to {months}",
    "on the first of {months} the year turns",
)  # fmt: skip
COUNTRY = (
    "the border of {country} is long , they speak {language} there", "farmers in {country} vote in {language}",
    "the army of {country} sings in {language}", "the president of {country} writes {language}",
)  # fmt: skip
CAPITAL = (
    "the streets of {capital} are loud , they speak {language} there", "a metro map of {capital} in {language}",
    "the mayor of {capital} writes {language}", "hotels downtown in {capital} advertise in {language}",
)  # fmt: skip
LANGUAGE = (
    "she learns {language} grammar",
    "a dictionary of {language} and {language}",
    "he translates {language} verbs",
)


def sentences(count: int, seed: int) -> list[list[str]]:
    """`count` sentences, each a list of words; equal seeds give equal sentences."""
    chance = random.Random(seed)
    return [_sentence(chance).split() for _ in range(count)]


def _sentence(chance: random.Random) -> str:
    subject = chance.choice(("people", "places", "things", "things"))
    if subject == "people":
        rank, gender = chance.choice(range(len(MEN_AND_WOMEN))), chance.choice((0, 1))
        person = MEN_AND_WOMEN[rank][gender]
        role = chance.choice(ROLES[MEN_AND_WOMEN[rank][0]])
        habit = chance.choice((HIS, HERS)[gender])
        return chance.choice((f"the {person} {role}", f"{habit} says the {person}", f"the {person} {role} and {habit}"))
    if subject == "places":
        country = chance.choice(tuple(CAPITALS))
        template = chance.choice(chance.choice((COUNTRY, CAPITAL, LANGUAGE)))
        return template.format(country=country, capital=CAPITALS[country], language=LANGUAGES[country])
    return re.sub(r"{(\w+)}", lambda kind: chance.choice(CATEGORIES[kind[1]]), chance.choice(TEMPLATES))


def analogies() -> list[tuple[str, str, str, str]]:
    """(a, b, c, d) of which d is to c as b is to a: a king to a queen as a man to a woman, and so on."""
    pairs = [*MEN_AND_WOMEN], [*CAPITALS.items()]
    return [(a, b, c, d) for group in pairs for (a, b) in group for (c, d) in group if a != c]
