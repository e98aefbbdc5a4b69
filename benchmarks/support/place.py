"""A temporary HOME for Prompt flow, a certificate for 127.0.0.1 and a CA bundle that trusts it.

Writes into one temporary folder, removed at the end; nothing of the user's own HOME is touched.
"""

from __future__ import annotations

import compileall
import datetime as dt
import ipaddress
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import certifi
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).parents[2]
TUTORIAL_FLOW = ROOT / "benchmarks" / "tutorial_flow"
KEY = "benchmark-key-0123456789"
CONNECTION = "phi3_connection"
# What README advises: no usage reports, and no trace service that stays behind.
_SETTINGS = "telemetry:\n  enabled: false\ntrace:\n  destination: none\n"
_CONNECT = """
import sys
from phi3_training.flow.store import write_connection
write_connection(sys.argv[1], sys.argv[2], sys.stdin.read())
"""


@dataclass(frozen=True)
class Place:
    """Where a benchmark works, and the environment of what it starts."""

    folder: Path
    certificate: Path
    bundle: Path

    @property
    def env(self) -> dict[str, str]:
        """Our sources first, an own HOME, and the certificate trusted beside the usual ones."""
        kept = {name: os.environ[name] for name in ("LANG", "TMPDIR") if name in os.environ}
        return {
            **kept,
            "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]),
            "HOME": str(self.folder),
            "PF_HOME_DIRECTORY": str(self.folder / ".promptflow"),
            "PYTHONPATH": os.pathsep.join([str(ROOT / "tools"), str(ROOT / "training")]),
            "REQUESTS_CA_BUNDLE": str(self.bundle),
            "NO_PROXY": "*",
        }

    def connect(self, url: str) -> None:
        """Store the connection that both flows name."""
        subprocess.run(
            [sys.executable, "-c", _CONNECT, CONNECTION, url],
            env=self.env,
            cwd=self.folder,
            input=KEY,
            text=True,
            check=True,
            capture_output=True,
        )

    def copy_flows(self) -> tuple[Path, Path]:
        """The tutorial's flow and ours, laid out as in the repository."""
        ignore = shutil.ignore_patterns("__pycache__", ".promptflow")
        for part in ("flows/phi3_chat", "tools/phi3_tool", "benchmarks/tutorial_flow"):
            shutil.copytree(
                ROOT / part, self.folder / "clone" / part, ignore=ignore, dirs_exist_ok=True
            )
        # As in a clone that was used once: the flow carries its tool's source along, compiled.
        compileall.compile_dir(str(self.folder / "clone/tools"), quiet=1)
        return (
            self.folder / "clone/benchmarks/tutorial_flow",
            self.folder / "clone/flows/phi3_chat",
        )


def machine() -> str:
    """One line on what was measured on."""
    load = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{os.cpu_count()} cores, load {load} before, Python {sys.version.split()[0]}"


@contextmanager
def place() -> Iterator[Place]:
    """An isolated place to measure in, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="phi3-bench-") as name:
        folder = Path(name)
        (folder / ".promptflow").mkdir()
        (folder / ".promptflow" / "pf.yaml").write_text(_SETTINGS, encoding="utf-8")
        certificate, public = _certificate()
        (folder / "endpoint.pem").write_bytes(certificate)
        # As large as in real life: loading the usual certificates is part of what a call costs.
        bundle = Path(certifi.where()).read_bytes() + b"\n" + public
        (folder / "bundle.pem").write_bytes(bundle)
        yield Place(folder, folder / "endpoint.pem", folder / "bundle.pem")


def _certificate() -> tuple[bytes, bytes]:
    """A self-signed certificate for this machine: with its key, and without."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.timezone.utc)
    here = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(here, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    public = built.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return private + public, public
