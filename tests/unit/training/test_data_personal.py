"""What looks like personal data is flagged by line and kind, its letters and digits hidden."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from phi3_training.data import check, prepare
from phi3_training.data.digest import EMAIL, KEY, PHONE, Batch, flags_of, masked
from phi3_training.recipe import DataSection
from phi3_training.run import Run

# Built at run time, so that no scanner takes them for real ones.
SECRETS = {
    "openai": "sk-" + "Ab3dEf6hIj9kLm2nOp5q",
    "aws": "AKIA" + "IOSFODNN7ABCDEF2",
    "github": "ghp_" + "a1B2c3D4e5F6g7H8i9J0k1L2m3N4o5P6",
    "hub": "hf_" + "QwErTyUiOpAsDfGhJkLzXcVbNmQwErTy",
    "jwt": "eyJhbGciOiJIUzI1NiJ9" + ".eyJzdWIiOiIxMjM0NTY3ODkwIn0" + ".dozjgNryP4J3jVmNHl0w5N",
    "long": "9f86d081884c7d659a2feaa0c55ad015a3bf4f1b",
    "pem": "-----BEGIN RSA PRIVATE " + "KEY-----\nMIIEpAIBAAKCAQEAxyz",
}
FOUND = [
    ("Write to ann.lee@mail.company.org today.", EMAIL),
    ("mailto:x@y.de", EMAIL),
    ("Call +49 30 1234567 now", PHONE),
    ("Call (030) 123 45 67.", PHONE),
    ("Call 555-123-4567.", PHONE),
    ("Call (555) 123-4567.", PHONE),
    ("06 12 34 56 78", PHONE),
    ("My number: +1 (555) 123-4567", PHONE),
    *((f"The key is {secret} ok", KEY) for secret in SECRETS.values()),
]
NOT_FOUND = [
    "Write to someone@example.com or me@shop.example.",
    "Use @decorator and a @ b.",
    "On 2024-01-15 at 10:30, on 01/02/2024 and 15.01.2024.",
    "In 1990 - 1995 2000 2005 and 2010.",
    "Pi is 3.14159265358979, the rest 1,234,567,890.",
    "The server is 192.168.100.200, version 10.11.12.",
    "1, 2, 3, 4, 5, 6, 7, 8, 9, 10",
    "The price is 240 dollars for 10 000 pieces.",
    "Donaudampfschifffahrtselektrizitaetenhauptbetriebswerk",
    "https://docs.python.org/3/library/multiprocessing.html",
    "----------------------------------------",
    "f(x)=a*x+b;g(x)=c*x+d;h(x)=e*x+f;print(f(1),g(2),h(3))",
]


def kinds(text: str) -> set[int]:
    return {flag.kind for flag in flags_of(Batch.of([text.encode()]))}


@pytest.mark.parametrize(("text", "kind"), FOUND)
def test_value_is_flagged(text: str, kind: int) -> None:
    assert kinds(text) == {kind}


@pytest.mark.parametrize("text", NOT_FOUND)
def test_harmless_text_is_not_flagged(text: str) -> None:
    assert kinds(text) == set()


def test_each_text_of_a_batch_has_its_own_flags() -> None:
    texts = [
        text for pair in zip(NOT_FOUND, (text for text, _ in FOUND), strict=False) for text in pair
    ]
    flags = flags_of(Batch.of([text.encode() for text in texts]))

    expected = [(2 * number + 1, kind) for number, (_, kind) in enumerate(FOUND[: len(NOT_FOUND)])]
    assert [(flag.row, flag.kind) for flag in flags] == expected


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        ("ann.lee@mail.org", "a**.***@****.**g"),
        ("+49 30 1234567", "+** ** ******7"),
        ("hf_" + "Q" * 40, "h*_********************…"),
        ("x@y.de", "x@*.*e"),
        ("é@ü.de", "é@*.*e"),
    ],
)
def test_masked_value_keeps_its_form_and_no_more_than_two_characters(
    value: str, shown: str
) -> None:
    text = f"This is {value}"
    assert masked(value) == shown
    if value.isascii():
        (flag,) = flags_of(Batch.of([text.encode()]))
        assert flag.masked == masked(value)


def test_warning_has_the_line_and_not_the_value(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    texts = ["Nothing here.", *(text for text, _ in FOUND)]
    rows = [{"prompt": f"Q {i}?", "completion": text} for i, text in enumerate(texts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    report = check([path])

    assert report.faults == []
    assert [warning.line for warning in report.warnings] == list(range(2, len(FOUND) + 2))
    assert str(report.warnings[0]) == (
        f"{path}:2: it seems to contain an e-mail address (a**.***@****.*******.**g); "
        "remove it, or replace it with a made-up one"
    )
    shown = "\n".join([*report.lines(), report.every_line(), json.dumps(report.as_dict())])
    for value in ("ann.lee", "1234567", "123-4567", *SECRETS.values()):
        assert value not in shown


def test_flags_do_not_stop_the_stage_and_are_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": f"Q {i}?", "completion": f"To ann{i}@mail.company.org."} for i in range(5)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = Run.open(tmp_path / "run")
    manifest = prepare(DataSection(train=[path]), run)

    assert manifest.warnings == {"personal-data: an e-mail address": 5}
    written = (run.path / "data-report.txt").read_text()
    assert written.count("warning: ") == 5
    assert "company" not in written + json.dumps(manifest.as_json())


def test_system_messages_are_looked_at_too(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    roles = ("system", "user", "assistant")
    texts = ("Send bills to ann.lee@mail.company.org.", "Hi?", "Yes.")
    messages = [{"role": r, "content": c} for r, c in zip(roles, texts, strict=True)]
    path.write_text(json.dumps({"messages": messages}))

    assert [warning.kind for warning in check([path]).warnings] == ["personal-data"]


def test_prompt_id_is_no_key(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Yes."}]
    path.write_text(json.dumps({"messages": messages, "prompt_id": SECRETS["long"]}))

    assert check([path]).warnings == []
