"""Peers that do exactly what a test says: TLS servers and agents that speak HTTP/1 as bytes and HTTP/2 as frames."""

import socket
import ssl
import threading

import h2.config
import h2.connection
import h2.events


class Server:
    """A TLS server with the API's certificate; each connection is `serve`d in a thread of its own, as number 0, 1, ..."""

    def __init__(self, certificates, serve, alpn="http/1.1"):
        self.context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        self.context.load_cert_chain(certificates.cert, certificates.key)
        self.context.set_alpn_protocols([alpn])
        self.serve = serve
        self.connections = []
        self.failures = []
        self.closed = False
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                accepted, _ = self.listener.accept()
            except OSError:
                return
            accepted.settimeout(60)
            accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            number = len(self.connections)
            self.connections.append(accepted)
            threading.Thread(target=self._serve, args=(accepted, number), daemon=True).start()

    def _serve(self, accepted, number):
        try:
            with self.context.wrap_socket(accepted, server_side=True) as stream:
                self.connections[number] = stream
                # What it gives is whether to hang up without TLS's good-bye, as if cut off.
                if not self.serve(stream, number):
                    stream.unwrap()
        except (OSError, EOFError):
            # The sidecar has hung up, as it does when its agent has. A test sees by what arrived whether it should have.
            pass
        except Exception as error:
            # Closed under its hands, it may fail in any way.
            if not self.closed:
                self.failures.append(repr(error))

    def close(self):
        self.closed = True
        self.listener.close()
        for connection in self.connections:
            connection.close()
        assert not self.failures, self.failures


def tunnel(running, host="api.test", alpn="http/1.1", buffer=None):
    """A TLS connection to a host through the sidecar; with a small `buffer`, what is not read stays there."""
    context = running.trust()
    context.set_alpn_protocols([alpn])
    return context.wrap_socket(connect(running, host, buffer), server_hostname=host)


def connect(running, host, buffer=None):
    """What is behind a CONNECT."""
    address, port = running.address.rsplit(":", 1)
    stream = socket.socket()
    if buffer:
        stream.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    stream.settimeout(30)
    stream.connect((address, int(port)))
    stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    stream.sendall(f"CONNECT {host}:443 HTTP/1.1\r\nHost: {host}:443\r\n\r\n".encode())
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = stream.recv(1)
        assert byte, f"the proxy hung up after {head!r}"
        head += byte
    assert head.split()[1] == b"200", head
    stream.settimeout(60)
    return stream


class Shim:
    """Brings clients that know no proxy through its CONNECT: what comes to this port goes to the host behind it."""

    def __init__(self, running, host="api.test"):
        self.running, self.host = running, host
        self.listener = socket.create_server(("127.0.0.1", 0), backlog=512)
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self):
        while True:
            try:
                client, _ = self.listener.accept()
            except OSError:
                return
            proxy = connect(self.running, self.host)
            for ends in ((client, proxy), (proxy, client)):
                threading.Thread(target=self._copy, args=ends, daemon=True).start()

    def _copy(self, come_from, go_to):
        try:
            while piece := come_from.recv(1 << 18):
                go_to.sendall(piece)
            go_to.shutdown(socket.SHUT_WR)
        except OSError:
            come_from.close()
            go_to.close()

    def close(self):
        self.listener.close()


class Reader:
    """HTTP/1 messages out of a stream of bytes."""

    def __init__(self, stream):
        self.stream = stream
        self.bytes = b""

    def more(self):
        got = self.stream.recv(65536)
        if not got:
            raise EOFError
        self.bytes += got

    def until(self, end):
        while end not in self.bytes:
            self.more()
        found, self.bytes = self.bytes.split(end, 1)
        return found

    def exactly(self, length):
        while len(self.bytes) < length:
            self.more()
        found, self.bytes = self.bytes[:length], self.bytes[length:]
        return found

    def rest(self):
        try:
            while True:
                self.more()
        except EOFError:
            found, self.bytes = self.bytes, b""
            return found

    def head(self):
        """The first line, and the fields by their lower-case names."""
        first, *lines = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        return first, {name.lower(): value.strip() for name, value in (line.split(":", 1) for line in lines)}

    def body(self, fields):
        if fields.get("transfer-encoding") == "chunked":
            return self.chunked()[0]
        return self.exactly(int(fields.get("content-length", 0)))

    def chunked(self):
        """The body, and its trailers."""
        body = b""
        while length := int(self.until(b"\r\n").split(b";")[0], 16):
            body += self.exactly(length)
            assert self.exactly(2) == b"\r\n"
        trailers = []
        while line := self.until(b"\r\n"):
            trailers.append(line.decode())
        return body, trailers


class Peer:
    """One end of an HTTP/2 connection."""

    def __init__(self, stream, client, settings=None):
        self.stream = stream
        config = h2.config.H2Configuration(client_side=client, header_encoding="utf-8", normalize_outbound_headers=False)
        self.h2 = h2.connection.H2Connection(config)
        self.h2.initiate_connection()
        if settings:
            self.h2.update_settings(settings)
        self.waiting = []
        self.flush()

    def flush(self):
        self.stream.sendall(self.h2.data_to_send())

    def events(self):
        """What the other end does, until it hangs up. What a test makes of one is sent before the next is waited for."""
        while True:
            self.flush()
            while self.waiting:
                yield self.waiting.pop(0)
                self.flush()
            got = self.stream.recv(65536)
            if not got:
                return
            self.waiting += self.h2.receive_data(got)

    def wait_for(self, kind, stream=None):
        """The next event of a kind; those before it are passed over."""
        for event in self.events():
            if isinstance(event, kind) and stream in (None, getattr(event, "stream_id", None)):
                return event
        raise EOFError(f"the other end hung up before {kind.__name__}")

    def request(self, method="GET", path="/", *fields, stream=None, end=True):
        stream = stream or self.h2.get_next_available_stream_id()
        head = [(":method", method), (":scheme", "https"), (":authority", "api.test"), (":path", path), *fields]
        self.h2.send_headers(stream, head, end_stream=end)
        self.flush()
        return stream

    def send(self, stream, body, end=True, step=16384):
        """A body in frames of `step` bytes, as the windows allow."""
        for place in range(0, len(body), step):
            piece = body[place:place + step]
            while piece:
                room = min(len(piece), self.h2.local_flow_control_window(stream))
                if room == 0:
                    self.make_room()
                    continue
                self.h2.send_data(stream, piece[:room])
                self.flush()
                piece = piece[room:]
        if end:
            self.h2.end_stream(stream)
            self.flush()

    def make_room(self):
        got = self.stream.recv(65536)
        if not got:
            raise EOFError
        self.waiting += self.h2.receive_data(got)
        self.flush()

    def answer(self, *streams):
        """The answers to some requests, each read to its end."""
        answers = {stream: Answer() for stream in streams}
        for event in self.events():
            answer = answers.get(getattr(event, "stream_id", None))
            if answer and answer.took(event, self.h2) and all(one.ended for one in answers.values()):
                self.flush()
                return answers[streams[0]] if len(streams) == 1 else list(answers.values())
        raise EOFError(f"the other end hung up: {answers}")


class Answer:
    """One stream's answer so far."""

    def __init__(self):
        self.status = self.reset = None
        self.fields, self.trailers, self.interim = {}, {}, []
        self.body, self.frames, self.ended = b"", 0, False

    def __repr__(self):
        return f"{self.status} {self.fields} {self.body[:80]!r} {self.trailers} reset={self.reset} ended={self.ended}"

    def took(self, event, connection):
        match event:
            case h2.events.InformationalResponseReceived():
                self.interim.append(dict(event.headers)[":status"])
            case h2.events.ResponseReceived():
                self.fields = dict(event.headers)
                self.status = int(self.fields.pop(":status"))
            case h2.events.DataReceived():
                self.body += event.data
                self.frames += 1
                connection.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.TrailersReceived():
                self.trailers = dict(event.headers)
            case h2.events.StreamReset():
                self.reset, self.ended = event.error_code, True
            case h2.events.StreamEnded():
                self.ended = True
        return self.ended
