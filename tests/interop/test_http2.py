"""HTTP/2 frame by frame, between an agent and an API that are both python-h2: what either may do, the other sees."""

import h2.events
import pytest
from h2.errors import ErrorCodes
from h2.settings import SettingCodes

from raw import Answer, Peer, Server, tunnel
from world import wait_for, wait_until_still

BODY = bytes(range(256)) * 256


@pytest.fixture
def between(sidebearer, servers):
    """Starts an API that does as `react` says with each event of a connection, and gives an agent's end of HTTP/2."""
    started = []

    def start(react, settings=None, agent_settings=None):
        def serve(stream, number):
            peer = Peer(stream, client=False, settings=settings)
            peer.number = number
            for event in peer.events():
                react(peer, event)

        server = Server(servers.certificates, serve, alpn="h2")
        started.append(server)
        running = sidebearer(ports={"api": server.port}).run()
        stream = tunnel(running, alpn="h2")
        assert stream.selected_alpn_protocol() == "h2"
        agent = Peer(stream, client=True, settings=agent_settings)
        agent.running, agent.server = running, server
        started.append(stream)
        return agent

    yield start
    for one in reversed(started):
        one.close()


def answering(status, *fields, body=b"", trailers=(), interim=()):
    """An API that answers every request in the same way, once it has its end."""

    def react(peer, event):
        if not isinstance(event, h2.events.StreamEnded):
            if isinstance(event, h2.events.DataReceived):
                peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            return
        for early in interim:
            peer.h2.send_headers(event.stream_id, [(":status", str(early)), ("x-early", "1")])
        bare = not body and not trailers
        peer.h2.send_headers(event.stream_id, [(":status", str(status)), *fields], end_stream=bare)
        if body:
            peer.send(event.stream_id, body, end=not trailers)
        if trailers:
            peer.h2.send_headers(event.stream_id, list(trailers), end_stream=True)

    return react


def echo(peer, event):
    """Sends every frame of a body back as it comes, and the trailers behind it."""
    match event:
        case h2.events.RequestReceived():
            peer.h2.send_headers(event.stream_id, [(":status", "200")])
        case h2.events.DataReceived():
            peer.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            if event.data:
                peer.send(event.stream_id, event.data, end=False)
        case h2.events.TrailersReceived():
            peer.h2.send_headers(event.stream_id, event.headers, end_stream=True)
            peer.ended = {event.stream_id}
        case h2.events.StreamEnded():
            if event.stream_id not in getattr(peer, "ended", ()):
                peer.h2.end_stream(event.stream_id)


@pytest.mark.parametrize("early", [[103], [100, 103, 103]])
def test_interim_answers_do_not_hide_the_one_behind_them(between, early):
    """SEC-069"""
    agent = between(answering(200, body=b"whole", interim=early))
    answer = agent.answer(agent.request())
    assert (answer.status, answer.body, answer.ended) == (200, b"whole", True)
    assert set(answer.interim) <= {"100", "103"}


@pytest.mark.parametrize(
    "method, status, fields",
    [
        ("HEAD", 200, [("content-length", "12345"), ("etag", '"a"')]),
        ("GET", 204, [("etag", '"b"')]),
        ("GET", 304, [("etag", '"c"'), ("content-length", "12345")]),
        ("HEAD", 404, [("content-length", "17")]),
    ],
)
def test_an_answer_that_has_no_body_gets_none_and_keeps_its_fields(between, method, status, fields):
    """SEC-069"""
    agent = between(answering(status, *fields))
    answer = agent.answer(agent.request(method))
    assert (answer.status, answer.body, answer.reset) == (status, b"", None)
    assert {name: answer.fields.get(name) for name, _ in fields} == dict(fields)
    # The connection is as good as before.
    assert agent.answer(agent.request(method)).status == status


def test_a_part_of_a_document_is_asked_for_and_delivered_as_such(between):
    asked = []

    def react(peer, event):
        if isinstance(event, h2.events.RequestReceived):
            asked.append(dict(event.headers)["range"])
        answering(206, ("content-range", "bytes 2-4/10"), ("content-length", "3"), body=b"cde")(peer, event)

    agent = between(react)
    answer = agent.answer(agent.request("GET", "/", ("range", "bytes=2-4"), ("if-range", '"x"')))
    assert asked == ["bytes=2-4"]
    assert (answer.status, answer.fields["content-range"], answer.fields["content-length"]) == (206, "bytes 2-4/10", "3")
    assert answer.body == b"cde"


def test_trailers_pass_both_ways(between):
    agent = between(echo)
    stream = agent.request("POST", "/", ("te", "trailers"), end=False)
    agent.send(stream, BODY, end=False)
    agent.h2.send_headers(stream, [("x-checksum", "abc"), ("x-count", "2")], end_stream=True)
    answer = agent.answer(stream)
    assert answer.body == BODY
    assert answer.trailers == {"x-checksum": "abc", "x-count": "2"}


def test_bodies_in_frames_of_one_byte_and_padded_ones_arrive_whole(between):
    agent = between(echo)
    tiny = agent.request("POST", "/tiny", end=False)
    agent.send(tiny, BODY[:3000], step=1)
    padded = agent.request("POST", "/padded", end=False)
    for place in range(0, 3000, 100):
        agent.h2.send_data(padded, BODY[place:place + 100], pad_length=place % 256)
        agent.flush()
    agent.h2.end_stream(padded)
    answers = agent.answer(tiny, padded)
    assert [answer.body for answer in answers] == [BODY[:3000]] * 2


def test_an_api_may_pad_its_frames_and_an_agent_may_say_what_matters_more(between):
    def react(peer, event):
        if isinstance(event, h2.events.StreamEnded):
            peer.h2.send_headers(event.stream_id, [(":status", "200")])
            for place in range(0, 1000, 10):
                peer.h2.send_data(event.stream_id, BODY[place:place + 10], pad_length=place % 200)
            peer.h2.end_stream(event.stream_id)

    agent = between(react)
    streams = [agent.request() for _ in range(3)]
    for stream in streams:
        agent.h2.prioritize(stream, weight=200, depends_on=0, exclusive=True)
        # A stream that is never opened, as some clients order their groups.
        agent.h2.prioritize(stream + 100, weight=1, depends_on=stream)
    assert [answer.body for answer in agent.answer(*streams)] == [BODY[:1000]] * 3


@pytest.mark.parametrize("window", [1, 7])
def test_windows_of_a_few_bytes_slow_down_but_lose_nothing(between, window):
    tiny = {SettingCodes.INITIAL_WINDOW_SIZE: window}
    agent = between(echo, settings=tiny, agent_settings=tiny)
    stream = agent.request("POST", "/", end=False)
    agent.send(stream, BODY[:500])
    answer = agent.answer(stream)
    assert answer.body == BODY[:500], answer


def test_long_header_fields_are_continued_in_more_frames(between):
    long = [(f"x-long-{number}", "v" * 7000) for number in range(8)]
    seen = {}

    def react(peer, event):
        if isinstance(event, h2.events.RequestReceived):
            seen.update(event.headers)
        answering(200, *long)(peer, event)

    settings = {SettingCodes.MAX_HEADER_LIST_SIZE: 262144}
    agent = between(react, settings=settings, agent_settings=settings)
    answer = agent.answer(agent.request("GET", "/", *long))
    assert {name: answer.fields[name] for name, _ in long} == dict(long)
    assert {name: seen[name] for name, _ in long} == dict(long)


def test_an_api_that_breaks_off_one_answer_leaves_the_others_alone(between):
    streams = {}

    def react(peer, event):
        if isinstance(event, h2.events.RequestReceived):
            streams[dict(event.headers)[":path"]] = event.stream_id
            peer.h2.send_headers(event.stream_id, [(":status", "200")])
            peer.send(event.stream_id, b"begun", end=False)
            if len(streams) == 3:
                peer.h2.reset_stream(streams["/broken"], ErrorCodes.INTERNAL_ERROR)
                for path in ("/before", "/behind"):
                    peer.send(streams[path], BODY)

    agent = between(react)
    before, broken, behind = agent.answer(*(agent.request("GET", path) for path in ("/before", "/broken", "/behind")))
    assert before.body == behind.body == b"begun" + BODY
    assert broken.reset is not None


def test_an_agent_that_breaks_off_one_request_leaves_the_others_alone(between):
    resets = []
    paths = {}

    def react(peer, event):
        match event:
            case h2.events.RequestReceived():
                paths[event.stream_id] = dict(event.headers)[":path"]
                peer.h2.send_headers(event.stream_id, [(":status", "200")])
                peer.send(event.stream_id, b"begun", end=False)
            case h2.events.StreamReset():
                resets.append((paths[event.stream_id], event.error_code))
                for stream, path in paths.items():
                    if path != "/broken":
                        peer.send(stream, BODY)

    agent = between(react)
    streams = [agent.request("GET", path) for path in ("/before", "/broken", "/behind")]
    begun = set()
    for event in agent.events():
        if isinstance(event, h2.events.DataReceived):
            begun.add(event.stream_id)
        if begun == set(streams):
            break
    agent.h2.reset_stream(streams[1], ErrorCodes.CANCEL)
    whole = agent.answer(streams[0], streams[2])
    assert [answer.body for answer in whole] == [BODY, BODY]
    assert resets == [("/broken", ErrorCodes.CANCEL)]


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_stream_that_the_api_refuses_unread_is_sent_again(between, method):
    """RTY-030"""
    asked = []

    def react(peer, event):
        if isinstance(event, h2.events.StreamEnded):
            asked.append(event.stream_id)
            if len(asked) == 1:
                peer.h2.reset_stream(event.stream_id, ErrorCodes.REFUSED_STREAM)
            else:
                answering(200, body=b"second")(peer, event)

    agent = between(react)
    stream = agent.request(method, "/", end=False)
    agent.send(stream, b"body" if method == "POST" else b"")
    answer = agent.answer(stream)
    assert (answer.status, answer.body, len(asked)) == (200, b"second", 2)


def test_a_connection_that_goes_away_finishes_what_it_took_and_the_rest_goes_elsewhere(between):
    """RTY-030"""
    served = []

    def react(peer, event):
        if isinstance(event, h2.events.RequestReceived):
            path = dict(event.headers)[":path"]
            if peer.number == 0 and path == "/taken":
                peer.taken = event.stream_id
                peer.h2.send_headers(event.stream_id, [(":status", "200")])
            elif peer.number == 0:
                # Not closed through python-h2, which would take nothing more on this connection: the answer is under way.
                peer.stream.sendall(peer.h2.data_to_send() + goaway(last=peer.taken))
                peer.send(peer.taken, BODY)
                served.append((peer.number, "/taken"))
            else:
                served.append((peer.number, path))
        if peer.number > 0:
            answering(200, body=b"elsewhere")(peer, event)

    agent = between(react)
    taken = agent.request("GET", "/taken")
    agent.wait_for(h2.events.ResponseReceived, taken)
    late = agent.request("POST", "/late", end=False)
    agent.send(late, b"body")
    finished, moved = agent.answer(taken, late)
    assert finished.body == BODY
    assert (moved.status, moved.body) == (200, b"elsewhere")
    assert sorted(served) == [(0, "/taken"), (1, "/late")]


def goaway(last):
    """GOAWAY with NO_ERROR (RFC 9113 section 6.8)."""
    return bytes([0, 0, 8, 7, 0, 0, 0, 0, 0]) + last.to_bytes(4) + bytes(4)


def test_readers_that_stall_do_not_stop_whoever_shares_their_connection_to_the_api(between):
    """Each of them fills its stream's window; the connection's must have room for the others all the same."""
    sent = {}

    def react(peer, event):
        if isinstance(event, h2.events.RequestReceived):
            peer.h2.send_headers(event.stream_id, [(":status", "200")])
            sent[event.stream_id] = 0
        for stream, length in sent.items():
            while length < 64 << 20 and (room := peer.h2.local_flow_control_window(stream)):
                length += min(room, 16384)
                peer.h2.send_data(stream, bytes(min(room, 16384)))
                peer.flush()
            sent[stream] = length

    agent = between(react)
    stalled = []
    for number in range(40):
        stalled.append(tunnel(agent.running, buffer=4096))
        stalled[-1].sendall(b"GET /stalled HTTP/1.1\r\nHost: api.test\r\n\r\n")
        wait_for(lambda: len(sent) == number + 1, "the request to arrive")
    filled = wait_until_still(lambda: sum(sent.values()), 0.3)
    assert len(agent.server.connections) == 1
    stream = agent.request()
    answer = Answer()
    for event in agent.events():
        answer.took(event, agent.h2)
        if len(answer.body) > 1 << 20:
            break
    assert sum(sent.values()) > filled
    for one in stalled:
        one.close()


def test_uploads_that_stall_do_not_stop_an_agents_others(between):
    """Each of them fills its stream's window towards the sidecar, since the API takes nothing more of it."""

    def react(peer, event):
        match event:
            case h2.events.RemoteSettingsChanged():
                # What stalls here are single streams, and not the connection to the API.
                peer.h2.increment_flow_control_window(1 << 30)
            case h2.events.RequestReceived() if dict(event.headers)[":path"] == "/live":
                peer.live = event.stream_id
                echo(peer, event)
            case h2.events.DataReceived() | h2.events.StreamEnded() if event.stream_id == getattr(peer, "live", None):
                echo(peer, event)

    agent = between(react)
    # With them comes the size of the windows.
    agent.wait_for(h2.events.SettingsAcknowledged)
    filled = 0
    for _ in range(40):
        stream = agent.request("POST", "/stalled", end=False)
        while room := agent.h2.local_flow_control_window(stream):
            agent.send(stream, bytes(min(room, 16384)), end=False)
            filled += min(room, 16384)
    assert filled > 32 << 20
    live = agent.request("POST", "/live", end=False)
    agent.send(live, BODY)
    assert agent.answer(live).body == BODY
