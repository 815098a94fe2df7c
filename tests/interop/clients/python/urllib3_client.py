"""urllib3, which knows of no variable: its program hands the proxy over."""

import os
import sys

import urllib3
from turns import take_turns

call_url, events_url = sys.argv[1:]
pool = urllib3.ProxyManager(os.environ["HTTPS_PROXY"])


def call():
    answer = pool.request("GET", call_url)
    if answer.status != 200:
        raise SystemExit(f"answered {answer.status}")
    return answer.data.decode().strip()


def events():
    for chunk in pool.request("GET", events_url, preload_content=False).stream():
        yield chunk.decode()


take_turns(call, events)
