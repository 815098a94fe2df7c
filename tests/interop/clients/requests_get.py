"""Python requests, as an agent uses it: no proxy, no CA and no credential in the code."""

import sys

import requests

answer = requests.get(sys.argv[1], timeout=30)
answer.raise_for_status()
print(answer.text, end="")
print("spoke", "1.1" if answer.raw.version == 11 else answer.raw.version)
