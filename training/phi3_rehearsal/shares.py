"""File shares of the rehearsed accounts: files below shares/. Prompt flow keeps its flows there."""

from __future__ import annotations

import re
from email.utils import formatdate
from pathlib import Path

from .cloud import Cloud, route
from .storage import checked, refused
from .wire import Reply, Request

_HOST = "{account}.file.core.windows.net"
_PATH = "/{share}/{path*}"
_HEADERS = {
    "ETag": '"0x1"',
    "Last-Modified": formatdate(0, usegmt=True),
    "x-ms-request-server-encrypted": "true",
    "x-ms-file-attributes": "None",
    "x-ms-file-creation-time": "2026-01-01T00:00:00.0000000Z",
    "x-ms-file-last-write-time": "2026-01-01T00:00:00.0000000Z",
    "x-ms-file-change-time": "2026-01-01T00:00:00.0000000Z",
    "x-ms-file-permission-key": "0",
    "x-ms-file-id": "0",
    "x-ms-file-parent-id": "0",
}


def share_file(cloud: Cloud, account: str, share: str, path: str) -> Path:
    """Where a file of a share lies. Raises AzureError when it would leave the share."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts or "." in parts:
        raise refused(400, "InvalidUri", "The requested URI does not represent a resource.")
    return cloud.folder / "shares" / account / share / Path(*parts)


@route("PUT", _HOST, _PATH, audience="", locked=False)
def put(cloud: Cloud, request: Request) -> Reply:
    """Make a directory or a file, or write a range of a file."""
    place = _place(cloud, request)
    comp = request.query.get("comp", "")
    if request.query.get("restype") == "directory":
        if place.exists():
            raise refused(409, "ResourceAlreadyExists", "The specified resource already exists.")
        _need_parent(cloud, request, place)
        place.mkdir(parents=True)
    elif comp == "range":
        wanted = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("x-ms-range", ""))
        if not wanted or not place.is_file():
            raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
        with place.open("r+b") as stream:
            stream.seek(int(wanted.group(1)))
            stream.write(request.body)
    elif comp in ("", "properties", "metadata"):
        if not comp:
            _need_parent(cloud, request, place)
            size = int(request.headers.get("x-ms-content-length", "0"))
            place.write_bytes(b"\0" * size)
    else:
        raise refused(501, "NotRehearsed", f"PUT file with comp={comp} is not rehearsed.")
    return Reply(201, None, dict(_HEADERS))


@route("GET", _HOST, _PATH, audience="", locked=False)
def get(cloud: Cloud, request: Request) -> Reply:
    """A directory's properties, or a file's bytes."""
    place = _place(cloud, request)
    directory = request.query.get("restype") == "directory"
    if not (place.is_dir() if directory else place.is_file()):
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    if directory:
        return Reply(200, None, dict(_HEADERS))
    content = place.read_bytes()
    headers = {**_HEADERS, "x-ms-type": "File", "Content-Type": "application/octet-stream"}
    asked = request.headers.get("x-ms-range") or request.headers.get("range") or ""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    if request.method == "HEAD":
        return Reply(200, None, {**headers, "Content-Length": str(len(content))})
    if wanted and content:
        first = int(wanted.group(1))
        last = min(int(wanted.group(2) or len(content) - 1), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return Reply(206, content[first : last + 1], headers)
    return Reply(200, content, headers)


head = route("HEAD", _HOST, _PATH, audience="", locked=False)(get)


@route("DELETE", _HOST, _PATH, audience="", locked=False)
def delete(cloud: Cloud, request: Request) -> Reply:
    """Delete a file, or a directory that is empty."""
    place = _place(cloud, request)
    if not place.exists():
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    if place.is_dir() and any(place.iterdir()):
        raise refused(409, "DirectoryNotEmpty", "The specified directory is not empty.")
    if place.is_dir():
        place.rmdir()
    else:
        place.unlink()
    return Reply(202)


def _place(cloud: Cloud, request: Request) -> Path:
    account = checked(cloud, request)
    return share_file(cloud, account, request.args["share"], request.args["path"])


def _need_parent(cloud: Cloud, request: Request, place: Path) -> None:
    root = share_file(cloud, request.args["account"], request.args["share"], "")
    if place.parent != root and not place.parent.is_dir():
        raise refused(404, "ParentNotFound", "The specified parent path does not exist.")
    root.mkdir(parents=True, exist_ok=True)
