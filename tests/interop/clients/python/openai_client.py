"""OpenAI's SDK."""

from openai import OpenAI
from turns import take_turns

client = OpenAI(max_retries=0)


def call():
    return client.models.with_raw_response.list().text.strip()


def events():
    asked = [{"role": "user", "content": "count"}]
    for chunk in client.chat.completions.create(model="any", messages=asked, stream=True):
        yield chunk.choices[0].delta.content


take_turns(call, events)
