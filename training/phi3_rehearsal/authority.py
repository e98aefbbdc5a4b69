"""The rehearsal's own certificate authority: only who is told to trust ca.pem believes it.

Writes ca.pem and ca.key (mode 0600) in the rehearsal's folder, once: a program that was given the
file still trusts the rehearsal after a restart.
"""

from __future__ import annotations

import os
import ssl
import threading
from pathlib import Path

import trustme


class Authority:
    """Hands out TLS contexts that present a certificate for any host name."""

    def __init__(self, folder: Path) -> None:
        self.ca_file = folder / "ca.pem"
        key_file = folder / "ca.key"
        if self.ca_file.is_file() and key_file.is_file():
            self._ca = trustme.CA.from_pem(self.ca_file.read_bytes(), key_file.read_bytes())
        else:
            self._ca = trustme.CA(organization_name="phi3 rehearsal, not Azure")
            folder.mkdir(parents=True, exist_ok=True)
            key_file.unlink(missing_ok=True)
            descriptor = os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "wb") as stream:
                stream.write(self._ca.private_key_pem.bytes())
            self._ca.cert_pem.write_to_path(self.ca_file)
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._lock = threading.Lock()

    def context(self, host: str) -> ssl.SSLContext:
        """The server side of TLS for `host`."""
        with self._lock:
            if host not in self._contexts:
                context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
                self._ca.issue_cert(host).configure_cert(context)
                self._contexts[host] = context
            return self._contexts[host]
