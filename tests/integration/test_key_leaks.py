"""A planted key is searched for wherever Prompt flow and phi3 write or print: nowhere in clear."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from tests.integration.leaks import KEY, WRONG_KEY, everything, leaks
from tests.integration.pf_home import PfHome, endpoint, pf_home

pytest.importorskip("promptflow", reason="the extra `flow` is not installed")

ASK = """
import sys
from pathlib import Path
from phi3_training.flow.ask import ask
from phi3_training.flow.store import connect
from phi3_training.errors import Phi3TrainingError
from phi3_training.manifests import EndpointManifest
from phi3_training.run import Run

flow, url = Path(sys.argv[1]), sys.argv[2]
run = Run.open(Path.home() / "runs" / "trial")
run.write(connect(EndpointManifest(endpoint=url), sys.stdin.read()))
try:
    print(ask(flow, "Who founded Contoso?"))
except Phi3TrainingError as error:
    print(repr(error))
"""


@pytest.fixture(scope="module")
def used(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PfHome]:
    """A HOME in which everything was done once: with the right key, then with a wrong one."""
    with pf_home(tmp_path_factory.mktemp("leaks") / "home") as home, endpoint(KEY) as served:
        flow = home.copy_flow()
        test = ["flow", "test", "--flow", flow]
        batch = ["run", "create", "--file", flow / "run.yaml", "--name"]
        for key, asked in ((KEY, "1: Who founded Contoso?"), (WRONG_KEY, "401")):
            done = home.python(ASK, str(flow), served.url, feed=f"{key}\n")
            assert asked in done.out, done.text
        refused = home.pf(*test, "--inputs", "input_data=Who founded Contoso?")
        assert refused.code == 1
        assert "401" in refused.out
        assert home.pf(*batch, "refused").code == 0
        assert home.pf("connection", "show", "--name", "phi3_connection").code == 0
        home.connect(served.url, KEY)
        assert "Bot: 3: And when?" in home.pf(*test, "--interactive", feed="Who?\nAnd when?\n").out
        yield home


def test_search_finds_what_is_there() -> None:
    """The search itself: each form of the key, however it is embedded, is a find."""
    wrapped = base64.b64encode(b'{"Authorization": "Bearer ' + KEY.encode() + b'"}')
    places = {
        "raw": b"x" + KEY.encode(),
        "url": f"?key={quote(KEY, safe='')}&".encode(),
        "base64": wrapped,
        "nothing": b"*" * 40,
    }
    assert leaks(KEY, places) == ["raw", "url", "base64"]


@pytest.mark.parametrize("key", [KEY, WRONG_KEY], ids=["accepted", "refused"])
def test_key_is_nowhere_in_clear(used: PfHome, key: str) -> None:
    places = everything(used)
    assert leaks(key, places) == []


def test_search_covered_what_matters(used: PfHome) -> None:
    """The store, a failed batch run with its snapshot, transcripts and manifests were searched."""
    files = {Path(name) for name in everything(used) if name != "output"}
    names = {path.name for path in files}
    assert {"pf.sqlite", "connection.json", "flow.detail.json", "chat.detail.json"} <= names
    assert any(path.match(".runs/refused/snapshot/*") for path in files)
    assert any(path.match(".runs/refused/error.json") for path in files)
