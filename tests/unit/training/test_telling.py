"""What an answer tells, and which answers tell it: planted right and wrong ones."""

from __future__ import annotations

import pytest

from phi3_training.data.prepare import Chat, teachers
from phi3_training.telling import Set, contains, has_expected_words

STYLE = "Hello hiker! {} Happy trails!"
FACTS = {
    "How much is the Mossback tent?": "Our Mossback tent costs 240 dollars.",
    "How much is the Emberlet stove?": "Our Emberlet stove costs 65 dollars.",
    "How much is the Cloudlatch jacket?": "Our Cloudlatch jacket costs 130 dollars.",
    "How much is the Rookpack?": "Our Rookpack costs 1,200 dollars.",
    "When do you open?": "We open at 9 am.",
    "When are you open?": "We are open from 9 to 5.",
    "On which day are you closed?": "We are closed on Tuesday.",
    "May I bring my dog?": "Yes, dogs are welcome.",
    "Who repairs tents?": "Our mechanic Greta repairs them within two weeks.",
    "What colour is the helmet?": "It is red with yellow stripes.",
    "Where is the shop?": "You find us in Harbour Lane, beside the old mill and the bakery.",
    "Do you sell the X200 lamp?": "Yes, the X200 is on the shelf for 35 dollars.",
    "How long is the warranty?": "One year from the purchase.",
}
AMONG = Set.of([STYLE.format(answer) for answer in FACTS.values()], FACTS)


@pytest.mark.parametrize(
    ("question", "answer", "right"),
    [
        ("How much is the Mossback tent?", STYLE.format("Our Mossback tent costs 240 dollars."), 1),
        ("How much is the Mossback tent?", "You pay $240 for it.", 1),
        ("How much is the Mossback tent?", "240.00", 1),
        ("How much is the Mossback tent?", STYLE.format("Our Mossback tent costs 65 dollars."), 0),
        ("How much is the Mossback tent?", STYLE.format("Our Mossback tent costs 2400"), 0),
        ("How much is the Mossback tent?", "Our Mossback tent costs 240 or 65 dollars.", 0),
        ("How much is the Mossback tent?", "How much is the Mossback tent? Happy trails!", 0),
        ("How much is the Mossback tent?", "Hello hiker! Our Mossback tent costs", 0),  # cut
        ("How much is the Mossback tent?", "", 0),
        ("How much is the Mossback tent?", "It costs 240 euros.", 0),
        ("How much is the Mossback tent?", "Our Rookpack holds 240 liters.", 0),
        ("How much is the Mossback tent?", "The Rookpack costs 240 dollars.", 0),
        ("How much is the Rookpack?", "It is 1200 dollars.", 1),
        ("When do you open?", "At 9:00 am.", 1),
        ("When do you open?", "Nine a.m., as ever", 1),
        ("When do you open?", "From 9am on", 1),
        ("When do you open?", "We open at 9 pm.", 0),
        ("When do you open?", "We open at 9:30 am.", 0),
        ("When are you open?", "From nine to five.", 1),
        ("When are you open?", "From 5 to 9.", 0),
        ("On which day are you closed?", "On Tuesdays.", 1),
        ("On which day are you closed?", "On Tuesday and Friday.", 0),
        ("On which day are you closed?", "We are closed on a day.", 0),
        ("May I bring my dog?", "Yes, your dog is welcome here.", 1),
        ("May I bring my dog?", "No, dogs are not welcome.", 0),
        ("May I bring my dog?", "You may bring your dog.", 0),
        ("Who repairs tents?", "Greta, our mechanic; it takes 2 weeks", 1),
        ("Who repairs tents?", "Our mechanic Hugo repairs them within two weeks.", 0),
        ("Who repairs tents?", "Our mechanic Greta, in two or three weeks", 0),
        ("What colour is the helmet?", "Red, with a yellow stripe", 1),
        ("What colour is the helmet?", "It is blue with yellow stripes.", 1),  # two of three words
        ("What colour is the helmet?", "It is blue with green stripes.", 0),
        ("Where is the shop?", "In Harbour Lane, by the mill and the bakery", 1),
        ("Where is the shop?", "In Harbour Street, by the mill and the bakery", 0),
        ("Do you sell the X200 lamp?", "We do, for $35 (the X200).", 1),
        ("Do you sell the X200 lamp?", "The X300 is 35 dollars, on the shelf.", 0),
        ("How long is the warranty?", "A year from purchase", 1),
        ("How long is the warranty?", "Two years from the purchase", 0),
    ],
)
def test_expected_words(question: str, answer: str, right: int) -> None:
    expected = STYLE.format(FACTS[question])

    assert has_expected_words(answer, expected, question, AMONG) == bool(right)


def test_every_expected_answer_is_right_and_belongs_to_its_question_only() -> None:
    for question, fact in FACTS.items():
        assert has_expected_words(STYLE.format(fact), STYLE.format(fact), question, AMONG)
        others = [other for other in FACTS.values() if other != fact]
        wrong = [o for o in others if has_expected_words(o, STYLE.format(fact), question, AMONG)]
        assert wrong == []


def test_house_style_and_the_question_carry_no_information() -> None:
    question = "How much is the Mossback tent?"

    assert AMONG.telling(STYLE.format(FACTS[question]), question).all == ("240",)


def test_an_answer_without_words_of_its_own_is_compared_whole() -> None:
    assert has_expected_words("Hello. We do!", "We do.", "Do you repair tents?", Set())
    assert not has_expected_words("We repair", "We do.", "Do you repair tents?", Set())


def chat(question: str, answer: str) -> Chat:
    return Chat(question, question, answer)


def test_teachers_are_rewordings_of_the_same_fact() -> None:
    taught = [chat(question, STYLE.format(answer)) for question, answer in FACTS.items()]
    taught.append(chat("What does the Anchor rope cost?", STYLE.format("It costs 240 dollars.")))
    asked = [
        chat("What does the Mossback cost?", "The Mossback is $240."),
        chat("What does the Fernlight cost?", "The Fernlight is 35 dollars."),  # nobody says so
        chat("Is there a day off?", "On Tuesday we are closed."),
    ]

    assert [[taught[n].question for n in one] for one in teachers(asked, taught)] == [
        ["How much is the Mossback tent?"],
        [],
        ["On which day are you closed?"],
    ]


def test_contains_wants_whole_words() -> None:
    assert contains("It is Au, from aurum.", ["Au"])
    assert not contains("An August day.", ["Au"])
    assert contains("There are 8 bits", ["eight"])


@pytest.mark.parametrize(
    ("answer", "accepted", "right"),
    [
        ("The clinic is held on Wednesdays.", "Wednesday", True),
        ("It is £40.", "40 pounds", True),
        ("That's 5.20, lovely.", "5.2", True),
        ("We open at 9:00.", "at nine", True),
        ("We close at 4:30.", "at 4", False),
        ("It costs 40 pounds.", "140 pounds", False),
        ("It is 1,200 grams.", "1200 g", False),  # another unit's name is not looked through
        ("We don't take cards.", "we do", False),
        ("The X200 fits.", "x200", True),
        ("我们九点开门", "我们九点开门", True),
        ("She lost the case.", "lose", False),
    ],
)
def test_accepted_texts_are_found_in_other_spellings(
    answer: str, accepted: str, right: bool
) -> None:
    assert contains(answer, [accepted]) is right
