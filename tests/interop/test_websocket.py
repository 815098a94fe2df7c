"""WebSockets through the sidecar: the handshake gets its token, and everything behind it is the two ends' own."""

import base64
import json

import pytest

from world import CLIENTS, NODE, PYTHON, wait_for

LONG = 16 * 1024 * 1024


def talk(agent, url="wss://api.test/echo", **options):
    """A `ws` client behind `exec` with an open WebSocket, past the server's first words."""
    client = agent.converse(NODE, CLIENTS / "websocket.mjs")
    opened = client.ask("open", url=url, **options)
    assert opened["opened"], opened
    assert client.ask("receive") == {"message": "welcome", "isBinary": False}
    return client, opened


def echoed(client, sent, **options):
    client.ask("send", **sent, **options)
    return client.ask("receive")


@pytest.mark.parametrize("host", ["api.test", "old.test"])
def test_text_and_bytes_are_echoed_whether_the_api_also_speaks_http2_or_not(sidebearer, servers, host):
    client, _ = talk(sidebearer(), f"wss://{host}/echo")
    assert echoed(client, {"text": "grüße"}) == {"message": "grüße", "isBinary": False}
    every_byte = base64.b64encode(bytes(range(256))).decode()
    assert echoed(client, {"bytes": every_byte}) == {"message": every_byte, "isBinary": True}
    assert echoed(client, {"text": ""}) == {"message": "", "isBinary": False}
    assert servers.report()["api"] == {"requests": 1, "authorized": 1, "refused": 0, "held": 0}


def test_a_plaintext_route_carries_websockets_too(sidebearer):
    routes = [{"host": "plain.test", "provider": "service", "plaintext": True}]
    client, _ = talk(sidebearer(routes=routes), "ws://plain.test/echo")
    assert echoed(client, {"text": "in the clear"})["message"] == "in the clear"


def test_fragments_long_messages_and_pings_pass_both_ways(sidebearer, servers):
    client, _ = talk(sidebearer(), perMessageDeflate=False)
    client.ask("send", text="one ", fin=False)
    client.ask("send", text="message ", fin=False)
    assert echoed(client, {"text": "in three"}, fin=True)["message"] == "one message in three"
    assert echoed(client, {"text": "fragments 100"})["message"] == "".join(f"{number}," for number in range(1, 101))
    client.ask("send", long=LONG)
    assert client.ask("receiveLong", long=LONG) == {"same": True}
    client.ask("ping", data="still here?")
    assert client.ask("receive") == {"pong": "still here?"}
    assert echoed(client, {"text": "ping"}) == {"ping": "are you there"}
    assert servers.report()["pings"] == 1


def test_the_two_ends_agree_on_compression_and_a_subprotocol_themselves(sidebearer):
    client, opened = talk(sidebearer(), protocols=["first.v1", "second.v1"])
    assert opened["extensions"].startswith("permessage-deflate")
    assert opened["protocol"] == "second.v1"
    assert echoed(client, {"text": "a" * 1_000_000}) == {"message": "a" * 1_000_000, "isBinary": False}


def test_close_codes_arrive_and_an_end_without_one_is_seen_as_such(sidebearer, servers):
    agent = sidebearer()
    client, _ = talk(agent)
    client.ask("close", code=4001, reason="enough")
    assert client.ask("receive") == {"close": 4001, "reason": "enough"}
    wait_for(lambda: servers.report()["closes"] == [[4001, "enough"]], "the code at the server")
    client.ask("open", url="wss://api.test/echo")
    client.ask("receive")
    assert echoed(client, {"text": "close 1013 later"}) == {"close": 1013, "reason": "later"}
    client.ask("open", url="wss://api.test/echo")
    client.ask("receive")
    assert echoed(client, {"text": "vanish"}) == {"close": 1006, "reason": ""}


def test_a_handshake_with_a_revoked_token_succeeds_and_the_client_does_not_notice(sidebearer, servers):
    """RTY-023, C10"""
    client, _ = talk(sidebearer())
    servers.tell("revoke")
    # The one that is open has had its token looked at, and is not cut.
    assert echoed(client, {"text": "before"})["message"] == "before"
    assert client.ask("open", url="wss://api.test/echo")["opened"]
    assert client.ask("receive")["message"] == "welcome"
    assert echoed(client, {"text": "after"})["message"] == "after"
    report = servers.report()
    assert report["api"] == {"requests": 3, "authorized": 2, "refused": 1, "held": 0}
    assert report["token"]["granted"] == {"client_credentials": 2}


def test_an_agent_that_vanishes_is_missed_at_the_server(sidebearer, servers):
    client, _ = talk(sidebearer())
    assert servers.report()["open"]["websockets"] == 1
    client.kill()
    wait_for(lambda: servers.report()["closes"] == [[1006, ""]], "the server to see it gone")


def test_the_python_websockets_client_gets_through(sidebearer, servers):
    """RTY-023"""
    agent = sidebearer()
    client = [PYTHON, CLIENTS / "websocket_echo.py", "wss://api.test/echo"]
    script = 'set -e; "$@"; curl -fsS -o /dev/null -X POST "$CONTROL/revoke"; "$@"'
    lines = agent.exec("sh", "-c", script, "sh", *client).stdout.splitlines()
    assert [json.loads(line) for line in lines] == [{"welcome": "welcome", "echo": "grüße", "binary": 65536, "code": 1000}] * 2
    assert servers.report()["api"] == {"requests": 3, "authorized": 2, "refused": 1, "held": 0}
