"""httpx, as an agent uses it; `2` as second argument asks for HTTP/2."""

import sys

import httpx

with httpx.Client(http2=sys.argv[2] == "2", timeout=30) as client:
    answer = client.get(sys.argv[1])
answer.raise_for_status()
print(answer.text, end="")
print("spoke", answer.http_version.removeprefix("HTTP/"))
