//! hudsucker with a fixed header, and nothing else.

use http::header::AUTHORIZATION;
use http::{HeaderValue, Request};
use hudsucker::certificate_authority::RcgenAuthority;
use hudsucker::rustls::crypto::aws_lc_rs;
use hudsucker::{Body, HttpContext, HttpHandler, Proxy, RequestOrResponse};
use peers::{Arguments, INTERCEPTED, install_provider};

#[derive(Clone)]
struct Inject {
    authorization: HeaderValue,
}

impl HttpHandler for Inject {
    async fn handle_request(&mut self, _: &HttpContext, mut request: Request<Body>) -> RequestOrResponse {
        if request.method() != http::Method::CONNECT {
            request.headers_mut().insert(AUTHORIZATION, self.authorization.clone());
        }
        request.into()
    }

    async fn should_intercept_connect(&mut self, _: &HttpContext, request: &Request<Body>) -> bool {
        request.uri().host().is_some_and(|host| host.ends_with(INTERCEPTED))
    }
}

#[tokio::main]
async fn main() {
    install_provider();
    let arguments = Arguments::read();
    Proxy::builder()
        .with_addr(arguments.listen)
        .with_ca(RcgenAuthority::new(arguments.issuer(), 10_000, aws_lc_rs::default_provider()))
        .with_http_connector(arguments.connector(false))
        .with_http_handler(Inject { authorization: arguments.authorization })
        .build()
        .expect("a proxy")
        .start()
        .await
        .expect("it serves");
}
