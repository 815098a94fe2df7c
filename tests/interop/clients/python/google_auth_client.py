"""google-auth's session, whose own credential is a placeholder."""

import sys

from google.auth.transport.requests import AuthorizedSession
from google.oauth2.credentials import Credentials
from turns import take_turns

call_url, events_url = sys.argv[1:]
session = AuthorizedSession(Credentials("placeholder"))


def call():
    answer = session.get(call_url)
    answer.raise_for_status()
    return answer.text.strip()


def events():
    return session.get(events_url, stream=True).iter_lines(chunk_size=1, decode_unicode=True)


take_turns(call, events)
