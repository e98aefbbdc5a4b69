"""`phi3 connect` and Prompt flow's store: written, read, protected, never somebody else's."""

from __future__ import annotations

import json
import socket
import stat
from collections.abc import Iterator
from pathlib import Path

import pytest
from tests.integration.pf_home import ROOT, Endpoint, PfHome, endpoint, pf_home

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

KEY = "store-test-key-5b1f0c"
FLOW = ROOT / "flows/phi3_chat"

CONNECT_AND_READ = """
import json, sys
from phi3_training.flow import store
from phi3_training.flow.store import connect
from phi3_training.manifests import EndpointManifest

key = sys.stdin.read()
manifests = [
    connect(EndpointManifest(endpoint=f"http://127.0.0.1:{port}/score", **more), said).as_json()
    for port, more, said in [
        (1, {"engine": "x"}, "first " + key),
        (2, {"deployment": "blue"}, key + "\\n"),
    ]
]
print(json.dumps({
    "manifests": manifests,
    "read": store.read_connection("phi3_connection"),
    "configs": dict(store.stored_connection("phi3_connection").configs),
    "deleted": [store.delete_connection("phi3_connection") for _ in range(2)],
}))
"""
TWO_RUNS = """
import json, sys
from pathlib import Path
from phi3_training.runs import make_current
from phi3_training.flow import store
from phi3_training.flow.store import connect
from phi3_training.manifests import ConnectionManifest, EndpointManifest
from phi3_training.run import Run

runs = [Run.open(Path(sys.argv[1]) / name) for name in ("shop", "kettle")]
for port, run in enumerate(runs, start=1):
    endpoint = EndpointManifest(endpoint=f"http://127.0.0.1:{port}/score")
    run.write(connect(endpoint, "key-of-" + run.name, run=run.name))
shop, kettle = runs
connected = [store.read_connection("phi3_connection")]
make_current(shop)
connected.append(store.read_connection("phi3_connection"))
own = store.read_connection(kettle.require(ConnectionManifest).own)
gone = [store.delete_connections_to(run.require(ConnectionManifest)) for run in (kettle, shop)]
print(json.dumps({"connected": connected, "own": own, "gone": gone}))
"""
FOREIGN = """
import sys
from phi3_training.flow import store
from phi3_training.errors import Phi3TrainingError
from promptflow.client import PFClient
from promptflow.connections import CustomConnection, OpenAIConnection

theirs = PFClient().connections
theirs.create_or_update(CustomConnection(
    name="mine", configs={"endpoint": "http://127.0.0.1:9/score"}, secrets={"key": "theirs"}))
theirs.create_or_update(OpenAIConnection(name="openai", api_key="theirs"))
for name in ("mine", "openai", "no such name!"):
    try:
        store.write_connection(name, "http://127.0.0.1:1/score", "ours")
    except Phi3TrainingError as error:
        print(error)
for doing in (store.delete_connection, store.read_connection):
    try:
        doing("openai")
    except Phi3TrainingError as error:
        print(error)
print(theirs.get("mine", with_secrets=True).secrets["key"])
"""
LOST = """
from phi3_training.flow import store
from phi3_training.errors import Phi3TrainingError
for name in ("phi3_connection", "never_written"):
    try:
        store.read_connection(name)
    except Phi3TrainingError as error:
        print(error)
store.write_connection("phi3_connection", "http://127.0.0.1:3/score", "new")
print(*store.read_connection("phi3_connection"))
"""
ASK = """
import sys
from pathlib import Path
from phi3_training.flow.ask import ask
from phi3_training.errors import Phi3TrainingError
history = [{"inputs": {"input_data": "Hi"}, "outputs": {"answer": "Hello"}}]
try:
    print(ask(Path(sys.argv[1]), "How are you?", chat_history=history, temperature=0.5))
except Phi3TrainingError as error:
    print("Error:", error)
"""


@pytest.fixture(scope="module")
def served() -> Iterator[Endpoint]:
    with endpoint(KEY) as state:
        yield state


@pytest.fixture
def home(tmp_path: Path) -> Iterator[PfHome]:
    with pf_home(tmp_path / "home") as state:
        yield state


def test_connection_is_written_replaced_read_and_deleted(home: PfHome) -> None:
    done = home.python(CONNECT_AND_READ, feed=KEY)
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    assert result["read"] == ["http://127.0.0.1:2/score", KEY]
    assert result["configs"]["deployment"] == "blue"
    assert result["deleted"] == [True, False]
    manifest = result["manifests"][1]
    assert manifest["name"] == "phi3_connection"
    assert manifest["endpoint"] == "http://127.0.0.1:2/score"
    assert "only you can read it" in manifest["protection"]
    assert manifest["choices"] == [manifest["protection"]]
    assert KEY not in json.dumps(result["manifests"])
    assert stat.S_IMODE((home.pf_dir / "pf.sqlite").stat().st_mode) == 0o600


def test_two_runs_keep_their_connections_and_the_flows_leads_to_the_current(
    home: PfHome, tmp_path: Path
) -> None:
    done = home.python(TWO_RUNS, str(tmp_path / "runs"))
    assert (done.code, done.err) == (0, "")
    result = json.loads(done.out)
    kettle = ["http://127.0.0.1:2/score", "key-of-kettle"]
    assert result["connected"] == [kettle, ["http://127.0.0.1:1/score", "key-of-shop"]]
    assert result["own"] == kettle
    assert result["gone"] == [
        ["phi3_connection_kettle"],
        ["phi3_connection_shop", "phi3_connection"],
    ]


def test_somebody_elses_connection_stays_as_it_is(home: PfHome) -> None:
    done = home.python(FOREIGN)
    assert done.code == 0, done.text
    mine, openai, name, delete, read, kept = done.out.splitlines()
    assert "'mine' that phi3 did not write" in mine
    assert "pf connection delete --yes --name openai" in openai
    assert "connection.name=NAME" in name
    assert "'openai' that phi3 did not write" in delete
    assert "expected a custom connection" in read
    assert kept == "theirs"


def test_lost_encryption_key_is_reported_and_replaced(home: PfHome) -> None:
    home.connect("http://127.0.0.1:1/score", "old")
    (home.path / ".local/share/python_keyring/keyring_pass.cfg").unlink()
    done = home.python(LOST)
    assert done.code == 0, done.text
    lost, missing, written = done.out.splitlines()
    assert "no longer in this machine's keyring" in lost
    assert "phi3 connect connection.name=phi3_connection" in lost
    assert "has no connection 'never_written'; write it with: phi3 connect" in missing
    assert written == "http://127.0.0.1:3/score new"


def test_ask_prints_the_answer_and_nothing_else(home: PfHome, served: Endpoint) -> None:
    """Neither log lines nor telemetry (a proxy would see it), nor files in the flow folder."""
    (home.pf_dir / "pf.yaml").unlink()  # telemetry and traces as a fresh install has them
    home.connect(served.url, KEY)
    before = sorted(FLOW.rglob("*"))
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        address = f"http://127.0.0.1:{proxy.getsockname()[1]}"
        env = {"HTTPS_PROXY": address, "HTTP_PROXY": address, "NO_PROXY": "127.0.0.1"}
        done = home.python(ASK, str(FLOW), env=env, timeout=30)
        proxy.setblocking(False)
        with pytest.raises(BlockingIOError):
            proxy.accept()
    assert (done.code, done.out, done.err) == (0, "3: How are you?\n", "")
    assert served.conversations[-1] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello"},
        {"role": "user", "content": "How are you?"},
    ]
    assert served.bodies[-1]["input_data"]["parameters"]["temperature"] == 0.5
    assert [path for path in sorted(FLOW.rglob("*")) if "__pycache__" not in path.parts] == [
        path for path in before if "__pycache__" not in path.parts
    ]


def test_environment_needs_no_store(home: PfHome, served: Endpoint) -> None:
    env = {"PHI3_ENDPOINT": served.url, "PHI3_KEY": KEY}
    env["PYTHON_KEYRING_BACKEND"] = "keyring.backends.fail.Keyring"
    done = home.python(ASK, str(FLOW), env=env)
    assert (done.code, done.out, done.err) == (0, "3: How are you?\n", "")
    assert not (home.pf_dir / "pf.sqlite").exists()


def test_ask_hands_on_the_endpoints_own_words(home: PfHome, served: Endpoint) -> None:
    env = {"PHI3_ENDPOINT": served.url, "PHI3_KEY": "wrong-key-77"}
    done = home.python(ASK, str(FLOW), env=env)
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith("Error: ")
    assert "401" in done.out
    assert "Traceback" not in done.out
    assert "Execution failure" not in done.out
    assert "wrong-key-77" not in done.out
