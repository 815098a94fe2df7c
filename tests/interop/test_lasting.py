"""Streams that last longer than the token they began with, and say nothing for most of that time."""

import time
from contextlib import ExitStack

import grpc

from grpc_api import GrpcApi
from world import API, CLIENTS, NODE

# Used until 5 s before its end (C16).
LIFETIME = 7


def test_what_is_open_outlives_its_token_twice_over_and_idles_undisturbed(sidebearer, servers):
    """RTY-025, C10"""
    servers.tell("set", ttl=LIFETIME)
    agent = sidebearer()
    running = agent.run()
    with ExitStack() as stack:
        socket = agent.converse(NODE, CLIENTS / "websocket.mjs")
        assert socket.ask("open", url="wss://api.test/echo")["opened"]
        assert socket.ask("receive")["message"] == "welcome"
        events = [listen(stack, running, http2) for http2 in (False, True)]
        call = grpc_stream(stack, sidebearer, servers)
        first = running.get().json()["token"]

        time.sleep(2 * LIFETIME + 1)

        assert running.get().json()["token"] != first
        socket.ask("send", text="still here")
        assert socket.ask("receive")["message"] == "still here"
        servers.tell("announce", data="still here")
        assert [next(event) for event in events] == ["data: still here"] * 2
        assert call() == [b"done"]


def listen(stack, running, http2):
    client = stack.enter_context(running.client(http2=http2))
    return stack.enter_context(client.stream("GET", f"{API}/events")).iter_lines()


def grpc_stream(stack, sidebearer, servers):
    """A call that has begun; what is called ends it, and gives what is left of it."""
    api = GrpcApi(servers)
    stack.callback(api.close)
    agent = sidebearer(ports={"api": api.port})
    proxy = ("grpc.http_proxy", f"http://{agent.run().address}")
    roots = grpc.ssl_channel_credentials(agent.ca.read_bytes())
    channel = stack.enter_context(grpc.secure_channel("api.test:443", roots, options=[proxy]))
    answers = channel.unary_stream("/test.Api/Wait")(b"")
    assert next(answers) == b"begun"

    def finish():
        api.released.set()
        return list(answers)

    return finish
