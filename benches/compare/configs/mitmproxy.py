"""A fixed header for what is intercepted, and this machine for every name."""

import socket

resolve = socket.getaddrinfo
socket.getaddrinfo = lambda host, *rest, **named: resolve("127.0.0.1", *rest, **named)


def request(flow):
    flow.request.headers["authorization"] = "$authorization"
