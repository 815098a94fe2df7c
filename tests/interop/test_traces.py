"""The spans of requests, as a collector reads them that decodes OTLP with OpenTelemetry's own messages."""

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)
from opentelemetry.proto.trace.v1.trace_pb2 import Span, Status

from world import API, wait_for

TRACE, PARENT = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
KEY = "collector-key-that-nobody-else-sees"
SERVER, CLIENT, INTERNAL = Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT, Span.SPAN_KIND_INTERNAL


class Collector:
    """A collector that keeps what it is sent; it answers as `statuses` say, and then with 200."""

    def __init__(self):
        self.posts, self.statuses, self.answered = [], [], 0
        collector = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                collector.posts.append((self.path, dict(self.headers), body))
                status = collector.statuses.pop(0) if collector.statuses else 200
                answer = ExportTraceServiceResponse().SerializeToString()
                self.send_response(status)
                self.send_header("content-type", "application/x-protobuf")
                self.send_header("content-length", str(len(answer)))
                self.end_headers()
                self.wfile.write(answer)
                collector.answered += 1

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def spans(self):
        """Each with its resource, once the collector has taken it."""
        found = []
        for path, _, body in self.posts:
            assert path == "/v1/traces"
            request = ExportTraceServiceRequest.FromString(body)
            # Nothing that the messages do not have.
            assert request.SerializeToString() == body
            for resource in request.resource_spans:
                found += [(span, attributes(resource.resource)) for scope in resource.scope_spans for span in scope.spans]
        return found


@pytest.fixture
def collector():
    collector = Collector()
    yield collector
    collector.server.shutdown()
    collector.server.server_close()


def attributes(of):
    return {item.key: getattr(item.value, item.value.WhichOneof("value")) for item in of.attributes}


def traces(collector, **keys):
    return {"traces": {"endpoint": collector.url, "headers": {"authorization": KEY}, **keys}}


def test_a_request_with_a_401_is_one_trace_in_which_each_try_and_each_wait_has_its_span(sidebearer, servers, collector):
    running = sidebearer(**traces(collector, resource={"deployment.environment.name": "test"})).run()
    context = {"traceparent": f"00-{TRACE}-{PARENT}-01", "tracestate": "vendor=1"}
    with running.client() as client:
        assert client.get(f"{API}/echo?secret=in-the-query").status_code == 200
        servers.tell("revoke")
        assert client.get(f"{API}/echo?secret=in-the-query", headers=context).status_code == 200
    of_the_second = lambda: [(span, resource) for span, resource in collector.spans() if span.trace_id.hex() == TRACE]
    wait_for(lambda: SERVER in {span.kind for span, _ in of_the_second()}, "the span of the request")
    running.terminate()

    spans = of_the_second()
    assert {resource["deployment.environment.name"] for _, resource in spans} == {"test"}
    assert {resource["service.name"] for _, resource in spans} == {"sidebearer"}
    server = next(span for span, _ in spans if span.kind == SERVER)
    assert (server.parent_span_id.hex(), server.trace_state, server.flags) == (PARENT, "vendor=1", 0x301)
    told = attributes(server)
    assert (told["http.request.method"], told["http.response.status_code"], told["url.path"]) == ("GET", 200, "/echo")
    assert told["sidebearer.retried"] is True and told["sidebearer.provider"] == "service"
    assert server.name == f"GET {told['sidebearer.route']}" and server.status.code == Status.STATUS_CODE_UNSET

    parts = [(span.kind, attributes(span)) for span, _ in spans if span is not server]
    assert [kind for kind, _ in parts] == [CLIENT, INTERNAL, CLIENT]
    first, wait, second = (told for _, told in parts)
    assert (first["http.response.status_code"], second["http.response.status_code"]) == (401, 200)
    assert second["sidebearer.token.generation"] > first["sidebearer.token.generation"]
    assert second["http.request.resend_count"] == 1 and "http.request.resend_count" not in first
    assert (wait["sidebearer.token.cause"], wait["sidebearer.token.outcome"]) == ("rejected", "obtained")
    for span, _ in spans:
        assert span is server or span.parent_span_id == server.span_id
        assert server.start_time_unix_nano <= span.start_time_unix_nano <= span.end_time_unix_nano
        assert span.end_time_unix_nano <= server.end_time_unix_nano
    assert {fields["authorization"] for _, fields, _ in collector.posts} == {KEY}
    assert not any(b"in-the-query" in body for _, _, body in collector.posts)


def test_the_agent_decides_of_its_traces_and_the_sample_of_all_others(sidebearer, collector):
    running = sidebearer(**traces(collector, sample="0%")).run()
    with running.client() as client:
        for flags in ("00", "01"):
            client.get(f"{API}/echo", headers={"traceparent": f"00-{TRACE}-{PARENT}-{flags}"})
        client.get(f"{API}/echo")
    wait_for(lambda: SERVER in {span.kind for span, _ in collector.spans()}, "the span of the request")
    running.terminate()
    assert [span.kind for span, _ in collector.spans()].count(SERVER) == 1


def test_a_collector_that_is_busy_is_asked_again_and_gets_each_span_once(sidebearer, collector):
    collector.statuses = [503]
    running = sidebearer(**traces(collector)).run()
    running.get()
    wait_for(lambda: collector.answered == 2, "the answer to a second try")
    assert collector.posts[0][2] == collector.posts[1][2]
    running.terminate()
    assert len(collector.posts) == 2
