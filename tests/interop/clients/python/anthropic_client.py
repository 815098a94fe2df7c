"""Anthropic's SDK."""

from anthropic import Anthropic
from turns import take_turns

client = Anthropic(max_retries=0)


def call():
    return client.models.with_raw_response.list().http_response.text.strip()


def events():
    asked = [{"role": "user", "content": "count"}]
    for event in client.messages.create(model="any", max_tokens=9, messages=asked, stream=True):
        yield event.delta.text


take_turns(call, events)
