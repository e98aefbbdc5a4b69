"""The private certificate authority of a rehearsal: makes itself once, then leaves on the fly.

Writes ca.pem and ca.key (mode 0600) in the rehearsal's folder; leaf keys lie in a private
temporary folder only while they are loaded.
"""

from __future__ import annotations

import datetime as dt
import os
import ssl
import tempfile
import threading
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_VALID = dt.timedelta(days=30)
_PEM = serialization.Encoding.PEM
_PLAIN = serialization.NoEncryption()


class Authority:
    """Signs a certificate for any host name and hands out TLS contexts that present it."""

    def __init__(self, folder: Path) -> None:
        self.ca_file = folder / "ca.pem"
        key_file = folder / "ca.key"
        if not (self.ca_file.is_file() and key_file.is_file() and _still_valid(self.ca_file)):
            _make_authority(self.ca_file, key_file)
        self._certificate = x509.load_pem_x509_certificate(self.ca_file.read_bytes())
        key = serialization.load_pem_private_key(key_file.read_bytes(), password=None)
        assert isinstance(key, ec.EllipticCurvePrivateKey)  # noqa: S101 - we wrote it
        self._key = key
        self._leaf_key = ec.generate_private_key(ec.SECP256R1())
        self._contexts: dict[str, ssl.SSLContext] = {}
        self._lock = threading.Lock()

    def context(self, host: str) -> ssl.SSLContext:
        """The server side of TLS for `host`."""
        with self._lock:
            if host not in self._contexts:
                self._contexts[host] = self._make_context(host)
            return self._contexts[host]

    def _make_context(self, host: str) -> ssl.SSLContext:
        leaf = (
            _builder(_name(host), self._certificate.subject, self._leaf_key.public_key())
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(host)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()),
                critical=False,
            )
            .sign(self._key, hashes.SHA256())
        )
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        # load_cert_chain reads files only.
        with tempfile.TemporaryDirectory(prefix="phi3-rehearsal-") as folder:
            both = Path(folder, "leaf.pem")
            _write_private(both, _pem(self._leaf_key) + leaf.public_bytes(_PEM))
            context.load_cert_chain(both)
        return context


def _make_authority(ca_file: Path, key_file: Path) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("phi3 rehearsal, not Azure")
    public = key.public_key()
    certificate = (
        _builder(name, name, public)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_signs_certificates(), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
        .sign(key, hashes.SHA256())
    )
    ca_file.parent.mkdir(parents=True, exist_ok=True)
    _write_private(key_file, _pem(key))
    ca_file.write_bytes(certificate.public_bytes(_PEM))


def _builder(
    subject: x509.Name, issuer: x509.Name, public: ec.EllipticCurvePublicKey
) -> x509.CertificateBuilder:
    now = dt.datetime.now(dt.timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + _VALID)
    )


def _signs_certificates() -> x509.KeyUsage:
    others = ["digital_signature", "content_commitment", "key_encipherment", "data_encipherment"]
    others += ["key_agreement", "encipher_only", "decipher_only"]
    return x509.KeyUsage(key_cert_sign=True, crl_sign=True, **dict.fromkeys(others, False))


def _name(text: str) -> x509.Name:
    # A common name holds 64 characters; the host itself is in the alternative names.
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(_PEM, serialization.PrivateFormat.PKCS8, _PLAIN)


def _write_private(path: Path, content: bytes) -> None:
    path.unlink(missing_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as stream:
        stream.write(content)


def _still_valid(ca_file: Path) -> bool:
    certificate = x509.load_pem_x509_certificate(ca_file.read_bytes())
    soon = dt.datetime.now(dt.timezone.utc) + dt.timedelta(days=2)
    return certificate.not_valid_after_utc > soon
