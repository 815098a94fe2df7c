"""Python requests, in a session."""

import sys

import requests
from turns import take_turns

call_url, events_url = sys.argv[1:]
session = requests.Session()


def call():
    answer = session.get(call_url, timeout=30)
    answer.raise_for_status()
    return answer.text.strip()


def events():
    return session.get(events_url, stream=True, timeout=30).iter_lines(chunk_size=1, decode_unicode=True)


take_turns(call, events)
