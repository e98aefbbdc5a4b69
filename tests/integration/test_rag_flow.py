"""`flows/phi3_rag_chat` under Prompt flow: passages to the endpoint, sources under the answer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.pf_home import Endpoint, PfHome, endpoint, pf_home

from phi3_training.progress import no_progress
from phi3_training.rag.build import Chosen, publish, sync

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

ROOT = Path(__file__).parents[2]
KEY = "rag-flow-key-71b3"
DOCUMENTS = {
    "tents.md": "# Tents\n\nThe Mossback tent weighs 2.4 kg and costs 240 dollars.\n",
    "stoves.md": "# Stoves\n\nThe Ember stove burns gas. Its warranty lasts two years.\n",
    **{f"{n}.md": f"# Note {n}\n\nThe shop of town number {n} opens at {n}.\n" for n in range(9)},
}


@pytest.fixture(scope="module")
def flow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[PfHome, Endpoint, Path]]:
    with pf_home(tmp_path_factory.mktemp("pf") / "home") as home, endpoint(KEY) as served:
        home.connect(served.url, KEY)
        home.copy_flow()
        folder = home.path / "clone/flows/phi3_rag_chat"
        shutil.copytree(
            ROOT / "flows/phi3_rag_chat", folder, ignore=shutil.ignore_patterns("*.sqlite")
        )
        documents = home.path / "documents"
        documents.mkdir()
        for name, text in DOCUMENTS.items():
            (documents / name).write_text(text, encoding="utf-8")
        index = home.path / "index.sqlite"
        sync(index, [documents], Chosen(None, {}, ""), no_progress)
        publish(index, folder / "index.sqlite")
        yield home, served, folder


def ask(flow: tuple[PfHome, Endpoint, Path], *inputs: str) -> dict[str, object]:
    home, _, folder = flow
    done = home.pf("flow", "test", "--flow", folder, "--inputs", *inputs)
    assert done.code == 0, done.err
    answer = json.loads(done.out[done.out.index("\n{") :])
    assert isinstance(answer, dict)
    return answer


def test_flow_is_valid(flow: tuple[PfHome, Endpoint, Path]) -> None:
    done = flow[0].pf("flow", "validate", "--source", flow[2])
    assert json.loads(done.out) == {"result": "Succeeded"}


def test_the_passages_reach_the_endpoint(flow: tuple[PfHome, Endpoint, Path]) -> None:
    answer = ask(flow, "input_data=How long is the warranty of the Ember stove?")
    (message,) = flow[1].bodies[-1]["input_data"]["input_string"]
    assert message["content"].endswith("Question: How long is the warranty of the Ember stove?")
    assert (
        "[1] Stoves: The Ember stove burns gas. Its warranty lasts two years." in message["content"]
    )
    # The stub repeats the prompt, which names [1]: so the answer ends in its source.
    assert str(answer["answer"]).endswith("\n\nSources:\n[1] stoves.md (Stoves)")


def test_a_follow_up_is_looked_up_with_the_question_before(
    flow: tuple[PfHome, Endpoint, Path],
) -> None:
    turn = {
        "inputs": {"input_data": "Do you sell the Mossback tent?"},
        "outputs": {"answer": "Yes."},
    }
    answer = ask(flow, "input_data=How heavy is it?", f"chat_history={json.dumps([turn])}")
    assert answer["query"] == "Do you sell the Mossback tent? How heavy is it?"
    sent = flow[1].bodies[-1]["input_data"]["input_string"]
    assert [message["role"] for message in sent] == ["user", "assistant", "user"]
    assert "[1] Tents: The Mossback tent weighs 2.4 kg" in sent[-1]["content"]


def test_the_model_is_not_asked_where_nothing_fits(flow: tuple[PfHome, Endpoint, Path]) -> None:
    before = len(flow[1].bodies)
    answer = ask(flow, "input_data=Who painted the ceiling of the chapel in Rome?")
    assert answer["answer"] == "That is not in the documents."
    assert len(flow[1].bodies) == before


def test_a_missing_index_names_the_command(flow: tuple[PfHome, Endpoint, Path]) -> None:
    home, _, folder = flow
    done = home.pf("flow", "test", "--flow", folder, "--inputs", "input_data=x y", "index=none.db")
    assert done.code == 1
    assert "phi3 rag index FOLDER" in done.out + done.err
