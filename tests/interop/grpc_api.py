"""A gRPC API that asks the provider about every token. Its messages are plain bytes, so it needs no compiled schema."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import grpc


class GrpcApi:
    def __init__(self, servers):
        self.servers = servers
        self.reset()
        certificates = servers.certificates
        server = grpc.server(ThreadPoolExecutor(32))
        server.add_generic_rpc_handlers([Methods(self)])
        identity = [(certificates.key.read_bytes(), certificates.cert.read_bytes())]
        self.port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials(identity))
        server.start()
        self.server = server

    def reset(self):
        self.calls = []  # (method, token, whether it was good)
        self.released = threading.Event()
        self.cancelled = threading.Event()

    def close(self):
        self.released.set()
        self.server.stop(grace=None).wait()


class Methods(grpc.GenericRpcHandler):
    def __init__(self, api):
        self.api = api

    def service(self, details):
        method = details.method.removeprefix("/test.Api/")
        return {
            "Echo": grpc.unary_unary_rpc_method_handler(self.checked(method, self.echo)),
            "Collect": grpc.stream_unary_rpc_method_handler(self.checked(method, self.collect)),
            "Split": grpc.unary_stream_rpc_method_handler(self.checked_stream(method, self.split)),
            "Chat": grpc.stream_stream_rpc_method_handler(self.checked_stream(method, self.chat)),
            "Fail": grpc.unary_unary_rpc_method_handler(self.checked(method, self.fail)),
            "RefuseLate": grpc.unary_stream_rpc_method_handler(self.checked_stream(method, self.refuse_late)),
            "Hang": grpc.unary_unary_rpc_method_handler(self.checked(method, self.hang)),
            "Wait": grpc.unary_stream_rpc_method_handler(self.checked_stream(method, self.wait)),
        }.get(method)

    def check(self, method, context):
        sent = [value for key, value in context.invocation_metadata() if key == "authorization"]
        token = sent[0].removeprefix("Bearer ") if len(sent) == 1 else ""
        good = self.api.servers.active(token)
        self.api.calls.append((method, token, good))
        if not good:
            # Nothing has been sent, so this is Trailers-Only.
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the api does not know this token")

    def checked(self, method, answer):
        def behaviour(request, context):
            self.check(method, context)
            return answer(request, context)

        return behaviour

    def checked_stream(self, method, answer):
        def behaviour(request, context):
            self.check(method, context)
            yield from answer(request, context)

        return behaviour

    def echo(self, request, context):
        sent = dict(context.invocation_metadata())
        context.send_initial_metadata([("x-early", sent.get("x-asked", "")), ("x-early-bin", sent.get("x-asked-bin", b""))])
        context.set_trailing_metadata([("x-late", "straße".encode().hex()), ("x-late-bin", bytes(range(256)))])
        return request

    def collect(self, requests, context):
        return b"".join(requests)

    def split(self, request, context):
        for place in range(len(request)):
            yield request[place:place + 1]

    def chat(self, requests, context):
        for request in requests:
            yield request

    def fail(self, request, context):
        context.set_trailing_metadata([("x-why", "because")])
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "100 % nötig")

    def refuse_late(self, request, context):
        yield b"something"
        context.abort(grpc.StatusCode.UNAUTHENTICATED, "not any more")

    def tell_of_the_end(self, context):
        # Of a call that is over already, nobody is called back.
        if not context.add_callback(self.api.cancelled.set):
            self.api.cancelled.set()

    def hang(self, request, context):
        self.tell_of_the_end(context)
        self.api.released.wait(60)
        return request

    def wait(self, request, context):
        """A stream that says nothing between its first word and its last."""
        self.tell_of_the_end(context)
        yield b"begun"
        while context.is_active() and not self.api.released.wait(0.05):
            time.sleep(0)
        yield b"done"
