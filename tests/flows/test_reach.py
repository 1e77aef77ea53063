"""Servers are reached as the clients that will use them reach them: through proxies, TLS and headers, or past them."""

import datetime
import os
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import psutil
import pytest

from flows import reach, servers
from flows.team.state import MLFLOW, Running, Team
from flows.team.status import status
from registry.home import Home
from steps.frame import UserError


class Answers(BaseHTTPRequestHandler):
    """A proxy, or a server: answers whatever it is asked as it stands."""

    code = 200
    wanted: Mapping[str, str] = {}

    def do_GET(self) -> None:
        known = all(self.headers.get(name) == value for name, value in self.wanted.items())
        self.send_response(self.code if known else 403)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None:
        pass


def answering(
    code: int, port: int = 0, *, pem: Path | None = None, wanted: Mapping[str, str] | None = None
) -> ThreadingHTTPServer:
    handler = type("Answering", (Answers,), {"code": code, "wanted": wanted or {}})
    server = ThreadingHTTPServer(("127.0.0.1", port), handler)
    if pem:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(pem)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    return server


def away(server: ThreadingHTTPServer) -> None:
    server.shutdown()
    server.server_close()


@contextmanager
def saying(banner: bytes) -> Iterator[int]:
    """A port at which something answers that speaks no HTTP."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def talk() -> None:
            while True:
                try:
                    caller, _ = listening.accept()
                except OSError:
                    return
                with caller:
                    caller.sendall(banner)
                    caller.recv(4096)

        threading.Thread(target=talk, daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """What a command tells its children by its environment stays within the test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def proxied(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A proxy for everything, which reaches nothing on this machine."""
    proxy = answering(403)
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.setenv(name, f"http://127.0.0.1:{proxy.server_port}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "intranet")
    yield
    away(proxy)


@pytest.fixture
def pem(tmp_path: Path) -> Path:
    """A key and its certificate that nobody signed, for `localhost`."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    made = x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number(), now, now.replace(2099))
    made = made.add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "both.pem").write_bytes(
        private + made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
    )
    return tmp_path / "both.pem"


def test_a_prefect_server_is_asked_with_the_certificates_and_headers_of_prefects_settings(
    pem: Path, home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.settings import (
        PREFECT_API_SSL_CERT_FILE,
        PREFECT_API_TLS_INSECURE_SKIP_VERIFY,
        PREFECT_CLIENT_CUSTOM_HEADERS,
        temporary_settings,
    )

    server = answering(200, pem=pem, wanted={"X-Access": "k"})
    url = f"https://localhost:{server.server_port}/api"
    monkeypatch.setenv("PREFECT_API_URL", url)
    headers: dict[Any, Any] = {PREFECT_CLIENT_CUSTOM_HEADERS: {"X-Access": "k"}}
    either: list[dict[Any, Any]] = [{PREFECT_API_TLS_INSECURE_SKIP_VERIFY: True}, {PREFECT_API_SSL_CERT_FILE: str(pem)}]
    for trusting in either:
        with temporary_settings({**headers, **trusting}), servers.prefect_api(home) as (found, _):
            assert found == url
        with temporary_settings(trusting):
            assert "403" in str(reach.refusal(url))
    with temporary_settings(headers):
        assert "certificate" in str(reach.refusal(url)).lower()
        with reach.asking(url) as client:
            assert not reach.is_absent(client), "somebody is there"
    away(server)


def test_what_is_no_prefect_server_is_refused_in_one_sentence(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    with saying(b"SSH-2.0-OpenSSH_9.2\r\n") as port:
        for url in (
            f"http://127.0.0.1:{port}/api",
            "http://127.0.0.1:42x0/api",
            "http://a b/api",
            "127.0.0.1:4200/api",
        ):
            monkeypatch.setenv("PREFECT_API_URL", url)
            with pytest.raises(UserError, match=r"no Prefect server answers there \(.+\); start it") as refused:
                servers.prefect_api(home).__enter__()
            assert str(refused.value).startswith(f"PREFECT_API_URL={url}: ")
            assert not reach.answers(f"{url}/health")


def test_a_server_behind_a_proxy_is_there_while_the_proxy_reaches_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers, "_ABSENCE", 0.2)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    lost = threading.Event()
    for code in (200, 401, 502):
        proxy = answering(code)
        monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{proxy.server_port}")
        with servers.watched("http://prefect.corp.internal:4200/api", lost.set):
            assert lost.wait(20 if code == 502 else 1) == (code == 502)
        away(proxy)


@pytest.mark.usefixtures("proxied")
def test_a_server_of_our_own_is_reached_past_a_proxy(home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(servers.LocalServer, "start", lambda server: None)
    own = answering(200)
    url = f"http://127.0.0.1:{own.server_port}/api"
    assert "403" in str(reach.refusal(url))
    with servers.prefect_api(home):
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet,127.0.0.1"
        assert reach.refusal(url) is None
    away(own)


@pytest.mark.usefixtures("proxied")
def test_the_team_is_reached_past_a_proxy(home: Home, tmp_path: Path) -> None:
    own = answering(200)
    url = f"http://127.0.0.1:{own.server_port}"
    assert reach.answers(f"{url}/health")
    me = Running(pid=os.getpid(), created=psutil.Process().create_time(), url=url, log=tmp_path / "log")
    Team(root=tmp_path, services={MLFLOW: me}).write(home)
    assert status(home)["services"][MLFLOW]["up"]
    assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "intranet,127.0.0.1", "what it starts inherits it"
    away(own)


def test_a_server_of_others_on_loopback_may_be_away_and_one_of_our_own_that_has_ended_is_lost_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lost = threading.Event()
    asked = threading.Event()
    monkeypatch.setattr(servers, "is_absent", lambda client: reach.is_absent(client) and not asked.set())
    server = answering(200)
    url = f"http://127.0.0.1:{server.server_port}/api"
    with servers.watched(url, lost.set):
        away(server)
        assert asked.wait(20), "the tunnel is down"
        assert not lost.wait(1), "and may come back"
        server = answering(200, server.server_port)
    with servers.watched(url, lost.set, lambda: False):
        away(server)
        assert not lost.wait(1), "a server of our own is there for as long as its process is"
    with servers.watched(url, lost.set, lambda: True):
        assert lost.wait(20)
