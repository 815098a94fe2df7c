"""Server-sent events: each arrives when it is sent, for as long as the two ends want, and nobody between them waits."""

import time

import pytest

from world import CLIENTS, NODE, wait_for

EITHER_VERSION = pytest.mark.parametrize("http2", [False, True], ids=["HTTP/1.1", "HTTP/2"])
HOSTS = pytest.mark.parametrize("host", ["api.test", "old.test"])


def data_of(answer):
    return (line.removeprefix("data: ") for line in answer.iter_lines() if line)


@HOSTS
@EITHER_VERSION
def test_an_event_arrives_before_the_next_one_is_sent(sidebearer, servers, host, http2):
    with sidebearer().run().client(http2=http2) as client, client.stream("GET", f"https://{host}/events") as answer:
        # The head is here, and no event has been sent yet.
        assert (answer.status_code, answer.http_version) == (200, "HTTP/2" if http2 else "HTTP/1.1")
        events = data_of(answer)
        for number in range(20):
            servers.tell("announce", data=str(number))
            assert next(events) == str(number)
        servers.tell("fall-silent")
        assert list(events) == []


@EITHER_VERSION
def test_a_listener_is_not_taken_for_idle(sidebearer, servers, http2):
    """RTY-025"""
    running = sidebearer(limits={"idle_timeout": "1s"}).run()
    with running.client(http2=http2) as client, client.stream("GET", "https://api.test/events") as answer:
        time.sleep(2.5)
        servers.tell("announce", data="after a while")
        assert next(data_of(answer)) == "after a while"


@HOSTS
@EITHER_VERSION
def test_a_listener_that_hangs_up_is_missed_at_the_api(sidebearer, servers, host, http2):
    with sidebearer().run().client(http2=http2) as client, client.stream("GET", f"https://{host}/events"):
        assert servers.report()["open"]["events"] == 1
        # Its connection: httpx ends a stream of HTTP/2 without telling the other side.
        client.close()
        wait_for(lambda: servers.report()["open"]["events"] == 0, "the API to see it gone")


def test_an_agent_killed_in_the_middle_is_missed_at_the_api(sidebearer, servers):
    agent = sidebearer()
    client = agent.converse(NODE, CLIENTS / "events.mjs")
    client.ask("fetch", url="https://api.test/events")
    assert servers.report()["open"]["events"] == 1
    client.kill()
    wait_for(lambda: servers.report()["open"]["events"] == 0, "the API to see it gone")


@pytest.mark.parametrize("way", ["fetch", "eventSource"])
def test_nodes_own_clients_get_each_event_as_it_is_sent_and_a_new_token_when_they_ask_again(sidebearer, servers, way):
    """RTY-001"""
    client = sidebearer().converse(NODE, "--experimental-eventsource", CLIENTS / "events.mjs")
    for attempt in ("first", "second"):
        assert client.ask(way, url="https://api.test/events") == {"status": 200, "type": "text/event-stream"}
        for number in range(5):
            servers.tell("announce", data=f"{attempt} {number}")
            assert client.ask("next") == {"data": f"{attempt} {number}"}
        client.ask("hangUp")
        wait_for(lambda: servers.report()["open"]["events"] == 0, "the API to see it gone")
        servers.tell("revoke")
    assert servers.report()["api"] == {"requests": 3, "authorized": 2, "refused": 1, "held": 0}
