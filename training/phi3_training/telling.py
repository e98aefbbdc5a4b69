"""The facts of an answer: its numbers, names and the words that set it apart from other answers.

Decides whether an answer has the expected words, and whether one chat teaches what another one
asks. Standard library only; reads and writes nothing. docs/evaluation.md states the rules.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

# A word is common, and carries no information, in more than this share of the different answers.
_COMMON_SHARE, _COMMON_FROM = 0.1, 3
# Of the other words: most if there is nothing else, few next to a number or a name.
_WORDS_NEEDED, _WORDS_NEXT_TO = 2 / 3, 3

#: Number words, from zero.
NUMBERS = re.findall(r"\w+", "zero one two three four five six seven eight nine ten eleven twelve")
_NUMBER_WORDS = {word: str(number) for number, word in enumerate(NUMBERS)}
_DAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# Not may and march: they are verbs as well.
_MONTHS = re.findall(
    r"\w+", "january february april june july august september october november december"
)
_SIGNS = {"$": " dollar ", "€": " euro ", "£": " pound ", "%": " percent ", "°": " degree "}
_HALF_DAYS = frozenset({"am", "pm"})
# Of an answer's units one must be expected: "two liters" does not mean "two kilos".
_UNITS = {
    **dict.fromkeys(("kilo", "kilogram", "kg"), "kg"),
    **dict.fromkeys(("gram", "g"), "g"),
    **dict.fromkeys(("liter", "litre", "l"), "l"),
    **dict.fromkeys(("meter", "metre", "m"), "m"),
    **dict.fromkeys(("centimeter", "centimetre", "cm"), "cm"),
    **dict.fromkeys(("kilometer", "kilometre", "km"), "km"),
    **dict.fromkeys(("hour", "h", "hr"), "h"),
    **dict.fromkeys(("minute", "min"), "min"),
    **{word: word for word in ("day", "week", "month", "year", "dollar", "euro", "percent")},
}
_YES, _NO = frozenset({"yes", "yeah", "yep"}), frozenset({"no", "nope"})
_NOT = frozenset({"no", "not", "never", "cannot", "none", "nobody", "nothing", "without"})
# They carry no information in any answer. Last line: greetings, and what is left of "I'll",
# "don't" and so on.
_STOP_WORDS = frozenset(
    re.findall(
        r"\w+",
        """a about after all also an and any are as at be been both but by can could did do does
    each every few for from get give given had has have he her here him his how i if in into is it
    its just let like made make many may me might more most much must my of off on only or other
    our out over own per please really she should so some such sure than that the their them then
    there these they this those to too under up us very was we well were what when where which while
    who whom why will with within would you your yes no not never
    hello hi hey thanks thank sorry am pm ll re ve d s t m""",
    )
)
_TOKEN = re.compile(
    r"(?P<number>\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d+(?:[.:]\d+)*)(?:(?:st|nd|rd|th)\b)?"
    r"|(?P<word>[^\W\d_]+(?:['’][^\W\d_]+)?)"
)
# "x200", "b12": a name with a figure in it.
_MIXED = re.compile(r"[^\W_]*(?:\d[^\W\d_]|[^\W\d_]\d)[^\W_]*")
_IN_ORDER = re.compile(rf"(?P<mixed>{_MIXED.pattern})|{_TOKEN.pattern}")
_AMOUNT = re.compile(r"([$€£])\s?(\d+(?:[.,]\d+)*)")
# "5pm", "3kg": a number with its unit.
_JOINED_UNIT = re.compile(r"(\d)(am|pm|h|hrs?|min|mins|km|cm|mm|m|kg|g|l|ml|k)\b", re.IGNORECASE)
# "p.m." is pm.
_DOTTED = re.compile(r"\b([ap])\.\s?m\b\.?", re.IGNORECASE)
# A capital after one of these says nothing about a name.
_SENTENCE = re.compile(r"[.!?:;\n]\s*[\"'“(]*$")


@dataclass(frozen=True)
class Telling:
    """What an answer must contain: all values in this order, all names, and enough words."""

    values: tuple[str, ...] = ()
    names: frozenset[str] = frozenset()
    words: frozenset[str] = frozenset()

    @property
    def all(self) -> tuple[str, ...]:
        """Everything, for people: values first."""
        return (*self.values, *sorted(self.names), *sorted(self.words))

    def __bool__(self) -> bool:
        return bool(self.values or self.names or self.words)


@dataclass(frozen=True)
class _Text:
    """A text as compared: words in order without number words, and its values in order."""

    words: tuple[str, ...]
    values: tuple[str, ...]
    soft: frozenset[str]  # values that need not be there: the word "one" is a pronoun as well
    names: frozenset[str]
    raw: frozenset[str]
    vocabulary: frozenset[str]  # words and values alike


@dataclass(frozen=True)
class Set:
    """What the answers of a set have in common, and which of their words are names."""

    common: frozenset[str] = frozenset()
    names: frozenset[str] = frozenset()
    asked_common: frozenset[str] = frozenset()  # what many questions have

    @classmethod
    def of(cls, answers: Iterable[str], questions: Iterable[str] = ()) -> Set:
        """The set of these expected answers; repeated ones count once."""
        read = [_read(text) for text in sorted(set(answers))]
        asked = [_read(text) for text in sorted(set(questions))]
        return cls(
            _common([text.vocabulary for text in read]),
            frozenset(name for text in read for name in text.names),
            _common([text.vocabulary for text in asked]),
        )

    def telling(self, expected: str, question: str = "") -> Telling:
        """What sets `expected` apart: nothing that the question says, nor what is common."""
        text, asked = _read(expected), _read(question).vocabulary
        left_out = asked | self.common
        values = tuple(v for v in text.values if v not in left_out and v not in text.soft)
        words = {w for w in text.words if w not in left_out and w not in _STOP_WORDS}
        names = {word for word in words if word in self.names}
        return Telling(values, frozenset(names), frozenset(words - names))

    def subject(self, question: str) -> frozenset[str]:
        """The words of a question that few other questions have: what it asks about."""
        words = _read(question).vocabulary
        return frozenset(w for w in words if w not in self.asked_common and w not in _STOP_WORDS)


def vocabulary(text: str) -> frozenset[str]:
    """The words and values of a text, as they are compared."""
    return _read(text).vocabulary


def names_in(text: str) -> frozenset[str]:
    """Words with a capital inside a sentence."""
    return _read(text).names


def has_expected_words(answer: str, expected: str, question: str, among: Set) -> bool:
    """Whether an answer says what is expected, and no other number, day or month."""
    said, wanted = _read(answer), _read(expected)
    telling = among.telling(expected, question)
    if not telling:
        if not wanted.words and not wanted.values:
            return False
        have = f" {' '.join((*said.words, *said.values))} "
        return f" {' '.join(wanted.words)} " in have and set(wanted.values) <= set(said.values)
    if not _says_all(said, telling) or _contradicts(said, wanted):
        return False
    asked = _read(question)
    named, known = among.names & said.vocabulary, asked.vocabulary | wanted.vocabulary
    if named - known and asked.names & among.names and not asked.names & said.vocabulary:
        return False  # the right number, of something else that it names
    allowed = {*wanted.values, *asked.values, *said.soft}
    return all(value in allowed for value in said.values)


def contains(answer: str, accepted: Sequence[str]) -> bool:
    """Whether the answer contains one of the accepted texts as whole words.

    Case, punctuation, plural s, number words and signs of currencies make no difference.
    """
    spoken = f" {' '.join(_in_order(answer))} "
    return any(f" {' '.join(_in_order(text))} " in spoken for text in accepted)


def _in_order(text: str) -> list[str]:
    """The words and values of a text in order, as they are compared: "$40" is 40 dollar."""
    plain = _AMOUNT.sub(lambda sign: f"{sign[2]}{_SIGNS[sign[1]]}", text)
    for sign, word in _SIGNS.items():
        plain = plain.replace(sign, word)
    read = []
    for match in _IN_ORDER.finditer(_DOTTED.sub(r"\1m", _JOINED_UNIT.sub(r"\1 \2", plain))):
        if match["number"]:
            read.append(_number(match["number"]))
            continue
        word = match[0].casefold().replace("’", "'")
        # "don't" stays: its stem is "do".
        whole = word in _STOP_WORDS or match["mixed"] or word.endswith("n't")
        read.append(_NUMBER_WORDS.get(word, word if whole else _stem(word)))
    return read


def _says_all(said: _Text, telling: Telling) -> bool:
    have = said.vocabulary
    if not telling.names <= have or not set(telling.values) <= have:
        return False
    wanted = tuple(dict.fromkeys(telling.values))
    # In the same order: "from 5 to 9" does not mean "from 9 to 5".
    if tuple(dict.fromkeys(v for v in said.values if v in wanted)) != wanted:
        return False
    # Next to a number or a name, which few wrong answers have, a third of the words is enough;
    # without either only the words can tell answers apart, so two thirds must be there.
    matches, wanted_words = len(telling.words & have), len(telling.words)
    if telling.values or telling.names:
        return matches >= wanted_words // _WORDS_NEXT_TO
    return matches >= _WORDS_NEEDED * wanted_words


def _contradicts(said: _Text, wanted: _Text) -> bool:
    """Yes against no, am against pm, other units, or a "not" on one side only."""
    for text, other in ((said, wanted), (wanted, said)):
        if text.raw & _YES and other.raw & _NO and not other.raw & _YES:
            return True
    units, right = (
        {_UNITS[word] for word in text.words if word in _UNITS} for text in (said, wanted)
    )
    if units and right and not units & right:
        return True
    half = said.raw & _HALF_DAYS
    if half and wanted.raw & _HALF_DAYS and not half <= wanted.raw:
        return True
    return bool(said.raw & _NOT) != bool(wanted.raw & _NOT)


def _common(texts: Sequence[frozenset[str]]) -> frozenset[str]:
    limit = max(_COMMON_FROM, _COMMON_SHARE * len(texts))
    counts = Counter(word for text in texts for word in text)
    return frozenset(word for word, count in counts.items() if count > limit)


@lru_cache(20_000)  # a few kB each; a set's answers are read again for every question
def _read(text: str) -> _Text:
    plain = _DOTTED.sub(r"\1m", _JOINED_UNIT.sub(r"\1 \2", text))
    for sign, word in _SIGNS.items():
        plain = plain.replace(sign, word)
    mixed = {match.group().casefold() for match in _MIXED.finditer(plain)}
    words: list[str] = []
    values: list[str] = []
    soft, names = set(), set()
    raw: set[str] = set()
    values += sorted(mixed)
    plain = _MIXED.sub(lambda m: " " * len(m.group()), plain) if mixed else plain
    for match in _TOKEN.finditer(plain):
        if match.group("number"):
            values.append(_number(match.group("number")))
            continue
        word, bare = match.group("word"), match.group("word").casefold().replace("’", "'")
        raw.add("not" if bare.endswith("n't") else bare.partition("'")[0])
        if bare in _NUMBER_WORDS:
            values.append(_NUMBER_WORDS[bare])
            if bare == "one":
                soft.add("1")
            continue
        stem = bare if bare in _STOP_WORDS else _stem(bare)
        if stem in _DAYS or (stem in _MONTHS and word[0].isupper()):
            values.append(stem)
            continue
        words.append(stem)
        first = not plain[: match.start()].strip() or _SENTENCE.search(plain[: match.start()])
        if word[0].isupper() and not first and stem not in _STOP_WORDS:
            names.add(stem)
    if soft and values.count("1") > sum(1 for _ in re.finditer(r"(?i)\bone\b", plain)):
        soft.clear()  # the figure 1 is there as well
    return _Text(
        tuple(words),
        tuple(values),
        frozenset(soft),
        frozenset(names),
        frozenset(raw),
        frozenset([*words, *values]),
    )


def _number(text: str) -> str:
    """One form of a number: no thousands separators, no leading or trailing zeros; 9:00 is 9."""
    plain = text.replace(",", "")
    if ":" in plain:
        hours, *rest = plain.split(":")
        rest = [part for part in rest if part.strip("0")]
        return ":".join([hours.lstrip("0") or "0", *rest])
    if plain.count(".") == 1:
        plain = plain.rstrip("0").rstrip(".")
    return plain.lstrip("0") or "0" if not plain.startswith("0.") else plain


def _stem(word: str) -> str:
    """A word without 's, and in the singular where a plural is plain to see."""
    word = word.removesuffix("'s").removesuffix("n't").replace("'", "")
    # No stemmer, which would join words of other meanings: only endings that a plural alone has.
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and word.endswith(("xes", "ches", "shes", "sses", "zes")):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith(("ss", "us", "is")):
        return word[:-1]
    return word
