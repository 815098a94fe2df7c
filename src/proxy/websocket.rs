//! A WebSocket handshake that an agent says in HTTP/2 (RFC 8441): read as the GET that it is in HTTP/1.1, so that routes,
//! the retry and the log know one kind of handshake.

use http::{Extensions, HeaderValue, Method, Request};
use hyper::ext::Protocol;

use crate::upstream::WEBSOCKET;

/// Makes a GET of an extended CONNECT for a WebSocket. Any other CONNECT stays one, and is refused.
pub(super) fn read_as_get<B>(request: &mut Request<B>) {
    if *request.method() == Method::CONNECT && protocol(request.extensions()) == Some(WEBSOCKET) {
        *request.method_mut() = Method::GET;
    }
}

/// The protocol that an extended CONNECT asks for, if the request is or was one.
pub(super) fn protocol(extensions: &Extensions) -> Option<&str> {
    extensions.get::<Protocol>().map(Protocol::as_str)
}

/// The protocol in a handshake said in HTTP/2.
pub(super) fn asked<B>(request: &Request<B>) -> Option<HeaderValue> {
    let asked = *request.method() == Method::GET && protocol(request.extensions()) == Some(WEBSOCKET);
    asked.then_some(HeaderValue::from_static(WEBSOCKET))
}
