"""What rows mean: nothing that their owner said is dropped without a word."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from phi3_training.data import Conversation, check, read_conversations
from phi3_training.data.check import TokenViewer
from phi3_training.data.formats import read_row
from phi3_training.finetune.audit import SeenPacked, audit_packed, expected_labels
from phi3_training.finetune.rewordings import with_casual_copies
from phi3_training.finetune.rows import audited, encode_rows
from phi3_training.finetune.weights import make_tokenizer
from phi3_training.prompt import ChatFormat

ASK, SAY = {"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}
NO = {"role": "assistant", "content": "No."}
ASK_SHAREGPT = {"from": "human", "value": "Hi?"}
SYSTEM = ("system", "Be kind.")
PAIR = [("user", "Hi?"), ("assistant", "Hello.")]
EARLIER = [("user", "Who?"), ("assistant", "Me.")]
PHI3 = "<|user|>\nHi?<|end|>\n<|assistant|>\nHello.<|end|>\n"
CHATML = "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\nHello.<|im_end|>\n"
TURN = {"inputs": {"input_data": "Who?"}, "outputs": {"answer": "Me."}}

READ: dict[str, tuple[dict[str, Any], list[tuple[str, str]]]] = {
    "anthropic system": ({"system": "Be kind.", "messages": [ASK, SAY]}, [SYSTEM, *PAIR]),
    "same system twice": (
        {"system": "Be kind.", "messages": [{"role": "system", "content": "Be kind."}, ASK, SAY]},
        [SYSTEM, *PAIR],
    ),
    "system prompt of a pair": (
        {"system_prompt": "Be kind.", "input": "Hi?", "output": "Hello."},
        [SYSTEM, *PAIR],
    ),
    "developer": (
        {"messages": [{"role": "developer", "content": "Be kind."}, ASK, SAY]},
        [SYSTEM, *PAIR],
    ),
    "text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi?"}]}, SAY]},
        PAIR,
    ),
    "two text parts": (
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "A"}, "B"]}, SAY]},
        [("user", "A\nB"), PAIR[1]],
    ),
    "question/answer": ({"question": "Hi?", "answer": "Hello."}, PAIR),
    "Question/Answer": ({"Question": "Hi?", "Answer": "Hello."}, PAIR),
    "query/response": ({"query": "Hi?", "response": "Hello."}, PAIR),
    "instruction/response": ({"instruction": "Hi?", "response": "Hello."}, PAIR),
    "context (Dolly)": (
        {"instruction": "Hi?", "context": "It rains.", "response": "Hello."},
        [("user", "Hi?\n\nIt rains."), PAIR[1]],
    ),
    "alpaca history": (
        {"instruction": "Hi?", "output": "Hello.", "history": [["Who?", "Me."]]},
        [*EARLIER, *PAIR],
    ),
    "TRL prompt and completion": ({"prompt": [ASK], "completion": [SAY]}, PAIR),
    "TRL prompt list, completion text": ({"prompt": [ASK], "completion": "Hello."}, PAIR),
    "messages as JSON in a text": ({"messages": json.dumps([ASK, SAY])}, PAIR),
    "content is one text part": (
        {"messages": [{"role": "user", "content": {"type": "text", "text": "Hi?"}}, SAY]},
        PAIR,
    ),
    "Cohere's role": ({"messages": [ASK, {"role": "chatbot", "content": "Hello."}]}, PAIR),
    "Vertex AI's columns": ({"input_text": "Hi?", "output_text": "Hello."}, PAIR),
    "Gemini's columns": ({"text_input": "Hi?", "output": "Hello."}, PAIR),
    "Anthropic's preferences": (
        {
            "chosen": "\n\nHuman: Who?\n\nAssistant: Me.\n\nHuman: Hi?\n\nAssistant: Hello.",
            "rejected": "\n\nHuman: Who?\n\nAssistant: Me.\n\nHuman: Hi?\n\nAssistant: No.",
        },
        [*EARLIER, *PAIR],
    ),
    "transcript of a question": (
        {"prompt": "\n\nHuman: Hi?\n\nAssistant:", "completion": " Hello."},
        PAIR,
    ),
    "the answer is one message": ({"prompt": [ASK], "completion": SAY}, PAIR),
    "OpenAI's preferences": (
        {"input": {"messages": [ASK]}, "preferred_output": [SAY], "non_preferred_output": [NO]},
        PAIR,
    ),
    "preference, implicit prompt": ({"chosen": [ASK, SAY], "rejected": [ASK, SAY]}, PAIR),
    "preference, explicit prompt": (
        {"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."},
        PAIR,
    ),
    "preference, prompt repeated": (
        {"prompt": [ASK], "chosen": [ASK, SAY], "rejected": [ASK]},
        PAIR,
    ),
    "prompt flow": (
        {"input_data": "Hi?", "chat_history": [TURN], "answer": "Hello."},
        [*EARLIER, *PAIR],
    ),
    "prompt flow batch": (
        {"inputs.input_data": "Hi?", "inputs.chat_history": [], "outputs.answer": "Hello."},
        PAIR,
    ),
    "prompt flow record": ({"inputs": {"question": "Hi?"}, "outputs": {"answer": "Hello."}}, PAIR),
    "rendered by Phi-3": ({"text": PHI3 + "<|endoftext|>"}, PAIR),
    "rendered, with system": (
        {"text": "<|system|>\nBe kind.<|end|>\n" + PHI3},
        [SYSTEM, *PAIR],
    ),
    "rendered as ChatML": ({"text": CHATML}, PAIR),
    "rendered prompt": (
        {"prompt": PHI3.partition("Hello.")[0], "completion": "Hello."},
        PAIR,
    ),
    "null keys": ({"messages": [ASK, {**SAY, "tool_calls": None}], "tools": []}, PAIR),
    "desirable": ({"prompt": "Hi?", "completion": "Hello.", "label": True}, PAIR),
    "LLaMA-Factory's preference": (
        {
            "conversations": [ASK_SHAREGPT],
            "chosen": {"from": "gpt", "value": "Hello."},
            "rejected": {"from": "gpt", "value": "No."},
        },
        PAIR,
    ),
    "preference with its conversation (UltraFeedback)": (
        {"prompt": "Hi?", "chosen": [ASK, SAY], "rejected": [ASK, NO], "messages": [ASK, SAY]},
        PAIR,
    ),
    "preference with an input": (
        {"instruction": "Hi?", "input": "It rains.", "chosen": "Hello.", "rejected": "No."},
        [("user", "Hi?\n\nIt rains."), PAIR[1]],
    ),
    "preference with a history": (
        {"prompt": "Hi?", "history": [["Who?", "Me."]], "chosen": "Hello.", "rejected": "No."},
        [*EARLIER, *PAIR],
    ),
    "preference, whole with a system": (
        {"system": "Be kind.", "question": "Hi?", "chosen": [ASK, SAY], "rejected": [ASK, NO]},
        [SYSTEM, *PAIR],
    ),
    "a column named chosen": (
        {"question": "Hi?", "answer": "Hello.", "chosen": "yes"},
        PAIR,
    ),
    "prompt flow, the right answers asked along": (
        {"outputs.answer": "Hello.", "inputs.question": "Hi?", "inputs.answer": "Truth."},
        PAIR,
    ),
    "prompt flow, an output that repeats the question": (
        {"inputs": {"question": "Hi?"}, "outputs": {"question": "HI?", "answer": "Hello."}},
        PAIR,
    ),
    "prompt flow, history as text": (
        {"input_data": "Hi?", "chat_history": json.dumps([TURN]), "answer": "Hello."},
        [*EARLIER, *PAIR],
    ),
    "prompt flow, more inputs and outputs": (
        {
            "input_data": "Hi?",
            "chat_history": [
                {
                    "inputs": {"input_data": "Who?", "system_prompt": "x"},
                    "outputs": {"answer": "Me.", "context": "y"},
                }
            ],
            "answer": "Hello.",
        },
        [*EARLIER, *PAIR],
    ),
    "history as messages": (
        {
            "prompt": "Hi?",
            "response": "Hello.",
            "history": [
                {"role": "user", "content": "Who?"},
                {"role": "assistant", "content": "Me."},
            ],
        },
        [*EARLIER, *PAIR],
    ),
    "system as parts (Anthropic, Bedrock)": (
        {
            "system": [{"text": "Be kind."}],
            "messages": [{"role": "user", "content": [{"text": "Hi?"}]}, SAY],
        },
        [SYSTEM, *PAIR],
    ),
    "system of the second list": (
        {
            "messages": [ASK, SAY],
            "conversations": [{"from": "system", "value": "Be kind."}, ASK, SAY],
        },
        [SYSTEM, *PAIR],
    ),
    "columns with spaces": ({" Question": "Hi?", "ANSWER ": "Hello."}, PAIR),
    "the name of a person": ({"user": "ann", "question": "Hi?", "answer": "Hello."}, PAIR),
    "user/assistant": ({"user": "Hi?", "assistant": "Hello."}, PAIR),
    "the whole prompt beside its parts": (
        {"instruction": "Hi?", "output": "Hello.", "prompt": "### Instruction:\nHi?\n"},
        PAIR,
    ),
    "a question about a control token": (
        {"prompt": "What does <|user|> mean?", "completion": "A role, as [INST] does."},
        [("user", "What does <|user|> mean?"), ("assistant", "A role, as [INST] does.")],
    ),
    "rendered beside its messages": ({"messages": [ASK, SAY], "text": PHI3}, PAIR),
    "rendered, closed by the end of text": (
        {"text": "<s><|user|>Hi?<|end|><|assistant|>Hello.<|endoftext|>"},
        PAIR,
    ),
    "lists of TRL beside messages": (
        {"messages": [ASK, SAY], "prompt": [ASK], "completion": [SAY]},
        PAIR,
    ),
    "empty lists as text": ({"messages": [ASK, SAY], "tools": "[]"}, PAIR),
    "both forms alike": ({"messages": [ASK, SAY], "prompt": "Hi?", "completion": "Hello."}, PAIR),
}

# What would be another conversation than its owner's, or no whole one.
LOST_END = "<|user|>\na<|end|>\n<|assistant|>\nb\n<|user|>\nc<|end|>\n<|assistant|>\nd<|end|>"
REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "two systems": (
        {"system": "Be rude.", "messages": [{"role": "system", "content": "Be kind."}, ASK, SAY]},
        "two-formats",
        "'system' differs",
    ),
    "tools": ({"messages": [ASK, SAY], "tools": [{"type": "function"}]}, "meaning", "'tools'"),
    "tools of OpenAI's preferences": (
        {"input": {"messages": [ASK], "tools": [{}]}, "preferred_output": [SAY]},
        "meaning",
        "'tools'",
    ),
    "Alpaca's prompt, rendered": (
        {"prompt": "### Instruction:\nHi?\n\n### Response:\n", "completion": "Hello."},
        "rendered-text",
        "Alpaca's prompt",
    ),
    "row that is not to be learnt": ({"messages": [ASK, SAY], "train": 0}, "weight", "'train'"),
    "context of messages": ({"messages": [ASK, SAY], "context": "x"}, "meaning", "'context'"),
    "tool call": (
        {"messages": [ASK, {**SAY, "tool_calls": [{"id": "1"}]}]},
        "tools",
        "messages[1] uses tools ('tool_calls')",
    ),
    "tool turn": (
        {"messages": [ASK, {"role": "tool", "content": "4"}, SAY]},
        "tools",
        "messages[1] uses tools ('tool')",
    ),
    "sharegpt function call": (
        {
            "conversations": [
                {"from": "human", "value": "a"},
                {"from": "function_call", "value": "b"},
            ]
        },
        "tools",
        "'function_call'",
    ),
    "forms differ": (
        {"messages": [ASK, SAY], "prompt": "Hi?", "completion": "Bye."},
        "two-formats",
        "messages and prompt/completion",
    ),
    "answers differ": (
        {"question": "Hi?", "answer": "Hello.", "response": "Bye."},
        "two-formats",
        "'answer' and 'response' differ",
    ),
    "undesirable": (
        {"prompt": "Hi?", "completion": "Hello.", "label": False},
        "meaning",
        "'label' is false",
    ),
    "share of a weight": (
        {"messages": [ASK, {**SAY, "weight": 0.5}]},
        "weight",
        "messages[1].weight is 0.5",
    ),
    "nothing to learn": (
        {"messages": [ASK, {**SAY, "weight": 0}]},
        "nothing-to-learn",
        "weight 0",
    ),
    "Llama's template": (
        {"text": "<s>[INST] Hi? [/INST] Hello. </s>"},
        "rendered-text",
        "template",
    ),
    "plain text": ({"text": "Once upon a time."}, "rendered-text", "plain text"),
    "picture": (
        {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, SAY]},
        "not-text",
        "'image_url'",
    ),
    "the conversation is the rejected one": (
        {"messages": [ASK, NO], "chosen": [ASK, SAY], "rejected": [ASK, NO]},
        "two-formats",
        "'messages' and 'chosen'",
    ),
    "another question in chosen": (
        {"prompt": "Who?", "chosen": [ASK, SAY], "rejected": [ASK, NO]},
        "two-formats",
        "'prompt' and 'chosen'",
    ),
    "texts without a question": (
        {"chosen": "b", "rejected": "c"},
        "unknown-format",
        "'chosen' is a text",
    ),
    "rejected alone": ({"prompt": "Hi?", "rejected": "No."}, "unknown-format", "no 'chosen'"),
    "a line of a run that failed": (
        {"inputs.question": "Hi?", "outputs.answer": "(Failed)"},
        "failed-line",
        "no answer",
    ),
    "undesirable, in a table": (
        {"prompt": "Hi?", "completion": "Hello.", "label": "False"},
        "meaning",
        "'label' is false",
    ),
    "row not to be learnt": ({"messages": [ASK, SAY], "train": False}, "weight", "'train'"),
    "row of half a weight": ({"messages": [ASK, SAY], "weight": 0.5}, "weight", "0.5"),
    "weights that disagree": (
        {"messages": [ASK, {**SAY, "weight": 1, "train": False}]},
        "weight",
        "'weight' and 'train' differ",
    ),
    "parts of an answer": (
        {"messages": [ASK, {**SAY, "train_detail": [{"begin_offset": 0, "train": False}]}]},
        "weight",
        "train_detail",
    ),
    "weights of two lists": (
        {
            "messages": [ASK, SAY, ASK, {**SAY, "weight": 0}],
            "conversations": [ASK, SAY, ASK, SAY],
        },
        "two-formats",
        "messages and conversations",
    ),
    "systems of two lists": (
        {
            "messages": [{"role": "system", "content": "Be rude."}, ASK, SAY],
            "conversations": [{"from": "system", "value": "Be kind."}, ASK, SAY],
        },
        "two-formats",
        "two system messages",
    ),
    "two spellings of a column": (
        {"Question": "Who?", "question": "Hi?", "answer": "Hello."},
        "two-formats",
        "'question' twice",
    ),
    "text that says otherwise": (
        {"messages": [ASK, NO], "text": PHI3},
        "two-formats",
        "messages and text",
    ),
    "a turn without its end": ({"text": LOST_END}, "rendered-text", "turn 2 (assistant)"),
    "cut text": ({"text": PHI3.removesuffix("<|end|>\n")}, "rendered-text", "does not end"),
    "two chats in one text": (
        {"text": f"{PHI3}<|endoftext|>{PHI3}"},
        "rendered-text",
        "several conversations",
    ),
    "rendered tool turn": (
        {"text": PHI3 + "<|tool|>\n4<|end|>"},
        "rendered-text",
        "the role 'tool'",
    ),
    "Llama 3's template": (
        {"text": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi?<|eot_id|>"},
        "rendered-text",
        "Llama 3",
    ),
    "greeting first": ({"messages": [SAY, ASK, SAY]}, "role-order", "starts with an assistant"),
}


@pytest.mark.parametrize("name", READ)
def test_a_row_says_what_its_owner_said(name: str) -> None:
    row, wanted = READ[name]
    read = read_row(row)
    assert read.problems == []
    assert [(message.role, message.content) for message in read.messages] == wanted
    assert all(message.learn for message in read.messages)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_kept_is_refused_by_name(name: str) -> None:
    row, kind, words = REFUSED[name]
    (problem,) = read_row(row).problems
    assert problem.kind == kind
    assert words in problem.what


def test_wrong_order_names_the_command_that_repairs_it() -> None:
    (problem,) = read_row({"messages": [ASK, ASK, SAY]}).problems
    assert "phi3 data fix FILE -o NEW" in problem.fix


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    texts = ["Hi? Hello. Who? Me. no yes"]
    make_tokenizer(texts, folder, vocab_size=300, model_max_length=512)
    (folder / "config.json").write_text('{"max_position_embeddings": 512}')
    return folder


@pytest.fixture(scope="module")
def viewer(model: Path) -> TokenViewer:
    return TokenViewer(model)


@pytest.fixture(scope="module")
def chat(model: Path) -> ChatFormat:
    return ChatFormat.from_folder(model)


def one(path: Path, row: dict[str, Any]) -> Conversation:
    path.write_text(json.dumps(row), encoding="utf-8")
    (conversation,) = read_conversations([path])
    return conversation


@pytest.mark.parametrize(
    "mark",
    [
        {"weight": 0},
        {"weight": 0.0},
        {"train": False},
        {"training": False},
        {"loss": False},
        {"weight": "0"},
        {"train": "False"},
    ],
)
@pytest.mark.parametrize(
    "keys", [("messages", "role", "content"), ("conversations", "from", "value")]
)
def test_an_answer_of_weight_0_is_context(
    tmp_path: Path, viewer: TokenViewer, mark: dict[str, Any], keys: tuple[str, str, str]
) -> None:
    name, role, text = keys
    turns = [
        {role: "user", text: "Who?"},
        {role: "assistant", text: "no", **mark},
        {role: "user", text: "Hi?"},
        {role: "assistant", text: "yes", "weight": "1"},
    ]
    conversation = one(tmp_path / "a.jsonl", {name: turns})
    assert [message.learn for message in conversation.messages] == [True, False, True, True]
    # Written to the run in OpenAI's form, and read back with the same meaning.
    assert conversation.to_dict()["messages"][1]["weight"] == 0
    again = Conversation.from_dict(conversation.to_dict(), conversation.source, conversation.line)
    assert again == conversation
    trained = "".join(s.text for s in viewer.view(conversation).stretches if s.trained)
    context = "".join(s.text for s in viewer.view(conversation).stretches if not s.trained)
    assert "yes" in trained
    assert "no" not in trained
    assert "no" in context


def test_turns_after_the_last_lesson_are_left_out(tmp_path: Path) -> None:
    turns = [ASK, SAY, {"role": "user", "content": "Who?"}, {**SAY, "content": "no", "weight": 0}]
    conversation = one(tmp_path / "a.jsonl", {"messages": turns})
    assert [message.content for message in conversation.messages] == ["Hi?", "Hello."]


def test_keys_that_are_not_read_are_named_with_their_count(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {
            "messages": [{**ASK, "content": f"Hi {n}?", "name": "x"}, SAY],
            "score": 1,
            "prompt_id": "a",
        }
        for n in range(3)
    ]
    rows.append({"question": "Who?", "answer": "Me.", "id": 4})
    path.write_text("\n".join(json.dumps(row) for row in rows))
    report = check([path])
    (file,) = report.files
    assert file.unused_keys == {"messages[].name": 3, "score": 3, "id": 1}
    line = "  note: keys that were not read: id (1 row), messages[].name (3 rows), score (3 rows)"
    assert line in report.lines()
    assert report.as_dict()["files"][0]["unused_keys"] == file.unused_keys


def test_that_the_chosen_answer_is_used_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"prompt": "Hi?", "chosen": "Hello.", "rejected": "No."}))
    report = check([path])
    assert report.files[0].formats == {"preference": 1}
    assert any("'chosen' is learnt, 'rejected' is not used (1 row)" in x for x in report.lines())


def two_lessons() -> list[dict[str, Any]]:
    """One conversation twice; each row teaches another of its answers."""
    turns = [ASK, SAY, {"role": "user", "content": "Who?"}, {**SAY, "content": "Me."}]
    first = [dict(turn) for turn in turns]
    first[1]["weight"] = 0
    return [{"messages": first}, {"messages": turns}]


def test_rows_that_teach_different_answers_are_not_the_same(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in two_lessons()))
    report = check([path])
    assert report.faults == []
    assert report.warnings == []
    path.write_text("".join(json.dumps(row) + "\n" for row in two_lessons()[:1] * 2))
    assert [fault.kind for fault in check([path]).faults] == ["duplicate"]


def test_turns_that_are_left_out_are_said(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    turns = [ASK, SAY, {"role": "user", "content": "Who?"}, {**SAY, "weight": 0}]
    path.write_text(json.dumps({"messages": turns}))
    assert any("after the last answer that is learnt" in line for line in check([path]).lines())


def test_keys_of_text_parts_are_named() -> None:
    part = {"type": "text", "text": "Hi?", "cache_control": {"type": "ephemeral"}}
    read = read_row({"messages": [{"role": "user", "content": [part]}, SAY]})
    assert read.unused == ("messages[].content[].cache_control",)


def test_keys_without_content_are_not_named() -> None:
    answer = {**SAY, "refusal": None, "annotations": [], "audio": None}
    read = read_row({"messages": [ASK, answer], "score": "", "topic": None, "rank": 0})
    assert read.unused == ("rank",)


def test_an_answer_that_is_context_is_found_by_the_label_audit(chat: ChatFormat) -> None:
    rows = [
        ("a:1", [{**m, "weight": m.get("weight", 1)} for m in row["messages"]])
        for row in two_lessons()
    ]
    _, report = audited(chat, encode_rows(chat, rows), 512)
    assert report.counts() == {}
    assert report.choices() == [
        "label audit: 1 answer is context and not learnt (weight 0 in the chats)"
    ]
    assert report.manifest(()).answers_as_context == 1


@pytest.mark.parametrize("turned", [False, True])
def test_packed_rows_of_one_conversation_differ_by_what_they_teach(
    chat: ChatFormat, turned: bool
) -> None:
    rows = encode_rows(chat, [("a:1", row["messages"]) for row in two_lessons()])
    in_order = rows[::-1] if turned else rows
    packed = [
        SeenPacked(
            [token for row in in_order for token in row.example.input_ids],
            [label for row in in_order for label in expected_labels(row.example)],
            [place for row in in_order for place in range(len(row.example.input_ids))],
        )
    ]
    assert audit_packed(rows, packed, chat).counts() == {}


def test_wordings_are_copied_for_each_lesson() -> None:
    rows = [("a:1", row["messages"]) for row in two_lessons()]
    assert len(with_casual_copies(rows)) == 4
