//! What the spans of a request say, in the words of OpenTelemetry's conventions for HTTP. No query and no user.

use http::request::Parts;
use http::{Request, StatusCode, Version};
use hyper::body::Incoming;

use super::Arrival;
use crate::events;
use crate::names::ProviderName;
use crate::traces::{self, Attribute, Trace, Traces};
use crate::upstream::Origin;

/// Begins a request's trace, if it is to have one.
pub(super) fn begin(
    traces: &Traces,
    request: &Request<Incoming>,
    arrival: &Arrival,
    authority: &str,
) -> Option<Box<Trace>> {
    let mut trace = traces.begin(request.headers())?;
    let (address, port) = authority.rsplit_once(':').unwrap_or((authority, ""));
    trace.says("http.request.method", traces::method(request.method()));
    trace.says("server.address", address);
    if let Ok(port) = port.parse::<u16>() {
        trace.says("server.port", port);
    }
    let scheme = match arrival {
        Arrival::Tunnel(tunnel) => Some(scheme(tunnel.origin.plaintext)),
        Arrival::Proxy(..) => request.uri().scheme_str(),
    };
    if let Some(scheme) = scheme {
        trace.says("url.scheme", scheme);
        trace.says("url.path", request.uri().path());
    }
    trace.says("network.protocol.version", if request.version() == Version::HTTP_2 { "2" } else { "1.1" });
    Some(trace)
}

/// Ends it, with all that is told of the request.
pub(super) fn finish(mut trace: Trace, event: &events::Request) {
    let text = [
        ("sidebearer.route", event.route.as_deref()),
        ("sidebearer.provider", event.provider.as_ref().map(ProviderName::as_str)),
        ("sidebearer.agent", event.agent.as_deref()),
        ("sidebearer.code", event.code),
        ("sidebearer.passed", event.passed),
    ];
    for (name, value) in text {
        if let Some(value) = value {
            trace.says(name, value);
        }
    }
    if event.route.is_some() {
        trace.says("sidebearer.retried", traces::Value::Flag(event.retried));
    }
    if let Some(status) = event.status {
        trace.says("http.response.status_code", status.as_u16());
    }
    let failed = event.status.is_none_or(|status| status.is_server_error());
    if failed {
        trace.says("error.type", error(event.status, event.code).as_str());
    }
    let method = traces::method(&event.method);
    let name = event.route.as_ref().map_or_else(|| method.to_owned(), |route| format!("{method} {route}"));
    trace.finish(name, failed);
}

/// Begins the span of one try at an upstream.
pub(super) fn begin_try(trace: &mut Trace, origin: &Origin, head: &Parts, generation: Option<u64>, second: bool) {
    let method = traces::method(&head.method);
    let url = format!("{}://{}{}", scheme(origin.plaintext), origin.authority, head.uri.path());
    let mut attributes: Vec<Attribute> = vec![
        ("http.request.method", method.into()),
        ("server.address", origin.authority.host.to_string().as_str().into()),
        ("server.port", origin.authority.port.into()),
        ("url.full", url.as_str().into()),
    ];
    if second {
        attributes.push(("http.request.resend_count", 1.into()));
    }
    attributes.extend(generation.map(|number| ("sidebearer.token.generation", traces::Value::Number(number as i64))));
    trace.begin_call(method, attributes);
}

/// Ends it.
pub(super) fn end_try(trace: &mut Trace, status: Option<StatusCode>, code: Option<&'static str>) {
    let failed = code.is_some() || status.is_none_or(|status| status.as_u16() >= 400);
    let answered = status.map(|status| ("http.response.status_code", status.as_u16().into()));
    let error = failed.then(|| ("error.type", error(status, code).as_str().into()));
    trace.end_call(answered.into_iter().chain(error), failed);
}

fn scheme(plaintext: bool) -> &'static str {
    if plaintext { "http" } else { "https" }
}

fn error(status: Option<StatusCode>, code: Option<&'static str>) -> String {
    code.map_or_else(|| status.map_or_else(String::new, |status| status.as_u16().to_string()), str::to_owned)
}
