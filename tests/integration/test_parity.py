"""`phi3 doctor --tokens`: healthy folders agree everywhere, and every planted fault is found."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from phi3_training.cli import main
from phi3_training.finetune.weights import CHAT_TEMPLATE, make_tokenizer
from phi3_training.manifests import BaseManifest, ModelManifest
from phi3_training.prompt import ChatFormat
from phi3_training.run import Run
from phi3_training.verify.parity import Places, Report, check_tokens, places_of_folder

TEXTS = ["Who founded Microsoft? The quick brown fox."] * 5
CHATML = (
    "{%- for m in messages %}{{- '<|im_start|>' + m['role'] + '\\n' + m['content'] "
    "+ '<|end|>\\n' }}{%- endfor %}"
    "{{- '<|im_start|>assistant\\n' if add_generation_prompt else eos_token }}"
)
EMPTY_SYSTEM = (
    "{%- if messages[0]['role'] != 'system' %}{{- '<|system|>\\n<|end|>\\n' }}{%- endif %}\n"
    + CHAT_TEMPLATE
)


@pytest.fixture(scope="module")
def healthy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The format of a tiny Phi-3: no weights are needed to write tokens."""
    folder = tmp_path_factory.mktemp("healthy")
    make_tokenizer(TEXTS, folder, vocab_size=600, model_max_length=512)
    chat = ChatFormat.from_folder(folder)
    config = {"model_type": "phi3", "architectures": ["Phi3ForCausalLM"]}
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 512}))
    stops = {"eos_token_id": list(chat.stop_token_ids)}
    (folder / "generation_config.json").write_text(json.dumps(stops))
    (folder / "genai_config.json").write_text(json.dumps({"model": stops}))
    return folder


@pytest.fixture
def places(healthy: Path, tmp_path: Path) -> Places:
    """Three copies: trained from, tuned, converted."""
    folders = {name: tmp_path / "runs" / "r" / name for name in ("base", "model", "onnx")}
    for folder in folders.values():
        shutil.copytree(healthy, folder)
    return Places(folders["base"], folders["model"], (folders["onnx"],))


def at(report: Report, part: str) -> list[str]:
    """What differs at the places with that name."""
    return [str(d) for place in report.places if part in place.name for d in place.differences]


def change(folder: Path, name: str, edit: Callable[[str], str]) -> None:
    before = (folder / name).read_text("utf-8")
    after = edit(before)
    assert after != before, "the fault must change the file"
    (folder / name).write_text(after, "utf-8")


def test_healthy_folders_agree_everywhere(places: Places) -> None:
    report = check_tokens(places)
    assert report.ok, report.lines()
    assert report.cases == 13
    compared = {place.name: place.compared for place in report.places if not place.skipped}
    assert min(compared.values()) >= 1
    assert compared["engine onnxruntime (onnx): flow, then POST /score"] == 13
    assert compared["transformers' chat template, tuned model"] == 20


def test_what_was_not_compared_is_reported(healthy: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(healthy, tmp_path / "model")
    (folder / "genai_config.json").unlink()
    report = check_tokens(places_of_folder(folder))
    assert [p.name for p in report.places if p.skipped] == ["engine onnxruntime"]


def test_the_azure_scoring_script_is_compared(places: Places) -> None:
    name = "engine transformers (model): flow, then the Azure scoring script"
    compared = {place.name: place.compared for place in check_tokens(places).places}
    assert compared[name] == 13
    change(places.model, "chat_template.jinja", lambda text: "{{- bos_token }}" + text)
    found = at(check_tokens(places), name)
    assert "'one question', token 0: trained" in found[0]


@pytest.mark.parametrize("folder", ["model", "onnx"])
@pytest.mark.parametrize(
    ("fault", "position"),
    [
        (lambda text: "{{- bos_token }}" + text, 0),  # an added BOS
        (lambda text: text.replace("'<|end|>\\n'", "'\\n'"), None),  # a dropped EOS
        (lambda _text: CHATML, 0),  # another model's template
        (lambda _text: EMPTY_SYSTEM, 0),  # an empty system turn
        (lambda text: text.replace("['content'] + '<", "['content']|trim + '<"), None),  # trimmed
    ],
    ids=["added-bos", "dropped-eos", "swapped-template", "empty-system", "trimmed"],
)
def test_a_changed_template_is_found(
    places: Places, folder: str, fault: Callable[[str], str], position: int | None
) -> None:
    served = places.model if folder == "model" else places.onnx[0]
    change(served, "chat_template.jinja", fault)
    report = check_tokens(places)
    engine = "transformers (model)" if folder == "model" else "onnxruntime (onnx)"
    found = at(report, f"engine {engine}: flow")
    assert found
    if position is not None:
        assert f"'one question', token {position}: trained" in found[0]
    other = "onnxruntime (onnx)" if folder == "model" else "transformers (model)"
    assert not at(report, f"engine {other}")


def test_a_template_that_cannot_be_served_is_found(places: Places) -> None:
    change(places.model, "chat_template.jinja", lambda text: text.replace("'|>\\n'", "'|>'", 1))
    found = at(check_tokens(places), "engine transformers")
    assert len(found) == 1
    assert "cannot be served" in found[0]


def test_the_first_difference_names_both_tokens(places: Places) -> None:
    change(places.model, "chat_template.jinja", lambda text: "{{- bos_token }}" + text)
    difference = next(p for p in check_tokens(places).places if p.differences).differences[0]
    names = json.loads((places.model / "tokenizer.json").read_text("utf-8"))["added_tokens"]
    ids = {token["content"]: token["id"] for token in names}
    assert difference.trained is not None
    assert difference.written is not None
    assert (difference.position, difference.trained.id) == (0, ids["<|user|>"])
    assert (difference.written.id, difference.written.text) == (ids["<s>"], "<s>")


def test_an_end_that_training_drops_is_found(places: Places) -> None:
    """Trained without <|end|> and <|endoftext|>, the model never stops."""
    for folder in (places.trained_from, places.model, *places.onnx):
        change(
            folder,
            "chat_template.jinja",
            lambda text: text.replace("'<|end|>\\n'", "'\\n'").replace("eos_token", "''"),
        )
    assert "no token that stops the model" in at(check_tokens(places), "trainer")[0]


def test_a_stop_token_missing_from_the_settings_is_found(places: Places) -> None:
    """Our own server knows <|end|> all the same; other servers read this file."""
    stops = {"eos_token_id": [2]}
    (places.model / "generation_config.json").write_text(json.dumps(stops))
    (places.onnx[0] / "genai_config.json").write_text(json.dumps({"model": stops}))
    found = at(check_tokens(places), "stop tokens")
    assert len(found) == 2
    assert "'<|end|>'" in found[0]


def test_other_token_numbers_are_found(places: Places) -> None:
    def swapped(text: str) -> str:
        content = json.loads(text)
        vocabulary = content["model"]["vocab"]
        vocabulary["a"], vocabulary["o"] = vocabulary["o"], vocabulary["a"]
        return json.dumps(content)

    change(places.onnx[0], "tokenizer.json", swapped)
    assert at(check_tokens(places), "engine onnxruntime")


def test_a_control_token_out_of_a_message_is_found(places: Places) -> None:
    """A tokenizer that no longer calls <|end|> special takes it out of the user's text."""

    def plain(text: str) -> str:
        content = json.loads(text)
        for token in content["added_tokens"]:
            token["special"] = token["special"] and token["content"] != "<|user|>"
        return json.dumps(content)

    change(places.model, "tokenizer.json", plain)
    found = at(check_tokens(places), "engine transformers (model): flow")
    assert any("control texts by the user" in line or "a forged turn" in line for line in found)


def test_doctor_exits_1_and_shows_the_token(
    places: Places, capsys: pytest.CaptureFixture[str]
) -> None:
    run = Run.open(places.model.parent)
    run.write(BaseManifest(path="base"))
    run.write(ModelManifest(path="model"))
    command = ["doctor", "--tokens", "--run", "r", "--runs", str(run.path.parent)]
    assert main(command) == 0
    assert "tokens: the same everywhere" in capsys.readouterr().out
    change(places.model, "chat_template.jinja", lambda text: "{{- bos_token }}" + text)
    assert main(command) == 1
    assert "here 1 '<s>'" in capsys.readouterr().out
    assert main([*command, "-o", "json"]) == 1
    report = json.loads(capsys.readouterr().out)["tokens"]
    assert report["ok"] is False
    wrong = [place for place in report["places"] if place["status"] == "differs"]
    assert wrong[0]["differences"][0]["written"]["text"] == "<s>"


def test_doctor_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--tokens", "--runs", str(tmp_path)]) == 2
    assert "phi3 train" in capsys.readouterr().err
