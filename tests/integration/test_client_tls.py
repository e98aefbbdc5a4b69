"""The client over https: trust, the deadline, and pooling, against a certificate made here."""

from __future__ import annotations

import datetime as dt
import ipaddress
import ssl
from pathlib import Path

import pytest
from tests.integration.stub_endpoint import (
    KEY,
    OPENAI,
    QUESTION,
    SSE,
    Reply,
    StubEndpoint,
    chunk,
    failure,
    within,
)

from phi3_tool import ConnectionSettings, EndpointTimeoutError, Phi3Client, ServiceError

pytest.importorskip("cryptography", reason="needed to make a certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One PEM file with a self-signed certificate for 127.0.0.1 and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "127.0.0.1")])
    now = dt.datetime.now(dt.timezone.utc)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - dt.timedelta(days=1))
        .not_valid_after(now + dt.timedelta(days=1))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
        + built.public_bytes(serialization.Encoding.PEM)
    )
    return path


@pytest.fixture
def tls(certificate: Path) -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate)
    return context


@pytest.fixture
def trusted(certificate: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))


def test_an_unknown_certificate_is_refused_at_once(tls: ssl.SSLContext) -> None:
    with StubEndpoint(tls=tls) as stub, Phi3Client(stub.url(), KEY) as client, within(1):
        error = failure(client)
        assert type(error) is ServiceError
        assert error.attempts == 1
        assert "REQUESTS_CA_BUNDLE" in str(error)
        assert stub.seen == []


def test_the_doctor_names_a_certificate_that_is_not_trusted(tls: ssl.SSLContext) -> None:
    from phi3_training.doctor import State
    from phi3_training.doctor.endpoint import ask, endpoint, token_finding

    with StubEndpoint(tls=tls) as stub:
        settings = ConnectionSettings.from_connection({"endpoint": stub.url(), "key": KEY})
        health = next(endpoint(settings, 10.0, 500.0))
        token = token_finding(ask(settings, 10.0))
        assert stub.seen == []
    assert health.check == "health"
    for found in (health, token):
        assert found.state is State.FAULT
        assert "certificate" in found.said.lower()
        assert "REQUESTS_CA_BUNDLE" in found.fix
        assert KEY not in found.said + found.fix


@pytest.mark.usefixtures("trusted")
def test_connections_are_used_again(tls: ssl.SSLContext) -> None:
    with StubEndpoint(tls=tls) as stub, Phi3Client(stub.url(), KEY) as client:
        assert [client.chat(QUESTION).text for _ in range(5)] == ["ok"] * 5
        assert stub.connections == 1
        assert stub.seen[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.usefixtures("trusted")
@pytest.mark.parametrize("reply", [Reply(delay=30), Reply(body=b" " * 5000, drip=0.05)])
def test_the_deadline_holds(tls: ssl.SSLContext, reply: Reply) -> None:
    with (
        StubEndpoint(reply, tls=tls) as stub,
        Phi3Client(stub.url(), KEY, deadline=0.6) as client,
        within(1.2),
    ):
        assert type(failure(client)) is EndpointTimeoutError


@pytest.mark.usefixtures("trusted")
def test_pieces_arrive_as_they_are_sent(tls: ssl.SSLContext) -> None:
    gaps = ((0, chunk("a")), (0.5, chunk("b")), (0, b"data: [DONE]\n\n"))
    with (
        StubEndpoint(Reply(headers=SSE, chunks=gaps), tls=tls) as stub,
        Phi3Client(stub.url(OPENAI), KEY) as client,
    ):
        stream = client.stream(QUESTION)
        with within(0.4):
            assert next(stream) == "a"
        assert list(stream) == ["b"]
