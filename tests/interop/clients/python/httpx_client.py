"""httpx."""

import sys

import httpx
from turns import take_turns

call_url, events_url = sys.argv[1:]
client = httpx.Client(timeout=30)


def call():
    return client.get(call_url).raise_for_status().text.strip()


def events():
    with client.stream("GET", events_url) as answer:
        yield from answer.iter_lines()


take_turns(call, events)
