"""The rehearsed storage accounts: blobs below blobs/, their metadata below blobmeta/, file shares
below shares/. Keys and signatures are checked as Azure does
(learn.microsoft.com/rest/api/storageservices).

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
from email.utils import formatdate
from pathlib import Path
from urllib.parse import parse_qsl, quote, unquote, urlsplit
from xml.sax.saxutils import escape

from .cloud import Cloud, route
from .identity import check_token
from .processes import write_atomically
from .wire import AzureError, Json, Reply, Request

BLOB_HOST = "{account}.blob.core.windows.net"
_CONTAINER, _BLOB = "/{container}", "/{container}/{blob*}"
_SAS_SECONDS = 3600


class BlobFiles:
    """The blobs of one account on disk. `root` is the rehearsal's folder."""

    def __init__(self, root: Path, account: str) -> None:
        self.data, self.meta = root / "blobs" / account, root / "blobmeta" / account

    def path(self, container: str, blob: str) -> Path:
        """Where a blob lies. Raises AzureError when its name leaves the container."""
        parts = [part for part in blob.split("/") if part]
        if not parts or ".." in parts or "." in parts:
            raise refused(400, "InvalidUri", "The requested URI does not represent a resource.")
        return self.data / container / Path(*parts)

    def details(self, container: str, blob: str) -> Json:
        """The blob's metadata and content type."""
        file = self._meta_file(container, blob)
        found: Json = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
        return found

    def write(self, container: str, blob: str, content: bytes, details: Json) -> None:
        """Store a blob whole."""
        path = self.path(container, blob)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.{uuid.uuid4().hex}.part")
        part.write_bytes(content)
        part.replace(path)
        self.describe(container, blob, details)

    def describe(self, container: str, blob: str, details: Json) -> None:
        """Replace the blob's metadata."""
        write_atomically(self._meta_file(container, blob), json.dumps(details))

    def remove(self, container: str, blob: str) -> None:
        """Delete a blob."""
        self.path(container, blob).unlink()
        self._meta_file(container, blob).unlink(missing_ok=True)

    def names(self, container: str, prefix: str = "") -> list[str]:
        """The names of the blobs that begin with `prefix`, sorted."""
        root = self.data / container
        files = (path for path in root.rglob("*") if path.is_file())
        names = (path.relative_to(root).as_posix() for path in files)
        return sorted(n for n in names if n.startswith(prefix) and not n.endswith(".part"))

    def _meta_file(self, container: str, blob: str) -> Path:
        self.path(container, blob)
        return self.meta / container / (blob + ".json")


def account_key(cloud: Cloud, account: str) -> str:
    """The account's key, in base64 as Azure writes it."""
    return base64.b64encode(cloud.derive("storage", account).encode()).decode()


def account_sas(cloud: Cloud, account: str) -> str:
    """A signature for the account's blobs, good for an hour."""
    expires = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(time.time() + _SAS_SECONDS))
    fields = {"sv": "2021-08-06", "ss": "bf", "srt": "sco", "sp": "rwdlac", "se": expires}
    signature = _sign(cloud, account, _account_text(account, fields))
    pairs = {**fields, "spr": "https", "sig": signature}
    return "&".join(f"{name}={quote(value, safe='')}" for name, value in pairs.items())


@route("HEAD", BLOB_HOST, _BLOB, audience="", locked=False)
def head_blob(cloud: Cloud, request: Request) -> Reply:
    """Size and metadata."""
    files, container, blob = _opened(cloud, request)
    return Reply(200, None, _blob_headers(files, container, blob, whole=True))


@route("GET", BLOB_HOST, _BLOB, audience="", locked=False)
def get_blob(cloud: Cloud, request: Request) -> Reply:
    """The bytes, or a range of them."""
    files, container, blob = _opened(cloud, request)
    headers = _blob_headers(files, container, blob, whole=False)
    return _range_of(files.path(container, blob).read_bytes(), request, headers)


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
    account = checked(cloud, request)
    files = BlobFiles(cloud.folder, account)
    container, blob = request.args["container"], request.args["blob"]
    comp = request.query.get("comp", "")
    if comp == "metadata":
        _must_exist(files, container, blob)
        kept = files.details(container, blob)
        files.describe(container, blob, {**kept, "metadata": _metadata(request)})
        return Reply(200, None, _blob_headers(files, container, blob, whole=False))
    if comp == "block":
        part = _block(files, container, blob, request.query["blockid"])
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_bytes(request.body)
        return Reply(201, None, {"x-ms-request-server-encrypted": "true"})
    if comp not in ("", "blocklist"):
        raise refused(501, "NotRehearsed", f"PUT blob with comp={comp} is not rehearsed.")
    if request.headers.get("if-none-match") == "*" and files.path(container, blob).is_file():
        raise refused(409, "BlobAlreadyExists", "The specified blob already exists.")
    content = request.body
    if comp == "blocklist":
        content = _joined(files, container, blob, request.body)
    kind = request.headers.get("x-ms-blob-content-type") or "application/octet-stream"
    files.write(container, blob, content, {"type": kind, "metadata": _metadata(request)})
    headers = _blob_headers(files, container, blob, whole=False)
    return Reply(201, None, {**headers, "x-ms-request-server-encrypted": "true"})


@route("DELETE", BLOB_HOST, _BLOB, audience="", locked=False)
def delete_blob(cloud: Cloud, request: Request) -> Reply:
    """Delete a blob."""
    files, container, blob = _opened(cloud, request)
    files.remove(container, blob)
    return Reply(202)


@route("PUT", BLOB_HOST, _CONTAINER, audience="", locked=False)
def put_container(cloud: Cloud, request: Request) -> Reply:
    """Make a container."""
    account = checked(cloud, request)
    root = BlobFiles(cloud.folder, account).data / request.args["container"]
    if root.is_dir():
        raise refused(409, "ContainerAlreadyExists", "The specified container already exists.")
    root.mkdir(parents=True)
    return Reply(201, None, {"ETag": '"0x1"', "Last-Modified": formatdate(usegmt=True)})


@route("GET", BLOB_HOST, _CONTAINER, audience="", locked=False)
def get_container(cloud: Cloud, request: Request) -> Reply:
    """Properties, or the list of blobs below a prefix."""
    account = checked(cloud, request)
    files, container = BlobFiles(cloud.folder, account), request.args["container"]
    if request.query.get("comp") != "list":
        return Reply(200, None, {"ETag": '"0x1"', "Last-Modified": formatdate(usegmt=True)})
    prefix, delimiter = request.query.get("prefix", ""), request.query.get("delimiter", "")
    blobs, folders = [], []
    for name in files.names(container, prefix):
        rest = name[len(prefix) :]
        if delimiter and delimiter in rest:
            folder = prefix + rest.split(delimiter)[0] + delimiter
            if folder not in folders:
                folders.append(folder)
        else:
            blobs.append(_listed(files, container, name))
    text = "".join(blobs) + "".join(
        f"<BlobPrefix><Name>{escape(folder)}</Name></BlobPrefix>" for folder in folders
    )
    body = (
        f'<?xml version="1.0" encoding="utf-8"?><EnumerationResults ServiceEndpoint='
        f'"https://{request.host}/" ContainerName="{container}"><Prefix>{escape(prefix)}</Prefix>'
        f"<Blobs>{text}</Blobs><NextMarker /></EnumerationResults>"
    )
    return Reply(200, body.encode(), {"Content-Type": "application/xml"})


head_container = route("HEAD", BLOB_HOST, _CONTAINER, audience="", locked=False)(get_container)


def _listed(files: BlobFiles, container: str, name: str) -> str:
    headers = _blob_headers(files, container, name, whole=True)
    stored = files.details(container, name).get("metadata", {})
    metadata = "".join(f"<{key}>{escape(value)}</{key}>" for key, value in stored.items())
    return (
        f"<Blob><Name>{escape(name)}</Name><Properties>"
        f"<Last-Modified>{headers['Last-Modified']}</Last-Modified><Etag>{headers['ETag'][1:-1]}"
        f"</Etag><Content-Length>{headers['Content-Length']}</Content-Length><Content-Type>"
        f"{headers['Content-Type']}</Content-Type><BlobType>BlockBlob</BlobType></Properties>"
        f"<Metadata>{metadata}</Metadata></Blob>"
    )


def _opened(cloud: Cloud, request: Request) -> tuple[BlobFiles, str, str]:
    account = checked(cloud, request)
    files = BlobFiles(cloud.folder, account)
    container, blob = request.args["container"], request.args["blob"]
    _must_exist(files, container, blob)
    return files, container, blob


def _must_exist(files: BlobFiles, container: str, blob: str) -> None:
    if not files.path(container, blob).is_file():
        raise refused(404, "BlobNotFound", "The specified blob does not exist.")


def _blob_headers(files: BlobFiles, container: str, blob: str, *, whole: bool) -> dict[str, str]:
    details = files.details(container, blob)
    stat = files.path(container, blob).stat()
    headers = {
        "ETag": f'"0x{stat.st_mtime_ns:X}"',
        "Last-Modified": formatdate(stat.st_mtime, usegmt=True),
        "Content-Type": details.get("type", "application/octet-stream"),
        "x-ms-blob-type": "BlockBlob",
        "x-ms-version": "2021-08-06",
        "Accept-Ranges": "bytes",
    }
    headers |= {f"x-ms-meta-{k}": v for k, v in details.get("metadata", {}).items()}
    return {**headers, "Content-Length": str(stat.st_size)} if whole else headers


def _metadata(request: Request) -> Json:
    prefix = "x-ms-meta-"
    return {k[len(prefix) :]: v for k, v in request.headers.items() if k.startswith(prefix)}


def _block(files: BlobFiles, container: str, blob: str, block: str) -> Path:
    name = hashlib.sha256(f"{container}/{blob}".encode()).hexdigest()[:32]
    return files.meta / ".blocks" / name / base64.urlsafe_b64encode(block.encode()).decode()


def _joined(files: BlobFiles, container: str, blob: str, body: bytes) -> bytes:
    parts = re.findall(r"<(?:Latest|Uncommitted|Committed)>([^<]+)<", body.decode())
    blocks = [_block(files, container, blob, part) for part in parts]
    if not all(block.is_file() for block in blocks):
        raise refused(400, "InvalidBlockList", "The specified block list is invalid.")
    content = b"".join(block.read_bytes() for block in blocks)
    if blocks:
        shutil.rmtree(blocks[0].parent)
    return content


def checked(cloud: Cloud, request: Request) -> str:
    """The account of a request that may do what it asks. Raises AzureError."""
    account = request.args["account"]
    suffix = f"/providers/microsoft.storage/storageaccounts/{account}".lower()
    with cloud.lock:
        if not any(key.endswith(suffix) for key in cloud.resources):
            raise refused(404, "ResourceNotFound", "The specified account does not exist.")
    header = request.headers.get("authorization", "")
    query = dict(parse_qsl(urlsplit(request.target).query, keep_blank_values=True))
    if header.startswith("SharedKey "):
        expected = f"SharedKey {account}:{_sign(cloud, account, _shared_key_text(request))}"
        good = hmac.compare_digest(header, expected)
    elif header.startswith("Bearer "):
        try:
            check_token(cloud, request, "storage")
        except AzureError as error:
            raise refused(401, "InvalidAuthenticationInfo", error.message) from None
        good = True
    else:
        good = _good_signature(cloud, account, request, query)
    if not good:
        text = "Server failed to authenticate the request. Make sure the value of Authorization "
        text += "header is formed correctly including the signature."
        raise refused(403, "AuthenticationFailed", text)
    return account


def _good_signature(cloud: Cloud, account: str, request: Request, query: dict[str, str]) -> bool:
    if query.get("se", "") < time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()):
        return False
    of_account = "ss" in query
    text = _account_text(account, query) if of_account else _service_text(account, request, query)
    return hmac.compare_digest(query.get("sig", ""), _sign(cloud, account, text))


def _account_text(account: str, query: dict[str, str]) -> str:
    """What an account SAS signs. Ours says `spr` in the query and not in what is signed."""
    names = ("sp", "ss", "srt", "st", "se", "sip", "spr", "sv", "ses")
    own = {**query, "spr": ""}
    return "\n".join([account, *(own.get(name, "") for name in names), ""])


def _service_text(account: str, request: Request, query: dict[str, str]) -> str:
    path = unquote(urlsplit(request.target).path)
    if query.get("sr") == "c":
        path = "/" + path.split("/")[1]
    head = [query.get(name, "") for name in ("sp", "st", "se")]
    names = ("si", "sip", "spr", "sv", "sr", "snapshot", "ses")
    tail = ("rscc", "rscd", "rsce", "rscl", "rsct")
    fields = [query.get(name, "") for name in (*names, *tail)]
    return "\n".join([*head, f"/blob/{account}{path}", *fields])


def _shared_key_text(request: Request) -> str:
    names = ["content-encoding", "content-language", "content-length", "content-md5"]
    names += ["content-type", "date", "if-modified-since", "if-match", "if-none-match"]
    names += ["if-unmodified-since", "range"]
    values = [request.headers.get(name, "") for name in names]
    values[2] = "" if values[2] == "0" else values[2]
    own = sorted(name for name in request.headers if name.startswith("x-ms-"))
    headers = "".join(f"{name}:{request.headers[name].strip()}\n" for name in own)
    resource = f"/{request.args['account']}{urlsplit(request.target).path}"
    query = "".join(f"\n{name}:{value}" for name, value in sorted(request.query.items()))
    return "\n".join([request.method, *values, headers + resource + query])


def _sign(cloud: Cloud, account: str, text: str) -> str:
    key = base64.b64decode(account_key(cloud, account))
    return base64.b64encode(hmac.new(key, text.encode(), hashlib.sha256).digest()).decode()


class _RefusedError(AzureError):
    """A refusal in the form of the storage service: XML and a header."""

    def reply(self) -> Reply:
        text = (
            '<?xml version="1.0" encoding="utf-8"?>'
            f"<Error><Code>{self.code}</Code><Message>{escape(self.message)}</Message></Error>"
        )
        headers = {"Content-Type": "application/xml", "x-ms-error-code": self.code}
        return Reply(self.status, text.encode(), headers)


def refused(status: int, code: str, message: str) -> AzureError:
    return _RefusedError(status, code, message)


# --- file shares: Prompt flow keeps its flows there ---

_FILE_HOST = "{account}.file.core.windows.net"
_FILE_PATH = "/{share}/{path*}"
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
    """Where a file of a share lies. Raises AzureError when it would leave the share."""
    parts = [part for part in path.split("/") if part]
    if ".." in parts or "." in parts:
        raise refused(400, "InvalidUri", "The requested URI does not represent a resource.")
    return cloud.folder / "shares" / account / share / Path(*parts)


@route("PUT", _FILE_HOST, _FILE_PATH, audience="", locked=False)
def put_file(cloud: Cloud, request: Request) -> Reply:
    """Make a directory or a file, or write a range of a file."""
    place = _share_place(cloud, request)
    comp = request.query.get("comp", "")
    if request.query.get("restype") == "directory":
        if place.exists():
            raise refused(409, "ResourceAlreadyExists", "The specified resource already exists.")
        _need_parent_folder(cloud, request, place)
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
            _need_parent_folder(cloud, request, place)
            size = int(request.headers.get("x-ms-content-length", "0"))
            place.write_bytes(b"\0" * size)
    else:
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


def _need_parent_folder(cloud: Cloud, request: Request, place: Path) -> None:
    root = share_file(cloud, request.args["account"], request.args["share"], "")
    if place.parent != root and not place.parent.is_dir():
        raise refused(404, "ParentNotFound", "The specified parent path does not exist.")
    root.mkdir(parents=True, exist_ok=True)
