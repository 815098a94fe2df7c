"""The `websockets` library, as an agent uses it: it finds proxy and roots by itself."""

import json
import sys

from websockets.sync.client import connect

with connect(sys.argv[1]) as socket:
    welcome = socket.recv()
    socket.send("grüße")
    echo = socket.recv()
    # Sent frame by frame, since its length is not known before.
    socket.send(iter([bytes(4096)] * 16))
    binary = len(socket.recv())
print(json.dumps({"welcome": welcome, "echo": echo, "binary": binary, "code": socket.protocol.close_code}))
