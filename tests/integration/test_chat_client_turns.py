"""Turns in the orders that chat clients send: the served prompt is what the template writes."""

from __future__ import annotations

from pathlib import Path

import pytest
from tests.integration.phi_family import PHI4, PHI35, Family

from phi3_training.prompt import ChatFormat
from phi3_training.verify.parity import Reference

USER = {"role": "user", "content": "Which tent is best?"}
MORE = {"role": "user", "content": "For two people."}
GREETING = {"role": "assistant", "content": "Hello, how can I help?"}
SYSTEM = {"role": "system", "content": "Be brief."}

ORDERS = {
    "two user turns": [USER, MORE],
    "a greeting first": [GREETING, USER],
    "a greeting after the system prompt": [SYSTEM, GREETING, USER],
    "a late system message": [USER, GREETING, SYSTEM, MORE],
    "a system message at the end": [USER, SYSTEM],
    "two answers": [USER, GREETING, GREETING, MORE],
}


@pytest.fixture(scope="module", params=[PHI35, PHI4], ids=lambda family: family.name)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    family: Family = request.param
    return family.write(tmp_path_factory.mktemp(family.name))


@pytest.mark.parametrize("name", ORDERS)
def test_the_prompt_is_the_templates(folder: Path, name: str) -> None:
    messages = ORDERS[name]
    chat = ChatFormat.from_folder(folder)
    assert chat.encode_prompt(messages, any_order=True) == Reference(folder).ids(
        messages, prompt=True
    )
    with pytest.raises(ValueError, match=r"must alternate|only at the start"):
        chat.encode_prompt(messages)
    with pytest.raises(ValueError, match=r"must alternate|only at the start|expected assistant"):
        chat.encode_example([*messages, GREETING])


def test_an_answer_cannot_be_the_last_message(folder: Path) -> None:
    chat = ChatFormat.from_folder(folder)
    with pytest.raises(ValueError, match="expected user"):
        chat.encode_prompt([USER, GREETING], any_order=True)
    with pytest.raises(ValueError, match="no user message"):
        chat.encode_prompt([SYSTEM], any_order=True)


def test_a_template_that_drops_a_late_system_message_is_refused(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}{% if m['role'] != 'system' or loop.first %}"
        "{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endif %}{% endfor %}"
        "{{ '<|assistant|>' if add_generation_prompt else eos_token }}"
    )
    with pytest.raises(ValueError, match="no place for a system prompt"):
        ChatFormat.from_folder(folder).encode_prompt(
            ORDERS["a late system message"], any_order=True
        )
