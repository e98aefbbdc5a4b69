"""The rehearsed storage accounts: blobs below blobs/, their metadata below blobmeta/, file shares
below shares/. Keys and signatures are checked as Azure does
(learn.microsoft.com/rest/api/storageservices, pages authorize-with-shared-key, create-account-sas
and create-service-sas).

Job processes read and write the same folders.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import shutil
import time
import uuid
from collections.abc import Iterable, Mapping
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from .cloud import Cloud, route
from .identity import check_token
from .processes import write_atomically
from .wire import AzureError, Json, Reply, Request

_VERSION = "2021-08-06"  # of the storage service's REST API
_SAS_SECONDS = 3600


class _RefusedError(AzureError):
    """A refusal in the form of the storage service: XML and a header."""

    def reply(self) -> Reply:
        text = (
            '<?xml version="1.0" encoding="utf-8"?>'
            f"<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message></Error>"
        )
        headers = {"Content-Type": "application/xml", "x-ms-error-code": self.code}
        return Reply(self.status, text.encode(), headers)


class Blob:
    """One blob: its bytes, and a small file with its content type and metadata."""

    def __init__(self, account: BlobFiles, container: str, name: str) -> None:
        self.container, self.name = container, name
        self.path = account.path(container, name)
        self._details = account.meta / container / (name + ".json")
        number = hashlib.sha256(f"{container}/{name}".encode()).hexdigest()[:32]
        self._blocks = account.meta / ".blocks" / number

    def metadata(self) -> dict[str, str]:
        """What the client wrote in addition to the bytes."""
        return dict(self._read().get("metadata", {}))

    def write(self, content: bytes, kind: str, metadata: dict[str, str]) -> None:
        """Store the blob whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex}.part")
        part.write_bytes(content)
        part.replace(self.path)  # a job that reads now sees the old blob or the new one
        write_atomically(self._details, json.dumps({"type": kind, "metadata": metadata}))

    def describe(self, metadata: dict[str, str]) -> None:
        """Replace the metadata."""
        write_atomically(self._details, json.dumps({**self._read(), "metadata": metadata}))

    def remove(self) -> None:
        """Delete it."""
        self.path.unlink()
        self._details.unlink(missing_ok=True)

    def block(self, number: str) -> Path:
        """Where a block is stored until the blob is assembled from its blocks."""
        return self._blocks / base64.urlsafe_b64encode(number.encode()).decode()

    def joined(self, block_list: bytes) -> bytes:
        """The blocks that the list names, in its order. Raises AzureError."""
        numbers = re.findall(r"<(?:Latest|Uncommitted|Committed)>([^<]+)<", block_list.decode())
        blocks = [self.block(number) for number in numbers]
        if not all(block.is_file() for block in blocks):
            raise refused(400, "InvalidBlockList", "The specified block list is invalid.")
        content = b"".join(block.read_bytes() for block in blocks)
        shutil.rmtree(self._blocks, ignore_errors=True)
        return content

    def headers(self, *, length: bool = False) -> dict[str, str]:
        """What an answer says of it."""
        details, stat = self._read(), self.path.stat()
        headers = {
            "ETag": f'"0x{stat.st_mtime_ns:X}"',
            "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
            "Content-Type": details.get("type", "application/octet-stream"),
            "x-ms-blob-type": "BlockBlob",
            "x-ms-version": _VERSION,
            "Accept-Ranges": "bytes",
            **{f"x-ms-meta-{k}": v for k, v in details.get("metadata", {}).items()},
        }
        return {**headers, "Content-Length": str(stat.st_size)} if length else headers

    def _read(self) -> Json:
        text = self._details.read_text(encoding="utf-8") if self._details.is_file() else "{}"
        details: Json = json.loads(text)
        return details


class BlobFiles:
    """The blobs of one account on disk. `root` is the rehearsal's folder."""

    def __init__(self, root: Path, account: str) -> None:
        self.data, self.meta = root / "blobs" / account, root / "blobmeta" / account

    def path(self, container: str, blob: str) -> Path:
        """The path of a blob. Raises AzureError if its name leaves the container."""
        parts = _parts(blob)
        if not parts:
            raise refused(400, "InvalidUri", "The requested URI does not represent a resource.")
        return self.data / container / Path(*parts)

    def names(self, container: str, prefix: str = "") -> list[str]:
        """The names of the blobs that begin with `prefix`, sorted."""
        root = self.data / container
        # Left out is what another thread is just writing (Blob.write).
        files = (path for path in root.rglob("*") if path.is_file())
        names = (path.relative_to(root).as_posix() for path in files)
        return sorted(n for n in names if n.startswith(prefix) and not n.endswith(".part"))


def _parts(path: str) -> list[str]:
    """The parts of a path. Raises AzureError when it would leave its container or share."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts or "." in parts:
        raise refused(400, "InvalidUri", "The requested URI does not represent a resource.")
    return parts


def refused(status: int, code: str, message: str) -> AzureError:
    """A refusal in the storage service's form."""
    return _RefusedError(status, code, message)


# --- blobs ---
# Without an audience: a call may carry a key or a signature in the place of a token (`checked`).
# Without the lock: a job's files are sent many at a time.

BLOB_HOST = "{account}.blob.core.windows.net"
_CONTAINER, _BLOB = "/{container}", "/{container}/{blob*}"


@route("GET", BLOB_HOST, _BLOB, audience="", locked=False)
def get_blob(cloud: Cloud, request: Request) -> Reply:
    """The bytes or a range of them; to HEAD only size and metadata."""
    blob = _blob(cloud, request)
    if request.method == "HEAD":
        return Reply(200, None, blob.headers(length=True))
    return _range_of(blob.path.read_bytes(), request, blob.headers())


head_blob = route("HEAD", BLOB_HOST, _BLOB, audience="", locked=False)(get_blob)


def _range_of(content: bytes, request: Request, headers: dict[str, str]) -> Reply:
    asked = request.headers.get("x-ms-range") or request.headers.get("range") or ""
    wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", asked)
    if not wanted:
        return Reply(200, content, headers)
    first = int(wanted.group(1))
    last = min(int(wanted.group(2) or len(content) - 1), len(content) - 1)
    if first >= len(content):
        raise refused(416, "InvalidRange", "The range specified is invalid.")
    headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
    return Reply(206, content[first : last + 1], headers)


@route("PUT", BLOB_HOST, _BLOB, audience="", locked=False)
def put_blob(cloud: Cloud, request: Request) -> Reply:
    """A whole blob, a block, a list of blocks, or new metadata."""
    comp = request.query.get("comp", "")
    blob = _blob(cloud, request, must_exist=comp == "metadata")
    prefix = "x-ms-meta-"
    own = {k[len(prefix) :]: v for k, v in request.headers.items() if k.startswith(prefix)}
    encrypted = {"x-ms-request-server-encrypted": "true"}
    if comp == "metadata":
        blob.describe(own)
        return Reply(200, None, blob.headers())
    if comp == "block":
        block = blob.block(request.query["blockid"])
        block.parent.mkdir(parents=True, exist_ok=True)
        block.write_bytes(request.body)
        return Reply(201, None, encrypted)
    if comp not in ("", "blocklist"):
        raise refused(501, "NotRehearsed", f"PUT blob with comp={comp} is not rehearsed.")
    if request.headers.get("if-none-match") == "*" and blob.path.is_file():
        raise refused(409, "BlobAlreadyExists", "The specified blob already exists.")
    content = blob.joined(request.body) if comp == "blocklist" else request.body
    kind = request.headers.get("x-ms-blob-content-type") or "application/octet-stream"
    blob.write(content, kind, own)
    return Reply(201, None, {**blob.headers(), **encrypted})


@route("DELETE", BLOB_HOST, _BLOB, audience="", locked=False)
def delete_blob(cloud: Cloud, request: Request) -> Reply:
    """Delete a blob."""
    _blob(cloud, request).remove()
    return Reply(202)


def _blob(cloud: Cloud, request: Request, *, must_exist: bool = True) -> Blob:
    files = BlobFiles(cloud.folder, checked(cloud, request))
    blob = Blob(files, request.args["container"], request.args["blob"])
    if must_exist and not blob.path.is_file():
        raise refused(404, "BlobNotFound", "The specified blob does not exist.")
    return blob


@route("PUT", BLOB_HOST, _CONTAINER, audience="", locked=False)
def put_container(cloud: Cloud, request: Request) -> Reply:
    """Make a container."""
    root = BlobFiles(cloud.folder, checked(cloud, request)).data / request.args["container"]
    if root.is_dir():
        raise refused(409, "ContainerAlreadyExists", "The specified container already exists.")
    root.mkdir(parents=True)
    return Reply(201, None, {"ETag": '"0x1"', "Last-Modified": formatdate(usegmt=True)})


@route("GET", BLOB_HOST, _CONTAINER, audience="", locked=False)
def get_container(cloud: Cloud, request: Request) -> Reply:
    """Properties, or the list of blobs below a prefix."""
    files, container = BlobFiles(cloud.folder, checked(cloud, request)), request.args["container"]
    if request.query.get("comp") != "list":
        return Reply(200, None, {"ETag": '"0x1"', "Last-Modified": formatdate(usegmt=True)})
    prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
    blobs, folders = [], dict[str, None]()
    for name in files.names(container, prefix):
        # No name holds a line break: without a delimiter nothing is a folder.
        folder, separator, _rest = name[len(prefix) :].partition(delimiter or "\n")
        if separator:  # deeper levels are listed as one folder
            folders[prefix + folder + delimiter] = None
        else:
            blob = Blob(files, container, name)
            headers = blob.headers(length=True)
            metadata = "".join(f"<{k}>{escape(v)}</{k}>" for k, v in blob.metadata().items())
            blobs.append(
                f"<Blob><Name>{escape(name)}</Name><Properties>"
                f"<Last-Modified>{headers['Last-Modified']}</Last-Modified>"
                f"<Etag>{headers['ETag'][1:-1]}</Etag>"
                f"<Content-Length>{headers['Content-Length']}</Content-Length>"
                f"<Content-Type>{headers['Content-Type']}</Content-Type>"
                "<BlobType>BlockBlob</BlobType></Properties>"
                f"<Metadata>{metadata}</Metadata></Blob>"
            )
    names = (f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>" for folder in folders)
    body = (
        f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint='
        f'"https://{request.host}/" ContainerName="{container}"><Prefix>{escape(prefix)}</Prefix>'
        f"<Blobs>{''.join([*blobs, *names])}</Blobs><NextMarker /></EnumerationResults>"
    )
    return Reply(200, body.encode(), {"Content-Type": "application/xml"})


head_container = route("HEAD", BLOB_HOST, _CONTAINER, audience="", locked=False)(get_container)


# --- who may: account keys, signatures and tokens ---


def account_key(cloud: Cloud, account: str) -> str:
    """The account's key, in base64 as Azure writes it."""
    return base64.b64encode(cloud.derive("storage", account).encode()).decode()


def account_sas(cloud: Cloud, account: str) -> str:
    """A signature for the account's blobs and files, good for an hour."""
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _SAS_SECONDS))
    fields = {"sv": _VERSION, "ss": "bf", "srt": "sco", "sp": "rwdlac", "se": expires}
    signature = _sign(cloud, account, _account_text(account, fields))
    pairs = {**fields, "spr": "https", "sig": signature}
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())


def checked(cloud: Cloud, request: Request) -> str:
    """The account of a request that may do what it asks. Raises AzureError."""
    account = request.args["account"]
    suffix = f"/providers/microsoft.storage/storageaccounts/{account}".lower()
    with cloud.lock:
        if not any(key.endswith(suffix) for key in cloud.resources):
            raise refused(404, "ResourceNotFound", "The specified account does not exist.")
    header = request.headers.get("authorization", "")
    if header.startswith("Bearer "):
        try:
            check_token(cloud, request, "storage")
        except AzureError as error:
            raise refused(401, "InvalidAuthenticationInfo", error.message) from None
        return account
    if header.startswith("SharedKey "):
        expected = f"SharedKey {account}:{_sign(cloud, account, _shared_key_text(request))}"
        good = hmac.compare_digest(header, expected)
    else:
        query = dict(parse_qsl(urlsplit(request.target).query, keep_blank_values=True))
        of_account = "ss" in query
        text = (
            _account_text(account, query) if of_account else _service_text(account, request, query)
        )
        good = hmac.compare_digest(query.get("sig", ""), _sign(cloud, account, text))
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        good = good and query.get("se", "") >= now  # ISO times compare as text
    if not good:
        text = "Server failed to authenticate the request. Make sure the value of Authorization "
        text += "header is formed correctly including the signature."
        raise refused(403, "AuthenticationFailed", text)
    return account


def _account_text(account: str, query: dict[str, str]) -> str:
    """What an account SAS signs."""
    # Ours says `spr` in the query and not in what is signed.
    names = ("sp", "ss", "srt", "st", "se", "sip", "spr", "sv", "ses")
    return "\n".join([account, *_values({**query, "spr": ""}, names), ""])


def _service_text(account: str, request: Request, query: dict[str, str]) -> str:
    """What the SAS of one blob or container signs."""
    path = unquote(urlsplit(request.target).path)
    if query.get("sr") == "c":
        path = "/" + path.split("/")[1]
    head, names = ("sp", "st", "se"), ("si", "sip", "spr", "sv", "sr", "snapshot", "ses")
    tail = ("rscc", "rscd", "rsce", "rscl", "rsct")
    resource = f"/blob/{account}{path}"
    return "\n".join([*_values(query, head), resource, *_values(query, (*names, *tail))])


def _shared_key_text(request: Request) -> str:
    """What a request signs with the account's key."""
    names = (
        *("content-encoding", "content-language", "content-length", "content-md5"),
        *("content-type", "date", "if-modified-since", "if-match", "if-none-match"),
        *("if-unmodified-since", "range"),
    )
    values = _values(request.headers, names)
    values[2] = "" if values[2] == "0" else values[2]  # no length is signed where there is no body
    own = sorted(name for name in request.headers if name.startswith("x-ms-"))
    headers = "".join(f"{name}:{request.headers[name].strip()}\n" for name in own)
    resource = f"/{request.args['account']}{urlsplit(request.target).path}"
    query = "".join(f"\n{name}:{value}" for name, value in sorted(request.query.items()))
    return "\n".join([request.method, *values, headers + resource + query])


def _values(fields: Mapping[str, str], names: Iterable[str]) -> list[str]:
    return [fields.get(name, "") for name in names]


def _sign(cloud: Cloud, account: str, text: str) -> str:
    key = base64.b64decode(account_key(cloud, account))
    return base64.b64encode(hmac.new(key, text.encode(), hashlib.sha256).digest()).decode()


# --- file shares: Prompt flow keeps its flows there ---

_FILE_HOST, _FILE_PATH = "{account}.file.core.windows.net", "/{share}/{path*}"
# What the SDK insists on finding in an answer; nobody looks at the values.
_FILE_HEADERS = {
    "ETag": '"0x1"',
    "Last-Modified": formatdate(0, usegmt=True),
    "x-ms-request-server-encrypted": "true",
    "x-ms-file-attributes": "None",
    **dict.fromkeys(
        (f"x-ms-file-{which}-time" for which in ("creation", "last-write", "change")),
        "2026-01-01T00:00:00.0000000Z",
    ),
    **dict.fromkeys((f"x-ms-file-{which}" for which in ("permission-key", "id", "parent-id")), "0"),
}


def share_file(cloud: Cloud, account: str, share: str, path: str) -> Path:
    """The path of a file in a share. Raises AzureError if it would leave the share."""
    return cloud.folder / "shares" / account / share / Path(*_parts(path))


@route("PUT", _FILE_HOST, _FILE_PATH, audience="", locked=False)
def put_file(cloud: Cloud, request: Request) -> Reply:
    """Make a directory or a file, or write a range of a file."""
    place, comp = _share_place(cloud, request), request.query.get("comp", "")
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
    elif not comp:  # a file is made with its size; its ranges come after
        _need_parent(cloud, request, place)
        place.write_bytes(b"\0" * int(request.headers.get("x-ms-content-length", "0")))
    elif comp not in ("properties", "metadata"):
        raise refused(501, "NotRehearsed", f"PUT file with comp={comp} is not rehearsed.")
    return Reply(201, None, dict(_FILE_HEADERS))


@route("GET", _FILE_HOST, _FILE_PATH, audience="", locked=False)
def get_file(cloud: Cloud, request: Request) -> Reply:
    """A directory's properties, or a file's bytes."""
    place = _share_place(cloud, request)
    directory = request.query.get("restype") == "directory"
    if not (place.is_dir() if directory else place.is_file()):
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    if directory:
        return Reply(200, None, dict(_FILE_HEADERS))
    content = place.read_bytes()
    headers = {**_FILE_HEADERS, "x-ms-type": "File", "Content-Type": "application/octet-stream"}
    if request.method == "HEAD":
        return Reply(200, None, {**headers, "Content-Length": str(len(content))})
    # The SDK asks for a range even of a file that is empty, and takes 200 with nothing for it.
    return _range_of(content, request, headers) if content else Reply(200, content, headers)


head_file = route("HEAD", _FILE_HOST, _FILE_PATH, audience="", locked=False)(get_file)


@route("DELETE", _FILE_HOST, _FILE_PATH, audience="", locked=False)
def delete_file(cloud: Cloud, request: Request) -> Reply:
    """Delete a file, or a directory that is empty."""
    place = _share_place(cloud, request)
    if not place.exists():
        raise refused(404, "ResourceNotFound", "The specified resource does not exist.")
    if place.is_dir() and any(place.iterdir()):
        raise refused(409, "DirectoryNotEmpty", "The specified directory is not empty.")
    if place.is_dir():
        place.rmdir()
    else:
        place.unlink()
    return Reply(202)


def _share_place(cloud: Cloud, request: Request) -> Path:
    account = checked(cloud, request)
    return share_file(cloud, account, request.args["share"], request.args["path"])


def _need_parent(cloud: Cloud, request: Request, place: Path) -> None:
    root = share_file(cloud, request.args["account"], request.args["share"], "")
    if place.parent != root and not place.parent.is_dir():
        raise refused(404, "ParentNotFound", "The specified parent path does not exist.")
    root.mkdir(parents=True, exist_ok=True)
