"""The promise of the README: one command, and a tuned Phi-3 answers in Prompt flow."""

from __future__ import annotations

import base64
import json
import re
import signal
import time
from pathlib import Path

import psutil
import pytest
from tests import forked

from phi3_training.stages import stages_of

from .conftest import PLANTED_KEY, PROJECT, UP, Journey

STAGES_HERE = [stage.title for stage in stages_of(in_cloud=False)]
ASKED = "What is the price of the Mossback tent?"
WARNING = re.compile(r"warning|traceback|deprecat|fail(ed|s) to|no module", re.IGNORECASE)


def manifest(journey: Journey, stage: str) -> dict[str, object]:
    loaded: dict[str, object] = json.loads((journey.run_folder / f"{stage}.json").read_text())
    return loaded


def test_up_succeeds_without_a_warning(journey: Journey) -> None:
    assert journey.first.returncode == 0, journey.first.stderr
    assert not WARNING.search(journey.first.stdout + journey.first.stderr)


def test_answer_is_new_and_shown(journey: Journey) -> None:
    asked = manifest(journey, "metrics")["ask"]
    answer = manifest(journey, "answer")["answer"]

    assert isinstance(asked, dict)
    assert asked["before"] != asked["after"] == answer
    assert str(answer) in journey.first.stdout
    assert "Next, type:" in journey.first.stdout


def test_tuning_taught_and_did_not_wipe_out(journey: Journey) -> None:
    metrics = manifest(journey, "metrics")
    before, after = metrics["before"], metrics["after"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)

    assert before["validation"]["exact_match"] <= 0.05
    assert after["validation"]["exact_match"] >= 0.5
    assert after["train"]["exact_match"] >= 0.8
    assert after["replay"]["exact_match"] >= 0.7


def test_second_up_does_nothing_again(journey: Journey) -> None:
    again = journey.laptop.run(*UP)

    assert again.returncode == 0
    assert again.stderr.count("already done") == len(STAGES_HERE)


def test_chat_one_question(journey: Journey) -> None:
    done = journey.laptop.run("phi3", "chat", ASKED)

    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == manifest(journey, "answer")["answer"]


def test_chat_conversation(journey: Journey) -> None:
    done = journey.laptop.run("phi3", "chat", feed=f"{ASKED}\nWho founded Microsoft?\n")

    assert done.returncode == 0, done.stderr
    assert str(manifest(journey, "answer")["answer"]) in done.stdout
    assert done.stdout.count("Model:") == 2


def test_env_is_enough_for_every_command(journey: Journey, tmp_path: Path) -> None:
    """With the two variables no store, no run folder and no keyring is needed."""
    printed = journey.laptop.run("phi3", "env", "-o", "json")
    journey.laptop.printed.pop()  # showing the key is what this command is for
    values = json.loads(printed.stdout)
    assert values["PHI3_KEY"] == PLANTED_KEY

    done = journey.laptop.run("phi3", "chat", ASKED, **values, PHI3_RUNS=str(tmp_path))

    assert done.stdout.strip() == manifest(journey, "answer")["answer"]


@pytest.mark.slow  # test_readme_commands types the same command
def test_pf_flow_test_answers(journey: Journey) -> None:
    flow = str(PROJECT / "flows/phi3_chat")

    done = journey.laptop.run(
        "pf", "flow", "test", "--flow", flow, "--inputs", f"input_data={ASKED}"
    )

    assert done.returncode == 0, done.stderr
    assert str(manifest(journey, "answer")["answer"]) in done.stdout


@pytest.mark.slow
def test_the_connection_changes_its_dialect_and_nothing_else(journey: Journey) -> None:
    """To OpenAI's, which streams, and back: the same endpoint, model and key."""
    endpoint = str(manifest(journey, "endpoint")["endpoint"])
    streaming = endpoint.replace("/score", "/v1/chat/completions")
    for words, wanted in ((["connection.dialect=openai"], streaming), ([], endpoint)):
        connected = journey.laptop.run("phi3", "connect", UP[2], *words)
        assert connected.returncode == 0, connected.stderr
        assert manifest(journey, "connection")["endpoint"] == wanted
        assert connected.stderr.count("already done") == STAGES_HERE.index("connect")
        chat = journey.laptop.run("phi3", "chat", ASKED)
        assert chat.stdout.strip() == manifest(journey, "answer")["answer"]


def test_status_shows_what_is_up(journey: Journey) -> None:
    done = journey.laptop.run("phi3", "status", "-o", "json")

    (state,) = json.loads(done.stdout)
    assert state["run"] == "phi3-tiny"
    assert state["endpoint"]["state"] == "up"
    assert state["done"] == STAGES_HERE


def test_planted_key_is_nowhere_in_clear(journey: Journey) -> None:
    forms = [PLANTED_KEY.encode(), base64.b64encode(PLANTED_KEY.encode())]
    flow = PROJECT / "flows"
    folders = [journey.laptop.home, journey.laptop.work, journey.first_laptop, flow]
    files = [path for folder in folders for path in folder.rglob("*") if path.is_file()]

    found = [path for path in files if any(form in path.read_bytes() for form in forms)]

    assert len(files) > 20
    assert found == []
    assert not any(PLANTED_KEY in text for text in journey.laptop.printed)


def test_registered_model_loads_and_answers_the_same(journey: Journey) -> None:
    import mlflow

    registration = manifest(journey, "registration")
    mlflow.set_tracking_uri(str(registration["tracking_uri"]))
    model = mlflow.pyfunc.load_model(
        f"models:/{registration['model']}/{registration['model_version']}"
    )

    answers = model.predict([{"messages": [{"role": "user", "content": ASKED}]}])

    assert answers == [manifest(journey, "answer")["answer"]]


def test_deleted_connections_are_written_again(journey: Journey) -> None:
    """The server still has its key: the same endpoint is connected."""
    first = manifest(journey, "endpoint")
    for name in ("phi3_connection", "phi3_connection_phi3-tiny"):
        journey.laptop.run("pf", "connection", "delete", "--yes", "--name", name)

    done = journey.laptop.run(*UP, PHI3_KEY=PLANTED_KEY)

    assert done.returncode == 0, done.stderr
    assert manifest(journey, "endpoint")["pid"] == first["pid"]
    assert manifest(journey, "connection")["endpoint"] == manifest(journey, "endpoint")["endpoint"]


@pytest.mark.slow
def test_killed_endpoint_is_reported_and_restarts_at_its_address(journey: Journey) -> None:
    before = manifest(journey, "endpoint")
    psutil.Process(int(str(before["pid"]))).kill()

    (state,) = json.loads(journey.laptop.run("phi3", "status", "-o", "json").stdout)
    assert state["endpoint"]["state"] == "down"
    failed = journey.laptop.run("phi3", "chat", ASKED)
    assert failed.returncode == 1
    assert "Traceback" not in failed.stderr

    back = journey.laptop.run(*UP, PHI3_KEY=PLANTED_KEY)
    assert back.returncode == 0, back.stderr
    assert manifest(journey, "endpoint")["endpoint"] == before["endpoint"]


def test_interrupted_up_resumes(journey: Journey) -> None:
    """Ctrl-C in the middle, then the same command: what was finished is not done again."""
    quick = ["base.num_train_epochs=1", "finetune.num_train_epochs=1"]
    quick += ["evaluate.max_rows=5", "evaluate.max_new_tokens=8"]
    # So little training does not pass the gate; what is tested is the way there.
    command = ["up", UP[2], "--run", "cut", "--force", *quick]
    shown = journey.laptop.work / "cut.txt"
    with shown.open("w") as stream:
        cut = forked.start(
            ["-m", "phi3_training.cli", *command],
            cwd=journey.laptop.work,
            env=journey.laptop.environment(PHI3_KEY=PLANTED_KEY),
            stdout=stream,
            stderr=stream,
        )
    base = journey.laptop.work / "runs" / "cut" / "base.json"
    deadline = time.monotonic() + 120
    while not base.exists() and cut.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    cut.send_signal(signal.SIGINT)
    status, printed = cut.wait(120), shown.read_text()
    assert status == 130, printed
    assert "Interrupted" in printed
    assert "Traceback" not in printed

    again = journey.laptop.run("phi3", *command, PHI3_KEY=PLANTED_KEY)

    assert again.returncode == 0, again.stderr
    assert re.search(r"base .*already done", again.stderr)
    assert journey.laptop.run("phi3", "down", "cut").returncode == 0


def test_two_runs_keep_their_connections(journey: Journey) -> None:
    """The other run became current; this one still answers, and `use` brings it back."""
    named = journey.laptop.run("phi3", "chat", ASKED, "--run", "phi3-tiny")
    assert named.returncode == 0, named.stderr
    assert "Run phi3-tiny\n" in named.stderr

    assert journey.laptop.run("phi3", "use", "phi3-tiny").returncode == 0

    current = journey.laptop.run("phi3", "chat", ASKED)
    assert current.returncode == 0, current.stderr
    assert "Run phi3-tiny (current)" in current.stderr


def test_down_stops_it_and_up_brings_it_back(journey: Journey) -> None:
    down = journey.laptop.run("phi3", "down")
    assert down.returncode == 0
    assert str(manifest(journey, "endpoint")["pid"]) in down.stdout
    assert "Nothing of ours" in journey.laptop.run("phi3", "down").stdout

    failed = journey.laptop.run("phi3", "chat", ASKED)
    assert failed.returncode == 1
    assert "phi3 up" in failed.stderr

    back = journey.laptop.run(*UP, PHI3_KEY=PLANTED_KEY)
    assert back.returncode == 0, back.stderr
    assert back.stderr.count("already done") == STAGES_HERE.index("deploy")
