"""LST-017: agents that speak HTTP/2 as no client does, on a real sidecar: it lives, serves the others, and stays small."""

import socket
import ssl

import pytest
from hpack import Encoder
from hyperframe.frame import ContinuationFrame, DataFrame, HeadersFrame, PingFrame, RstStreamFrame, SettingsFrame, WindowUpdateFrame

from world import wait_for

# A log of every frame would be most of what is measured here.
LOG = "info"

# An attack may make it grow by this much.
ROOM = 256 * 1024 * 1024
CALM = 11


class Attacker:
    """A connection to the API that sends any frame."""

    def __init__(self, running, settings=None):
        host, port = running.address.rsplit(":", 1)
        tunnel = socket.create_connection((host, int(port)), timeout=60)
        tunnel.sendall(b"CONNECT api.test:443 HTTP/1.1\r\nHost: api.test:443\r\n\r\n")
        assert tunnel.recv(4096).startswith(b"HTTP/1.1 200")
        context = running.trust()
        context.set_alpn_protocols(["h2"])
        self.tls = context.wrap_socket(tunnel, server_hostname="api.test")
        self.heard = b""
        self.tls.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n")
        self.send(SettingsFrame(0, settings=settings or {}))
        self.send(flagged(SettingsFrame(0), "ACK"))

    def send(self, *frames):
        self.tls.sendall(b"".join(frame.serialize() for frame in frames))

    def floods(self, frames, seconds=20):
        """Sends what it can without reading; the connection's end, and the other side's not reading any more, are ends too."""
        self.tls.settimeout(seconds)
        sent = 0
        try:
            for frame in frames:
                self.tls.sendall(frame if isinstance(frame, bytes) else frame.serialize())
                sent += 1
        except (OSError, ssl.SSLError):
            pass
        return sent

    def goaway(self):
        """The code of the GOAWAY that ends the connection; None when it ends without one."""
        self.tls.settimeout(10)
        try:
            while more := self.tls.recv(1 << 16):
                self.heard += more
        except (OSError, ssl.SSLError):
            pass
        place = 0
        while place + 9 <= len(self.heard):
            length, kind = int.from_bytes(self.heard[place : place + 3], "big"), self.heard[place + 3]
            if kind == 7:
                return int.from_bytes(self.heard[place + 13 : place + 17], "big")
            place += 9 + length
        return None


def head(stream, *fields, path="/echo", end=True, method="GET"):
    pseudo = [(":method", method), (":scheme", "https"), (":authority", "api.test"), (":path", path)]
    frame = HeadersFrame(stream, data=Encoder().encode([*pseudo, *fields], huffman=False))
    return flagged(frame, "END_HEADERS", *(["END_STREAM"] if end else []))


def flagged(frame, *flags):
    for flag in flags:
        frame.flags.add(flag)
    return frame


def reset(stream):
    return RstStreamFrame(stream, error_code=8)


def streams(count):
    return range(1, 2 * count, 2)


def rapid_reset():
    for stream in streams(20_000):
        yield head(stream).serialize() + reset(stream).serialize()


def made_you_reset():
    for stream in streams(20_000):
        yield head(stream, end=False, method="POST").serialize() + WindowUpdateFrame(stream, window_increment=1).serialize()[:-4] + bytes(4)


def endless_head():
    first = head(1)
    first.flags.discard("END_HEADERS")
    yield first
    for _ in range(100_000):
        yield ContinuationFrame(1, data=b"\x00\x06x-more\x04more" * 100)


def empty_data():
    yield head(1, end=False, method="POST")
    for _ in range(100_000):
        yield DataFrame(1)


def pings():
    ping = PingFrame(0, opaque_data=b"12345678").serialize() * 100
    for _ in range(100_000):
        yield ping


def settings():
    wish = SettingsFrame(0, settings={3: 100}).serialize() * 100
    for _ in range(100_000):
        yield wish


def bombs():
    """A few kilobytes each, which unpack to a quarter of a megabyte of fields."""
    fields = Encoder().encode([(":method", "GET"), (":scheme", "https"), (":authority", "api.test"), (":path", "/echo")])
    for stream in streams(1000):
        again = b"\x40\x01x\x01y" + b"\xbe" * 7000
        yield flagged(HeadersFrame(stream, data=fields + again), "END_HEADERS", "END_STREAM")


@pytest.mark.parametrize("attack", [rapid_reset, made_you_reset, endless_head, empty_data, pings, settings, bombs])
def test_a_flood_ends_or_is_not_read_and_nobody_else_notices(sidebearer, attack, figure):
    running = sidebearer().run()
    assert running.get().status_code == 200
    before = memory(running)
    attacker = Attacker(running)
    sent = attacker.floods(attack(), seconds=5)
    grown = memory(running) - before
    assert running.get().status_code == 200
    ended = attacker.goaway() if attack not in (pings, settings) else "is not read on"
    figure(f"{sent} pieces sent, then GOAWAY {ended}; grown by {grown >> 20} MiB")
    assert grown < ROOM
    if attack in (endless_head, empty_data):
        assert ended == CALM
    assert running.process.poll() is None


def test_a_shut_window_keeps_little_waiting(sidebearer, servers, figure):
    """Window 0 on 900 streams of long answers, for as long as others need to be served."""
    running = sidebearer().run()
    assert running.get().status_code == 200
    before = memory(running)
    attacker = Attacker(running, settings={4: 0})
    attacker.floods(head(stream, path=f"/numbered/{1 << 30}") for stream in streams(900))
    wait_for(lambda: servers.report()["api"]["authorized"] == 901, "all to be answered")
    served = [running.get().status_code for _ in range(20)]
    grown = memory(running) - before
    figure(f"900 answers wait, grown by {grown >> 20} MiB")
    assert served == [200] * 20
    # A window of 256 KiB for each, and the noise of an allocator.
    assert grown < 1.5 * 900 * 256 * 1024


def memory(running):
    status = open(f"/proc/{running.process.pid}/status").read()
    kilobytes = next(line.split()[1] for line in status.splitlines() if line.startswith("VmHWM"))
    return int(kilobytes) * 1024
