//! The ways in which a request can reach the upstream.

use clap::ValueEnum;

#[derive(Clone, Copy, PartialEq, ValueEnum)]
pub enum Shape {
    /// `GET http://...` at the proxy
    Plain,
    /// CONNECT, and HTTP/1.1 within TLS that the proxy answers
    H1,
    /// CONNECT, and HTTP/2 within TLS that the proxy answers
    H2,
    /// CONNECT, and HTTP/1.1 within TLS that the upstream answers; the client brings the token
    Tunnel,
    /// No proxy; the client brings the token
    Direct,
    DirectH2,
    DirectPlain,
    /// A reverse proxy, which brings the token
    Reverse,
    ReverseH2,
    ReversePlain,
}

impl Shape {
    /// Whether a CONNECT comes first.
    pub fn connects(self) -> bool {
        matches!(self, Self::H1 | Self::H2 | Self::Tunnel)
    }

    pub fn is_tls(self) -> bool {
        !matches!(self, Self::Plain | Self::DirectPlain | Self::ReversePlain)
    }

    pub fn is_http2(self) -> bool {
        matches!(self, Self::H2 | Self::DirectH2 | Self::ReverseH2)
    }

    /// Whether nobody on the way adds the token.
    pub fn brings_token(self) -> bool {
        matches!(self, Self::Tunnel | Self::Direct | Self::DirectH2 | Self::DirectPlain)
    }
}
