"""A loopback Azure AI Search: keeps indexes and documents, checks every request it gets.

Bodies as `azure-search-documents` 12.0 sends and reads them (api-version 2026-04-01). What does not
fit gets the 400 that a service would give. Ranks as Azure does: words and vectors apart, then
reciprocal rank fusion.
"""

from __future__ import annotations

import json
import math
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

KEY = "search-key-9c41f0aa"
_INDEX = re.compile(r"/indexes\('([a-z0-9-]{2,128})'\)(/docs/search\.(?:index|post\.search))?")
_TYPES = {"Edm.String": str, "Edm.Int32": int, "Edm.Int64": int, "Collection(Edm.Single)": list}
_SEARCH_KEYS = frozenset(
    ("search", "searchFields", "searchMode", "select", "top", "vectorQueries", "debug", "filter",
     "orderby")
)  # fmt: skip

Answer = tuple[int, Mapping[str, Any], dict[str, str]]


class SearchServiceStub:
    """`with SearchServiceStub() as service`: an empty service; `trouble` may answer instead."""

    def __init__(self, *, tells_parts: bool = True) -> None:
        self.indexes: dict[str, dict[str, Any]] = {}
        self.documents: dict[str, dict[str, dict[str, Any]]] = {}
        self.seen: list[tuple[str, str, Any]] = []
        self.refused: list[str] = []  # why a request got a 400
        self.trouble: Callable[[str, str], Answer | None] = lambda _method, _path: None
        self.fails: Callable[[Mapping[str, Any]], tuple[int, str] | None] = lambda _action: None
        self.accepts_key = True
        self._tells_parts = tells_parts
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self._server.server_address[1]}"

    def sent(self, end: str) -> list[Any]:
        """The bodies of the requests whose path ends like this."""
        return [body for _method, path, body in self.seen if path.endswith(end)]

    def __enter__(self) -> SearchServiceStub:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(5)

    def _handler(stub) -> type[BaseHTTPRequestHandler]:  # noqa: N805 - `self` is the handler's
        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base's name
                """Tests read `seen`."""

            def do_GET(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                raw = self.rfile.read(length)
                status, content, headers = stub.answer(
                    self.command, self.path, dict(self.headers.items()), raw
                )
                body = b"" if status == 204 else json.dumps(content).encode()
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                if status != 204:
                    self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            do_PUT = do_POST = do_DELETE = do_GET  # noqa: N815 - names of the base class

        return Handler

    def answer(self, method: str, url: str, headers: Mapping[str, str], raw: bytes) -> Answer:
        parts = urlsplit(url)
        body = json.loads(raw) if raw else None
        self.seen.append((method, parts.path, body))
        if (made := self.trouble(method, parts.path)) is not None:
            return made
        by_key = self.accepts_key and headers.get("api-key") == KEY
        if not by_key and headers.get("Authorization") != f"Bearer {KEY}":
            return _error(403, "Access denied")
        if parse_qs(parts.query) != {"api-version": ["2026-04-01"]}:
            return self._refuse("api-version")
        match = _INDEX.fullmatch(parts.path)
        if match is None:
            return _error(404, "no such route")
        name, docs = match.groups()
        if docs is None:
            return self._definition(method, name, body)
        if name not in self.indexes:
            return _error(404, f"No index with the name '{name}' was found")
        if not isinstance(body, dict):
            return self._refuse("a body is missing")
        if docs.endswith("search.index"):
            return self._write(name, body)
        return self._search(name, body)

    def _definition(self, method: str, name: str, body: Any) -> Answer:
        if method == "DELETE":
            self.documents.pop(name, None)
            return 204 if self.indexes.pop(name, None) else 404, {}, {}
        if method == "GET":
            found = self.indexes.get(name)
            return (200, found, {}) if found else _error(404, f"No index '{name}'")
        keys = [field["name"] for field in body["fields"] if field.get("key")]
        profiles = {each["name"] for each in body.get("vectorSearch", {}).get("profiles", ())}
        for field in body["fields"]:
            if field["type"] not in _TYPES:
                return self._refuse(f"type {field['type']}")
            if "dimensions" in field and field["vectorSearchProfile"] not in profiles:
                return self._refuse("no such vector profile")
            if field.get("stored") is False and field.get("retrievable") is not False:
                return self._refuse("a field that is not stored cannot be retrievable")
        if body["name"] != name or keys != ["id"]:
            return self._refuse("name or key")
        self.indexes[name] = body
        self.documents[name] = {}
        return 201, body, {}

    def _write(self, name: str, body: dict[str, Any]) -> Answer:
        fields = {field["name"]: field for field in self.indexes[name]["fields"]}
        actions = body["value"]
        if not 0 < len(actions) <= 1000:
            return self._refuse("1 to 1,000 actions")
        results = []
        for action in actions:
            document = {key: value for key, value in action.items() if key != "@search.action"}
            for key, value in document.items():
                if key not in fields or not isinstance(
                    value, (_TYPES[fields[key]["type"]], type(None))
                ):
                    return self._refuse(f"the property {key!r} of {value!r}")
            if "vector" in document and len(document["vector"]) != fields["vector"]["dimensions"]:
                return self._refuse("dimensions")
            failed = self.fails(action)
            status, said = failed or (200, None)
            if failed is None and action["@search.action"] == "delete":
                self.documents[name].pop(document["id"], None)
            elif failed is None:
                self.documents[name].setdefault(document["id"], {}).update(document)
            results.append(
                {"key": document["id"], "status": failed is None, "statusCode": status,
                 "errorMessage": said}
            )  # fmt: skip
        whole = all(result["status"] for result in results)
        return 200 if whole else 207, {"value": results}, {}

    def _search(self, name: str, body: dict[str, Any]) -> Answer:
        fields = {field["name"]: field for field in self.indexes[name]["fields"]}
        if unknown := body.keys() - _SEARCH_KEYS:
            return self._refuse(f"unknown {unknown}")
        selected = body["select"].split(",")
        if any(fields[each].get("retrievable") is False for each in selected):
            return self._refuse("a field that is not retrievable")
        found = list(self.documents[name].values())
        if "filter" in body:
            return self._listed(body, found, selected)
        words = {d["id"]: _overlap(body.get("search", ""), d) for d in found}
        by_words = _ranked({key: score for key, score in words.items() if score})
        lists, cosines = [by_words] if "search" in body else [], {}
        for query in body.get("vectorQueries", ()):
            if query["kind"] != "vector" or query["fields"] != "vector" or "vector" not in fields:
                return self._refuse("vectorQueries")
            near = {d["id"]: _dot(query["vector"], d["vector"]) for d in found}
            best = _ranked(near)[: query["k"]]
            cosines = {key: near[key] for key in best}
            lists.append(best)
        if not lists:
            return self._refuse("neither search nor vectorQueries")
        fused = {
            key: sum(1 / (60 + ranks.index(key) + 1) for ranks in lists if key in ranks)
            for key in dict.fromkeys(key for ranks in lists for key in ranks)
        }
        scores = fused if len(lists) > 1 or cosines else {key: words[key] for key in by_words}
        value = []
        for key in _ranked(scores)[: body["top"]]:
            one = {each: self.documents[name][key][each] for each in selected}
            one["@search.score"] = scores[key]
            if body.get("debug") == "vector" and self._tells_parts:
                one["@search.documentDebugInfo"] = {
                    "vectors": {"subscores": _subscores(key, words, cosines)}
                }
            value.append(one)
        return 200, {"value": value}, {}

    def _listed(self, body: dict[str, Any], found: list[Any], selected: Sequence[str]) -> Answer:
        form = r"generation ne (\d+)(?: and id gt '(\w+)')?"
        match = re.fullmatch(form, body["filter"])
        if match is None or body.get("orderby") != "id asc" or body.get("search") != "*":
            return self._refuse(body["filter"])
        generation, after = int(match[1]), match[2] or ""
        left = [d for d in found if d["generation"] != generation and d["id"] > after]
        left.sort(key=lambda document: str(document["id"]))
        page = [{each: d[each] for each in selected} for d in left[: body["top"]]]
        return 200, {"value": page}, {}

    def _refuse(self, why: str) -> Answer:
        self.refused.append(why)
        return _error(400, f"Invalid expression: {why}")


def _error(status: int, message: str) -> Answer:
    return status, {"error": {"code": "", "message": message}}, {}


def _overlap(search: str, document: Mapping[str, Any]) -> float:
    """Stands in for BM25: rarer words are longer ones."""
    held = set(re.findall(r"\w+", f"{document['heading']} {document['text']}".lower()))
    return float(sum(len(word) for word in search.split() if word in held))


def _dot(one: Sequence[float], other: Sequence[float]) -> float:
    lengths = math.hypot(*one) * math.hypot(*other)
    return sum(a * b for a, b in zip(one, other, strict=True)) / lengths if lengths else 0.0


def _ranked(scores: Mapping[str, float]) -> list[str]:
    return sorted(scores, key=lambda key: (-scores[key], key))


def _subscores(
    key: str, words: Mapping[str, float], cosines: Mapping[str, float]
) -> dict[str, Any]:
    near = cosines.get(key)
    vectors = [] if near is None else [
        {"vector": {"searchScore": 1 / (2 - near), "vectorSimilarity": near}}
    ]  # fmt: skip
    return {"text": {"searchScore": words[key]}, "vectors": vectors}
