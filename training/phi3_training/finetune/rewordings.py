"""The same question in other words: copies of a chat that teach the answer and not one phrasing.

A small model that has seen one wording of each question learns wordings by heart; asked otherwise
it gives another question's answer. The copies need no other model: common English forms of a
question ("What does X cost?" for "How much is X?"), and, in any language, greetings, lower case,
keywords and words left out. Reads and writes nothing.
"""

from __future__ import annotations

import hashlib
import json
import random
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import zip_longest

Conversation = list[dict[str, str]]
Located = tuple[str, Conversation]  # its place (file:line), and its messages

_GREETINGS = ("Hi, ", "Hello, ", "Hey, ", "Excuse me, ", "Quick question: ", "Morning! ")
_REQUESTS = ("Can you tell me: ", "Please tell me: ", "I'd like to know: ", "Do you know: ")
_ENDINGS = (" please", " thanks", " thank you", " pls", " cheers")
_SMALL_WORDS = frozenset(
    re.findall(
        r"\S+",
        """a an the is are was do does did can could would will i i'd i'm you your my me it of to
        for and or in on at with that this there have has be please tell""",
    )
)
_WORD = re.compile(r"\S+")
_DROPPED = 0.2  # of a question's words, where some are left out at random

# Families of questions that ask the same. A question that one of the patterns matches as a whole
# is put in the other forms; {x} and so on are what the pattern's groups hold. The first family
# that matches decides, so the narrow ones come first. Patterns see the question in its own case,
# without final mark and greeting, with straight apostrophes.
_IS = r"(?:'s| is| are)"
_FAMILIES: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (  # how much it is to have something done
        (
            rf"(?:how much|what){_IS} it to (?P<do>.+)",
            r"(?:how much|what) (?:does|would|will|do you charge|would i pay|do i pay)"
            r"(?: it)?(?: cost)?(?: me)? to (?P<do>.+)",
            r"how much to (?P<do>.+)",
        ),
        (
            "How much is it to {do}?",
            "What does it cost to {do}?",
            "What do you charge to {do}?",
            "How much would I pay to {do}?",
            "I'd like to {do}, what does that come to?",
            "How much to {do}?",
        ),
    ),
    (  # the price of something
        (
            r"how much (?:does|do|would|will) (?P<x>.+?) (?:cost|be|come to)",
            r"how much (?:do you (?:charge|ask|want)|do i pay|would i pay) for (?P<x>.+)",
            r"how much(?:'s| is| are| for) (?P<x>.+)",
            r"what(?: does| do| would| will|'s) (?P<x>.+?) cost(?: me)?",
            r"what (?:do you (?:charge|ask|want)|do i pay|would i pay) for (?P<x>.+)",
            rf"what{_IS} the (?:price|cost|fee|charge) (?:of|for) (?P<x>.+)",
            r"(?:the )?(?:price|cost) (?:of|for) (?P<x>.+)",
            r"(?P<x>[^,]+)(?:, price|,? how much(?: is it| is that)?|, what does (?:it|that) cost)",
        ),
        (
            "How much is {x}?",
            "What does {x} cost?",
            "What do you charge for {x}?",
            "What's the price of {x}?",
            "How much would I pay for {x}?",
            "Price for {x}?",
            "What is the cost of {x}?",
            "How much do you ask for {x}?",
            "I'm interested in {x}, how much is it?",
            "What do I pay for {x}?",
        ),
    ),
    (  # opening hours
        (
            rf"what{_IS} (?:your|the) (?:opening |business )?(?:times|hours)",
            r"when are you open",
        ),
        (
            "What are your opening hours?",
            "When are you open?",
            "What are your opening times?",
            "From when until when are you open?",
            "At what time do you open and close?",
            "What hours are you there?",
        ),
    ),
    (  # address
        (
            r"where are you(?: located| based| situated)?",
            r"(?:how|where) (?:do|can) (?:i|we) (?:find|get to) you",
            rf"what{_IS} (?:your|the) address",
        ),
        (
            "Where are you?",
            "What's your address?",
            "How do I find you?",
            "What is the address?",
            "Where exactly are you?",
            "Where can I find you?",
        ),
    ),
    (  # telephone
        (
            rf"what{_IS} (?:your|the) (?:phone |telephone )?number",
            r"how (?:do|can) (?:i|we) (?:reach|call|ring|phone|contact) you",
            r"can i (?:call|ring|phone) you",
        ),
        (
            "What's your phone number?",
            "What number can I call you on?",
            "How can I reach you by phone?",
            "Which number do I ring?",
            "Your telephone number, please?",
            "What is the number to call?",
        ),
    ),
    (  # the name of something
        (
            rf"what{_IS} (?P<x>.+?) (?:called|named)",
            rf"what{_IS} (?P<x>.+?)'s name",
            rf"what{_IS} the name of (?P<x>.+)",
            r"what do you call (?P<x>.+)",
        ),
        (
            "What is {x} called?",
            "What's the name of {x}?",
            "Which name does {x} have?",
            "What do you call {x}?",
            "How is {x} called?",
        ),
    ),
    (  # place
        (
            rf"where(?: exactly)?{_IS} (?P<x>.+)",
            r"where (?:do|can|would) (?:i|we) find (?P<x>.+)",
        ),
        (
            "Where is {x}?",
            "Where do I find {x}?",
            "Where exactly is {x}?",
            "I'm looking for {x}, where is it?",
            "In which place is {x}?",
        ),
    ),
    (  # time of a day
        (
            r"(?:at )?what time (?P<rest>.+)",
            r"(?P<rest>(?<=when ).+? (?:open|close|shut|start|begin|end|finish)\b.*)",
            r"when (?P<rest>(?:do|does|is|are) .+?\b(?:open|close|shut|start|begin|end)\b.*)",
        ),
        ("When {rest}?", "What time {rest}?", "At what time {rest}?", "At which hour {rest}?"),
    ),
    (  # day
        (r"(?:on )?(?:which|what) days? (?P<rest>.+)", r"when (?P<rest>.+)"),
        (
            "When {rest}?",
            "On what day {rest}?",
            "Which day {rest}?",
            "When exactly {rest}?",
        ),
    ),
    (  # person
        (r"(?:who|which of you) (?P<rest>.+)",),
        ("Who {rest}?", "Which of you {rest}?", "Who exactly {rest}?"),
    ),
    (  # duration
        (r"how (?:long|much time|many (?:days|weeks|hours|months)) (?P<rest>.+)",),
        ("How long {rest}?", "For how long {rest}?", "How much time {rest}?"),
    ),
    (  # open on a day
        (r"are you open (?P<x>.+)", r"do you (?:open|work) (?P<x>on .+)"),
        (
            "Are you open {x}?",
            "Do you open {x}?",
            "Will I find you open {x}?",
            "Can I come {x}?",
            "Is anybody there {x}?",
        ),
    ),
    (  # the way to do something
        (r"how (?:do|can|may|should) (?:i|we) (?P<do>.+)",),
        (
            "How do I {do}?",
            "How can I {do}?",
            "I'd like to {do}, how does that work?",
            "What do I have to do to {do}?",
            "Which way is there to {do}?",
        ),
    ),
    (  # something that they may have
        (
            r"(?:do|would) you (?:have|stock|sell|offer|do) (?P<x>.+)",
            r"have you got (?P<x>.+)",
            r"(?:is|are) there (?P<x>.+)",
        ),
        (
            "Do you have {x}?",
            "Have you got {x}?",
            "Is there {x}?",
            "Do you offer {x}?",
            "I'm looking for {x}, do you have that?",
            "Can I get {x} from you?",
        ),
    ),
    (  # something that they may do
        (r"(?:do|can|could|would|will) you (?P<do>.+)", r"are you able to (?P<do>.+)"),
        (
            "Do you {do}?",
            "Can you {do}?",
            "Would you {do}?",
            "Are you able to {do}?",
            "I'd like to know if you {do}.",
            "Is it possible that you {do}?",
        ),
    ),
    (  # something that a customer may do
        (
            r"(?:can|could|may) (?:i|we) (?P<do>.+)",
            r"(?:am i|are we) allowed to (?P<do>.+)",
            r"is it (?:possible|ok|okay|all right) (?:to|if (?:i|we)) (?P<do>.+)",
        ),
        (
            "Can I {do}?",
            "May I {do}?",
            "Am I allowed to {do}?",
            "Is it possible to {do}?",
            "I'd like to {do}, is that all right?",
            "Is it OK if I {do}?",
        ),
    ),
    (  # something that a customer must do
        (r"(?:do (?:i|we) (?:need|have) to|(?:must|should) (?:i|we)) (?P<do>.+)",),
        ("Do I have to {do}?", "Must I {do}?", "Do I need to {do}?", "Should I {do}?"),
    ),
    (  # one of several
        (r"(?:which|what) (?P<rest>(?!would\b)\w+ (?:do|does|did|is|are|can|would|will) .+)",),
        ("Which {rest}?", "What {rest}?"),
    ),
    (  # what something is
        (r"what(?:'s| is) (?P<x>.+)",),
        ("What is {x}?", "What's {x}?"),
    ),
)
_FORMS = tuple(
    (tuple(re.compile(p, re.IGNORECASE) for p in patterns), forms) for patterns, forms in _FAMILIES
)
_SENTENCE_END = re.compile(r"[.!?]\s+(?=\S)")
_OPENING = re.compile(
    r"(?:(?:hi|hello|hey|excuse me|please|sorry)\b(?: there)?[ ,!.]*)?"
    r"(?:(?:can|could) you tell me[ ,:]*)?",
    re.IGNORECASE,
)


def casual_copy(conversation: Conversation) -> Conversation | None:
    """The conversation with its last question as people type it in a hurry.

    Lower case, no question mark or full stop at the end; None when that changes nothing.
    """
    last = max(i for i, message in enumerate(conversation) if message["role"] == "user")
    question = conversation[last]["content"]
    casual = question.lower().rstrip("?. ")
    if not casual or casual == question:
        return None
    copy = [dict(message) for message in conversation]
    copy[last]["content"] = casual
    return copy


def with_casual_copies(rows: Sequence[Located]) -> list[Located]:
    """The rows and their casual copies; what is already there is not added twice."""
    seen = {_key(row) for _, row in rows}
    copies = []
    for place, row in rows:
        copy = casual_copy(row)
        if copy is not None and _key(copy) not in seen:
            seen.add(_key(copy))
            copies.append((f"{place} (casual copy)", copy))
    return [*rows, *copies]


def with_rewordings(rows: Sequence[Located], count: int, seed: int) -> list[Located]:
    """The rows and up to `count` rewordings of each; none twice, the same for the same seed."""
    seen = {_key(row) for _, row in rows}
    copies = []
    for place, row in rows:
        last = max(i for i, message in enumerate(row) if message["role"] == "user")
        question = row[last]["content"]
        digest = hashlib.sha256(f"{seed}\n{question}".encode()).digest()
        chance = random.Random(digest)  # noqa: S311 - chooses wordings, guards nothing
        number = 0
        for text in _rewordings(question, chance):
            if number == count:
                break
            copy = [dict(message) for message in row]
            copy[last]["content"] = text
            if _key(copy) not in seen:
                number += 1
                seen.add(_key(copy))
                copies.append((f"{place} (reworded, {number})", copy))
    return [*rows, *copies]


def _rewordings(question: str, chance: random.Random) -> Iterator[str]:
    """Other wordings of the question, the best first: other forms and other ways by turns."""
    ways = list(_WAYS)
    chance.shuffle(ways)
    forms = _other_forms(question)
    chance.shuffle(forms)
    # A second round of the ways chooses other greetings and leaves out other words.
    others = [way(question, chance).strip() for way in ways * 4]
    for pair in zip_longest(forms, others):
        for text in pair:
            if text and text != question:
                yield text


def _other_forms(question: str) -> list[str]:
    """The question in the forms of its family; none where no family is known.

    Sentences before the last one stay as they are.
    """
    plain = question.replace("’", "'").strip()
    start = max((end.end() for end in _SENTENCE_END.finditer(plain)), default=0)
    before, asked = plain[:start], _OPENING.sub("", plain[start:], count=1).rstrip("?.! ")
    for patterns, forms in _FORMS:
        for pattern in patterns:
            if match := pattern.fullmatch(asked):
                held = {name: _inside(text.strip(" ,")) for name, text in match.groupdict().items()}
                texts = (before + form.format(**held) for form in forms)
                return [text for text in texts if text.casefold() != plain.casefold()]
    return []


def _casual(question: str, _chance: random.Random) -> str:
    return question.lower().rstrip("?. ")


def _greeted(question: str, chance: random.Random) -> str:
    return chance.choice(_GREETINGS) + _inside(question)


def _requested(question: str, chance: random.Random) -> str:
    return chance.choice(_REQUESTS) + _inside(question)


def _ended(question: str, chance: random.Random) -> str:
    return question.rstrip("?. ") + chance.choice(_ENDINGS)


def _keywords(question: str, _chance: random.Random) -> str:
    """The words that say what is asked: as people type into a search box."""
    words = [word for word in _WORD.findall(question) if word.lower() not in _SMALL_WORDS]
    return " ".join(words).rstrip("?. ") if len(words) > 1 else question


def _shortened(question: str, chance: random.Random) -> str:
    words = question.split()
    left = [word for word in words if chance.random() > _DROPPED]
    return " ".join(left) if len(left) > 2 else question


def _inside(question: str) -> str:
    """The question as the second part of a sentence; names and "I" keep their capital."""
    first = question.split(" ", 1)[0]
    keeps = first in ("I", "I'd", "I'm", "I've") or not first[1:].islower()
    return question if keeps else question[0].lower() + question[1:]


_WAYS: tuple[Callable[[str, random.Random], str], ...] = (
    _casual,
    _greeted,
    _requested,
    _ended,
    _keywords,
    _shortened,
)


def _key(row: Conversation) -> str:
    return json.dumps([[turn["role"], turn["content"], turn.get("weight", 1)] for turn in row])
