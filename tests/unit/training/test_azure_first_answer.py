"""The first question to a new deployment: patient while it comes up, not while it only fails."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytest.importorskip("azure.ai.ml", reason="the extra `azure` is not installed")

from phi3_training.errors import StageError
from phi3_training.manifests import ModelManifest, RegistrationManifest
from phi3_training.recipe import Recipe
from phi3_training.targets.azure.deploy import deploy

from .azure_wire import place, run_with_chats


class Failing(BaseHTTPRequestHandler):
    """What the front says of a container that answers every question with an error."""

    asked = 0

    def do_POST(self) -> None:
        type(self).asked += 1
        self.rfile.read(int(self.headers["Content-Length"]))
        body = b"CUDA error"
        self.send_response(424)
        self.send_header("ms-azureml-model-error-statuscode", "500")
        self.send_header("ms-azureml-model-error-reason", "model_error")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
        """Nothing."""


@pytest.fixture
def url() -> Iterator[str]:
    Failing.asked = 0
    server = ThreadingHTTPServer(("127.0.0.1", 0), Failing)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/score"
    server.shutdown()
    server.server_close()


def test_a_model_that_only_fails_is_given_up_after_a_few_tries(tmp_path: Path, url: str) -> None:
    run = run_with_chats(tmp_path)
    run.write(ModelManifest(path=".", job="j", route="job"))
    run.write(RegistrationManifest(model="m", model_version="1", model_id="id"))
    content = {"name": "x", "model": {"name_or_path": "o/m"}, "data": {"train": ["x"]}}
    recipe = Recipe.model_validate({**content, "ask": "Hi?", "azure": {"poll": {"interval": 0.05}}})
    endpoint = SimpleNamespace(
        name="e",
        provisioning_state="Succeeded",
        auth_mode="key",
        traffic={"old": 100},
        mirror_traffic={},
        scoring_uri=url,
        tags={},
    )
    deployment = SimpleNamespace(
        provisioning_state="Succeeded", model="/models/m/versions/1", name="v1"
    )
    clients: Any = SimpleNamespace(
        place=place(tmp_path),
        poll=recipe.azure.poll,
        subscription=SimpleNamespace(compute=SimpleNamespace(list_sizes=lambda location: [])),
        ml=SimpleNamespace(
            online_endpoints=SimpleNamespace(
                get=lambda _name: endpoint,
                get_keys=lambda _name: SimpleNamespace(primary_key="k" * 32),
            ),
            online_deployments=SimpleNamespace(
                get=lambda _name, _endpoint: deployment,
                get_logs=lambda *_where, **_what: "CUDA error: out of memory",
            ),
        ),
    )
    with pytest.raises(StageError, match=r"does not answer(?s:.*)out of memory"):
        deploy(clients, recipe, run, lambda *_: None)
    assert Failing.asked == 5
