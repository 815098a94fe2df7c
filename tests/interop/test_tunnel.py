"""What CONNECT gives: a blind tunnel to a stranger, our own leaf for a routed host."""

import http.client
import socket
import ssl

from world import SERVICE


def connect(running, request):
    host, port = running.address.rsplit(":", 1)
    stream = socket.create_connection((host, int(port)), timeout=30)
    stream.sendall(request)
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        # Byte by byte: what follows the head belongs to TLS.
        byte = stream.recv(1)
        assert byte, f"the proxy hung up after {head!r}"
        head += byte
    return stream, head.split(b"\r\n")[0]


def test_an_unmatched_host_is_a_blind_tunnel_with_the_origins_own_certificate(sidebearer, servers):
    """TLS-001"""
    stream, status = connect(sidebearer().run(), b"CONNECT stranger.test:443 HTTP/1.1\r\nHost: stranger.test:443\r\n\r\n")
    assert status.split()[1] == b"200"
    # Trusting the stranger's certificate and no other: one of ours would fail the handshake.
    trust = ssl.create_default_context(cafile=servers.certificates.stranger_cert)
    with trust.wrap_socket(stream, server_hostname="stranger.test") as tls:
        origin = ssl.PEM_cert_to_DER_cert(servers.certificates.stranger_cert.read_text())
        assert tls.getpeercert(binary_form=True) == origin
        sent = bytes(range(256)) * 4096
        received = exchange(tls, sent)
    assert received == sent


def exchange(tls, sent):
    received = bytearray()
    for start in range(0, len(sent), 65536):
        tls.sendall(sent[start:start + 65536])
        while len(received) < min(start + 65536, len(sent)):
            received += tls.recv(65536)
    return bytes(received)


def test_connect_by_http_1_0_without_a_host_header_is_accepted(sidebearer, servers):
    """CLIENTS.md 4.1: what Python's http.client sends before 3.12."""
    running = sidebearer().run()
    stream, status = connect(running, b"CONNECT api.test:443 HTTP/1.0\r\n\r\n")
    assert status.split()[1] == b"200"
    with running.trust().wrap_socket(stream, server_hostname="api.test") as tls:
        tls.sendall(b"GET /echo HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n")
        answer = b"".join(iter(lambda: tls.recv(65536), b""))
    assert answer.startswith(b"HTTP/1.1 200 ")
    assert b'"authorizations":1' in answer


def test_pythons_http_client_gets_through(sidebearer):
    running = sidebearer().run()
    host, port = running.address.rsplit(":", 1)
    connection = http.client.HTTPSConnection(host, int(port), context=running.trust(), timeout=30)
    connection.set_tunnel("api.test", 443)
    connection.request("GET", "/echo")
    answer = connection.getresponse()
    assert (answer.status, b'"authorizations":1' in answer.read()) == (200, True)
    connection.close()


def test_a_denied_path_reaches_no_server(sidebearer, servers):
    routes = [{"host": "api.test", "paths": ["/v1/**"], "provider": "service"}, {"host": "api.test", "deny": True}]
    running = sidebearer(providers={"service": SERVICE}, routes=routes).run()
    assert running.get("/v1/echo").status_code == 200
    assert running.get("/v2/echo").status_code == 403
    assert servers.report()["api"]["requests"] == 1
