"""HTTP/1 byte by byte, between an agent and an API that use what the older protocol allows."""

import subprocess

import httpx
import pytest

from raw import Reader, Server, tunnel
from world import API, wait_for

BODY = bytes(range(256)) * 40
EITHER_VERSION = pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])


@pytest.fixture
def upstream(sidebearer, servers):
    """Starts an API whose connections are served as a test says, and a sidecar before it."""
    started = []

    def start(serve):
        server = Server(servers.certificates, serve)
        started.append(server)
        running = sidebearer(ports={"api": server.port}).run()
        running.server = server
        return running

    yield start
    for server in started:
        server.close()


def answers(*written, asked=None, cut_off=False):
    """Reads a request and writes what is given, request after request; hangs up after the last."""

    def serve(stream, _):
        reader = Reader(stream)
        for answer in written:
            first, fields = reader.head()
            body = reader.body(fields)
            if asked is not None:
                asked.append((first, fields, body))
            stream.sendall(answer)
        return cut_off

    return serve


def exchange(running, request, count=1):
    """What comes back when an agent writes these bytes in one piece."""
    with tunnel(running) as stream:
        stream.sendall(request)
        reader = Reader(stream)
        return [answer(reader) for _ in range(count)]


def answer(reader):
    first, fields = reader.head()
    return int(first.split()[1]), fields, reader.body(fields)


@EITHER_VERSION
def test_an_old_api_that_ends_its_answer_by_hanging_up_is_understood(upstream, http2):
    """SEC-071"""
    asked = []
    running = upstream(answers(b"HTTP/1.0 200 OK\r\nContent-Type: text/plain\r\n\r\n" + BODY, asked=asked))
    with running.client(http2=http2) as client:
        for _ in range(2):
            got = client.get(API)
            assert (got.status_code, got.content, got.http_version) == (200, BODY, "HTTP/2" if http2 else "HTTP/1.1")
    assert len(running.server.connections) == 2
    assert all(fields["authorization"].startswith("Bearer ") for _, fields, _ in asked)


@EITHER_VERSION
@pytest.mark.parametrize("head", [b"HTTP/1.1 200 OK\r\n\r\n", b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n"])
def test_an_answer_without_a_length_lasts_until_the_api_hangs_up(upstream, http2, head):
    with upstream(answers(head + BODY)).client(http2=http2) as client:
        assert client.get(API).content == BODY
        assert client.get(API).content == BODY


@EITHER_VERSION
@pytest.mark.parametrize("half", [
    b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n" + b"x" * 50,
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n32\r\n" + b"x" * 50 + b"\r\n",
    b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n64\r\n" + b"x" * 50,
    # Only TLS's good-bye tells the end of this one from a cut (RFC 9112 section 9.8).
    b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * 50,
], ids=["by its length", "between chunks", "inside a chunk", "by TLS"])
def test_an_answer_that_breaks_off_is_seen_to_break_off(upstream, http2, half):
    """H7"""
    with upstream(answers(half, cut_off=True)).client(http2=http2) as client, pytest.raises(httpx.RemoteProtocolError):
        client.get(API)


def test_an_api_that_answers_and_half_closes_before_it_has_read_everything_is_heard(upstream):
    def serve(stream, _):
        reader = Reader(stream)
        reader.head()
        stream.sendall(b"HTTP/1.1 413 Content Too Large\r\nContent-Length: 4\r\nConnection: close\r\n\r\nstop")
        reader.rest()

    with upstream(serve).client() as client:
        got = client.post(API, content=BODY * 100)
        assert (got.status_code, got.content) == (413, b"stop")


def test_an_agent_may_ask_before_it_is_answered(upstream):
    asked = []
    written = [b"HTTP/1.1 200 OK\r\nContent-Length: 1\r\n\r\n%d" % number for number in range(10)]
    running = upstream(answers(*written, asked=asked))
    pipelined = b"".join(
        b"POST /%d HTTP/1.1\r\nHost: api.test\r\nContent-Length: 2\r\n\r\n%d!" % (number, number) for number in range(10)
    )
    got = exchange(running, pipelined, count=10)
    assert [body for _, _, body in got] == [b"%d" % number for number in range(10)]
    assert [(first.split()[1], body) for first, _, body in asked] == [(f"/{number}", b"%d!" % number) for number in range(10)]


def test_a_hundred_fields_pass_both_ways_in_their_order(upstream):
    asked = []
    fields = "".join(f"X-Number-{number}: {'v' * number}\r\n" for number in range(100))
    twice = "Set-Cookie: a=1\r\nSet-Cookie: b=2\r\nSet-Cookie: a=3\r\n"
    running = upstream(answers(f"HTTP/1.1 200 OK\r\n{fields}{twice}Content-Length: 0\r\n\r\n".encode(), asked=asked))
    with tunnel(running) as stream:
        stream.sendall(f"GET / HTTP/1.1\r\nHost: api.test\r\n{fields}\r\n".encode())
        got = Reader(stream).until(b"\r\n\r\n").decode().lower()
    lines = got.split("\r\n")
    assert [line for line in lines if line.startswith("x-number")] == fields.lower().split("\r\n")[:-1]
    assert [line for line in lines if line.startswith("set-cookie")] == twice.lower().split("\r\n")[:-1]
    assert [name for name in asked[0][1] if name.startswith("x-number")] == [f"x-number-{number}" for number in range(100)]


def test_chunks_of_any_size_with_extensions_arrive_whole_in_both_directions(upstream):
    """SEC-055"""
    chunked = b"".join(b'1;name="a value";x=1\r\n%c\r\n' % byte for byte in BODY[:300]) + b"0;last\r\n\r\n"
    asked = []
    running = upstream(answers(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked, asked=asked))
    post = b"POST / HTTP/1.1\r\nHost: api.test\r\nTransfer-Encoding: chunked\r\n\r\n" + chunked
    [(status, _, body)] = exchange(running, post)
    assert (status, body, asked[0][2]) == (200, BODY[:300], BODY[:300])


def test_trailers_pass_both_ways(upstream):
    seen = []

    def serve(stream, _):
        reader = Reader(stream)
        reader.head()
        seen.append(reader.chunked())
        stream.sendall(
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum, X-Late\r\n\r\n"
            b"3\r\nabc\r\n0\r\nX-Sum: 7\r\nX-Late: yes\r\n\r\n"
        )

    with tunnel(upstream(serve)) as stream:
        stream.sendall(
            b"POST / HTTP/1.1\r\nHost: api.test\r\nTE: trailers\r\nConnection: TE\r\nTrailer: X-Check\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n2\r\nhi\r\n0\r\nX-Check: 1\r\n\r\n"
        )
        reader = Reader(stream)
        _, fields = reader.head()
        assert reader.chunked() == (b"abc", ["x-sum: 7", "x-late: yes"])
    assert seen == [(b"hi", ["x-check: 1"])]


@pytest.mark.parametrize(
    "method, head",
    [
        ("HEAD", "200 OK\r\nContent-Length: 12345\r\nETag: \"a\""),
        ("GET", "204 No Content\r\nETag: \"b\""),
        ("GET", "304 Not Modified\r\nETag: \"c\""),
    ],
)
def test_an_answer_that_has_no_body_gets_none_and_keeps_its_fields(upstream, method, head):
    """SEC-069"""
    written = f"HTTP/1.1 {head}\r\n\r\n".encode()
    running = upstream(answers(written, written))
    with tunnel(running) as stream:
        for _ in range(2):
            stream.sendall(f"{method} / HTTP/1.1\r\nHost: api.test\r\n\r\n".encode())
            reader = Reader(stream)
            first, fields = reader.head()
            assert reader.bytes == b""
            status, *expected = head.lower().split("\r\n")
            assert first.split()[1] == status.split()[0]
            for line in expected:
                name, value = line.split(": ")
                assert fields.get(name) == value


def test_an_agent_of_http_1_0_gets_its_answer_to_the_end_and_a_hang_up(upstream):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n2\r\nde\r\n0\r\n\r\n"
    with tunnel(upstream(answers(chunked))) as stream:
        stream.sendall(b"GET / HTTP/1.0\r\nHost: api.test\r\n\r\n")
        reader = Reader(stream)
        first, fields = reader.head()
        assert (first.split()[1], "transfer-encoding" in fields) == ("200", False)
        assert reader.rest() == b"abcde"


def test_an_agent_that_wants_its_connection_closed_does_not_close_the_apis(upstream):
    written = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
    asked = []
    running = upstream(answers(written, written, asked=asked))
    for _ in range(2):
        with tunnel(running) as stream:
            stream.sendall(b"GET / HTTP/1.1\r\nHost: api.test\r\nConnection: close\r\n\r\n")
            reader = Reader(stream)
            _, fields = reader.head()
            assert (fields["connection"], reader.rest()) == ("close", b"ok")
    assert len(running.server.connections) == 1
    assert ["connection" in fields for _, fields, _ in asked] == [False, False]


def test_curl_is_told_to_continue_when_the_api_wants_the_body(sidebearer, servers):
    """RTY-012"""
    agent = sidebearer()
    body = agent.folder / "body"
    body.write_bytes(BODY * 500)
    wish = ["--http1.1", "--expect100-timeout", "60", "-H", "Expect: 100-continue"]
    done = agent.exec("curl", "-fsSv", *wish, "-T", body, f"{API}/echo")
    assert "< HTTP/1.1 100 Continue" in done.stderr
    assert "Done waiting for 100-continue" not in done.stderr
    assert f'"bodyLength":{len(BODY) * 500}' in done.stdout


UPGRADE = (
    b"GET /chat HTTP/1.1\r\nHost: api.test\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
SWITCHING = (
    b"HTTP/1.1 101 Switching Protocols\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n\r\n"
)


def test_bytes_right_behind_both_heads_of_a_handshake_arrive(upstream):
    """SEC-067, C10"""

    def serve(stream, _):
        reader = Reader(stream)
        reader.head()
        stream.sendall(SWITCHING + b"from the api")
        stream.sendall(b", heard: " + reader.exactly(len(b"from the agent")))
        stream.sendall(reader.rest())

    with tunnel(upstream(serve)) as stream:
        stream.sendall(UPGRADE + b"from the agent")
        reader = Reader(stream)
        first, fields = reader.head()
        assert (first.split()[1], fields["sec-websocket-accept"]) == ("101", "s3pPLMBiTxaQ9kYGzzhZRbK+xOo=")
        assert reader.exactly(35) == b"from the api, heard: from the agent"


def test_whoever_ends_an_upgraded_connection_the_other_side_sees_it_end(upstream):
    ended = []

    def serve(stream, number):
        reader = Reader(stream)
        reader.head()
        stream.sendall(SWITCHING + b"bye")
        if number == 0:
            return
        ended.append(reader.rest())

    running = upstream(serve)
    with tunnel(running) as stream:
        stream.sendall(UPGRADE)
        reader = Reader(stream)
        reader.head()
        assert reader.rest() == b"bye"
    with tunnel(running) as stream:
        stream.sendall(UPGRADE)
        Reader(stream).head()
        stream.sendall(b"and good-bye")
    wait_for(lambda: ended == [b"and good-bye"], "the API to see the end")
