"""gRPC through the sidecar: every kind of call, both ways' metadata, and a token that is refused in gRPC's own terms."""

import json
import threading

import grpc
import pytest

from grpc_api import GrpcApi
from world import CLIENTS, CONSENT, PYTHON, wait_for

METADATA = [("x-asked", "1"), ("x-asked-bin", bytes(range(256)))]


@pytest.fixture(scope="module")
def one_api(all_servers):
    api = GrpcApi(all_servers)
    yield api
    api.close()


@pytest.fixture
def api(one_api, servers):
    one_api.reset()
    yield one_api
    one_api.released.set()


@pytest.fixture
def channel(sidebearer, api):
    """Opens a channel through a sidecar, which is the default one unless said otherwise."""
    opened = []

    def open_channel(**settings):
        ports = {"api": api.port} | settings.pop("ports", {})
        agent = sidebearer(ports=ports, **settings)
        running = agent.run()
        roots = grpc.ssl_channel_credentials(agent.ca.read_bytes())
        channel = grpc.secure_channel("api.test:443", roots, options=[("grpc.http_proxy", f"http://{running.address}")])
        opened.append(channel)
        return channel

    yield open_channel
    for channel in opened:
        channel.close()


def unary(channel, method):
    return channel.unary_unary(f"/test.Api/{method}")


def attempts(api):
    return [(method, good) for method, _, good in api.calls]


def test_every_kind_of_call_passes(channel, api):
    open_channel = channel()
    assert unary(open_channel, "Echo")(b"", timeout=30) == b""
    assert open_channel.stream_unary("/test.Api/Collect")(iter([b"a", b"", b"bc"]), timeout=30) == b"abc"
    assert list(open_channel.unary_stream("/test.Api/Split")(bytes(range(200)), timeout=30)) == [bytes([n]) for n in range(200)]
    # grpcio takes no message beyond 4 MiB.
    long = bytes(range(256)) * 12_000
    assert unary(open_channel, "Echo")(long, timeout=30) == long
    assert open_channel.stream_unary("/test.Api/Collect")((long[:100_000] for _ in range(30)), timeout=30) == long[:100_000] * 30


def test_a_conversation_goes_back_and_forth_on_one_call(channel, api):
    turn = threading.Semaphore(0)
    said = []

    def agent():
        for number in range(50):
            yield f"word {number}".encode()
            # Not before the answer to the one before has come.
            turn.acquire(timeout=30)

    for answer in channel().stream_stream("/test.Api/Chat")(agent(), timeout=30):
        said.append(answer)
        turn.release()
    assert said == [f"word {number}".encode() for number in range(50)]


def test_metadata_passes_both_ways_before_and_behind_the_messages(channel):
    answer, call = unary(channel(), "Echo").with_call(b"x", metadata=METADATA, timeout=30)
    early, late = dict(call.initial_metadata()), dict(call.trailing_metadata())
    assert answer == b"x"
    assert {key: early[key] for key in ("x-early", "x-early-bin")} == {"x-early": "1", "x-early-bin": bytes(range(256))}
    assert {key: late[key] for key in ("x-late", "x-late-bin")} == {"x-late": "straße".encode().hex(), "x-late-bin": bytes(range(256))}


def test_a_failed_call_says_why(channel, api):
    with pytest.raises(grpc.RpcError) as failed:
        unary(channel(), "Fail")(b"", timeout=30)
    assert failed.value.code() == grpc.StatusCode.FAILED_PRECONDITION
    assert failed.value.details() == "100 % nötig"
    assert dict(failed.value.trailing_metadata())["x-why"] == "because"
    with pytest.raises(grpc.RpcError) as unknown:
        unary(channel(), "Nope")(b"", timeout=30)
    assert unknown.value.code() == grpc.StatusCode.UNIMPLEMENTED


def test_a_deadline_ends_the_call_at_both_ends_and_leaves_the_others_alone(channel, api):
    open_channel = channel()
    waiting = open_channel.unary_stream("/test.Api/Wait")(b"")
    assert next(waiting) == b"begun"
    with pytest.raises(grpc.RpcError) as late:
        unary(open_channel, "Hang")(b"", timeout=2)
    assert late.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED
    assert api.cancelled.wait(30)
    api.released.set()
    assert list(waiting) == [b"done"]


@pytest.mark.parametrize("method", ["Hang", "Wait"])
def test_a_call_that_is_cancelled_is_cancelled_at_the_api(channel, api, method):
    call = channel().unary_stream(f"/test.Api/{method}")(b"")
    wait_for(lambda: api.calls, "the call to arrive")
    call.cancel()
    assert call.code() == grpc.StatusCode.CANCELLED
    assert api.cancelled.wait(30)


def test_a_call_with_a_revoked_token_succeeds_and_is_made_twice(channel, api, servers):
    """RTY-026, C1"""
    open_channel = channel()
    assert unary(open_channel, "Echo")(b"before", timeout=30) == b"before"
    servers.tell("revoke")
    assert unary(open_channel, "Echo")(b"after", timeout=30) == b"after"
    assert attempts(api) == [("Echo", True), ("Echo", False), ("Echo", True)]
    assert servers.granted("client_credentials") == 2


def test_what_was_said_before_a_conversation_was_refused_is_said_again(channel, api, servers):
    """RTY-026, C7"""
    open_channel = channel()
    assert unary(open_channel, "Echo")(b"before", timeout=30) == b"before"
    servers.tell("revoke")
    # Longer than anything between sends ahead, and not over when the refusal comes.
    words = [bytes([number]) * 40_000 for number in range(20)]
    hold = threading.Event()

    def agent():
        yield from words
        hold.wait(30)

    answers = open_channel.stream_stream("/test.Api/Chat")(agent(), timeout=30)
    assert [next(answers) for _ in words] == words
    hold.set()
    assert list(answers) == []
    assert attempts(api)[1:] == [("Chat", False), ("Chat", True)]


def test_a_refusal_behind_a_message_is_passed_on_and_the_next_call_has_a_new_token(channel, api, servers):
    """RTY-027"""
    open_channel = channel()
    answers = open_channel.unary_stream("/test.Api/RefuseLate")(b"", timeout=30)
    assert next(answers) == b"something"
    with pytest.raises(grpc.RpcError) as refused:
        next(answers)
    assert (refused.value.code(), refused.value.details()) == (grpc.StatusCode.UNAUTHENTICATED, "not any more")
    wait_for(lambda: servers.granted("client_credentials") == 2, "the renewal for the next call")
    wait_for(lambda: unary(open_channel, "Echo")(b"", timeout=30) == b"" and api.calls[-1][1] != api.calls[0][1], "the new token")
    assert [good for _, good in attempts(api)] == [True] * len(api.calls)


def test_who_has_not_connected_reads_the_link_in_the_status(channel, api):
    """RTY-029"""
    with pytest.raises(grpc.RpcError) as refused:
        unary(channel(providers={"main": CONSENT}), "Echo")(b"", timeout=30)
    assert refused.value.code() == grpc.StatusCode.UNAUTHENTICATED
    assert refused.value.details().startswith("not_connected: ")
    assert "http://127.0.0.1:" in refused.value.details() and "/connect/main" in refused.value.details()
    assert api.calls == []


def test_an_api_or_a_provider_that_is_not_there_is_unavailable(channel, api):
    """RTY-029"""
    for gone in ("api", "auth"):
        with pytest.raises(grpc.RpcError) as refused:
            unary(channel(**{"ports": {gone: 1}}), "Echo")(b"", timeout=30)
        assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
        assert refused.value.details().startswith(("connection_refused: ", "token_unavailable: ")), refused.value.details()


def test_grpcio_finds_proxy_and_roots_by_the_variables_that_exec_sets(sidebearer, api):
    """TLS-002"""
    agent = sidebearer(ports={"api": api.port})
    client = [PYTHON, CLIENTS / "grpc_echo.py", "api.test:443"]
    script = 'set -e; "$@"; curl -fsS -o /dev/null -X POST "$CONTROL/revoke"; "$@"'
    lines = agent.exec("sh", "-c", script, "sh", *client).stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"echo": "grüße", "split": 3}] * 2
    assert attempts(api) == [("Echo", True), ("Split", True), ("Echo", False), ("Echo", True), ("Split", True)]
