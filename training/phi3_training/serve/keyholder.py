"""The endpoint's key, handed by the running server to its own user; it is on no disk.

The server listens on an abstract Unix socket named after its process id, which leaves no file.
Both ends ask the system who is on the other side (SO_PEERCRED, unix(7)): the server answers its own
user alone, and the asker believes the process that the run folder names and no other. Linux only;
elsewhere nobody offers a key and nobody gets one.
"""

from __future__ import annotations

import asyncio
import os
import socket
import struct
import sys

_CREDENTIALS = struct.Struct("3i")  # struct ucred: pid, uid, gid
_SECONDS = 2.0
_LONGEST = 65536  # bytes of a key


async def offer(key: str) -> asyncio.Server | None:
    """Hand `key` to whoever asks as this user, until the result is closed.

    None where that is not possible: not on Linux, or another container that shares this one's
    network has a server with the same process id.
    """
    if sys.platform != "linux":
        return None

    async def answer(_reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # By the user, not the process: `phi3 chat` and `phi3 env` are other processes each time.
        _pid, user = _peer(writer.get_extra_info("socket"))
        if user == os.geteuid():
            writer.write(key.encode())
        writer.close()

    try:
        return await asyncio.start_unix_server(answer, _name(os.getpid()))
    except OSError:
        return None


def ask(pid: int) -> str | None:
    """The key of the server with that process id; None where no such server answers."""
    if sys.platform != "linux":
        return None
    with socket.socket(socket.AF_UNIX) as asking:
        asking.settimeout(_SECONDS)
        try:
            asking.connect(_name(pid))
            if _peer(asking) != (pid, os.geteuid()):
                return None
            with asking.makefile("rb") as answer:
                return answer.read(_LONGEST).decode() or None
        except OSError:
            return None


def _name(pid: int) -> str:
    # The leading zero byte makes it abstract: a name in the kernel, gone with the process.
    return f"\0phi3-endpoint-{pid}"


def _peer(connected: socket.socket) -> tuple[int, int]:
    """Process and user at the other end."""
    packed = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    pid, user, _group = _CREDENTIALS.unpack(packed)
    return pid, user
