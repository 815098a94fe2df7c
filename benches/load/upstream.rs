//! The upstream that is asked for through the proxies, made to cost little, and a token endpoint.
//!
//! It answers 1 KiB, or `/bytes/N` with so many bytes, and 401 to whoever does not bring the token: no contender is
//! measured without doing its job.

use std::convert::Infallible;
use std::io;
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use http::{HeaderValue, Request, Response, StatusCode, header};
use http_body::{Frame, SizeHint};
use http_body_util::Full;
use hyper::body::{Body, Incoming};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use crate::certificates;
use crate::http1::{self, FILLING};

/// The one token that the endpoint gives, and that the upstream takes.
pub const AUTHORIZATION: &str = "Bearer load-0123456789abcdef0123456789abcdef";

const USUAL: usize = 1024;
const CHUNK: usize = 64 * 1024;
static FILLED: [u8; CHUNK] = [FILLING; CHUNK];

#[derive(clap::Args)]
pub struct Options {
    /// Where `ca.pem`, `ca.key`, `leaf.pem` and `leaf.key` are written
    #[arg(long)]
    directory: PathBuf,
    /// Where it speaks TLS, h1 and h2
    #[arg(long, default_value = "127.0.0.1:0")]
    tls: String,
    /// Offer HTTP/1.1 only, so that it is the same for proxies that know HTTP/2 upstream and those that do not
    #[arg(long)]
    http1_only: bool,
    /// Where it speaks http://
    #[arg(long, default_value = "127.0.0.1:0")]
    plain: String,
    /// Where tokens are given
    #[arg(long, default_value = "127.0.0.1:0")]
    token: String,
    /// How long they are said to live, in seconds
    #[arg(long, default_value_t = 3600)]
    lifetime: u32,
}

/// Prints its addresses, and serves until it is killed.
pub async fn serve(options: Options) -> io::Result<()> {
    certificates::write(&options.directory)?;
    let acceptor = TlsAcceptor::from(Arc::new(certificates::server(&options.directory, options.http1_only)?));
    let tls = TcpListener::bind(&options.tls).await?;
    let plain = TcpListener::bind(&options.plain).await?;
    let token = TcpListener::bind(&options.token).await?;
    announce(&options.directory, [&tls, &plain, &token])?;
    tokio::join!(
        each(tls, move |stream| answer_tls(acceptor.clone(), stream)),
        each(plain, answer),
        each(token, move |stream| give_tokens(stream, options.lifetime)),
    );
    Ok(())
}

fn announce(directory: &Path, [tls, plain, token]: [&TcpListener; 3]) -> io::Result<()> {
    let line = serde_json::json!({
        "tls": tls.local_addr()?.to_string(),
        "plain": plain.local_addr()?.to_string(),
        "token_endpoint": format!("http://{}/token", token.local_addr()?),
        "authorization": AUTHORIZATION,
        "directory": directory.canonicalize()?,
    });
    println!("{line}");
    Ok(())
}

async fn each<F: Future<Output = io::Result<()>> + Send + 'static>(
    listener: TcpListener,
    serve: impl Fn(TcpStream) -> F,
) {
    loop {
        match listener.accept().await {
            // Whoever hangs up has its reasons; the generator counts what went wrong.
            Ok((stream, _)) if stream.set_nodelay(true).is_ok() => drop(tokio::spawn(serve(stream))),
            Ok(_) => {}
            Err(error) => eprintln!("load upstream: cannot accept: {error}"),
        }
    }
}

async fn answer_tls(acceptor: TlsAcceptor, stream: TcpStream) -> io::Result<()> {
    let stream = acceptor.accept(stream).await?;
    if stream.get_ref().1.alpn_protocol() == Some(b"h2") {
        return answer_http2(stream).await;
    }
    answer(stream).await
}

/// HTTP/1.1 by hand: hyper would cost twice as much, on the core that the generator runs on.
async fn answer<S: AsyncRead + AsyncWrite + Unpin>(mut stream: S) -> io::Result<()> {
    let mut buffer = Vec::with_capacity(4096);
    loop {
        let Some(end) = http1::read_head(&mut stream, &mut buffer).await? else { return Ok(()) };
        let asked = Asked::read(&buffer[..end]);
        buffer.drain(..end);
        let Some(length) = asked.length() else {
            stream.write_all(b"HTTP/1.1 401 Unauthorized\r\ncontent-length: 0\r\n\r\n").await?;
            stream.flush().await?;
            continue;
        };
        write_answer(&mut stream, length).await?;
    }
}

async fn write_answer<S: AsyncWrite + Unpin>(stream: &mut S, length: usize) -> io::Result<()> {
    let mut first =
        format!("HTTP/1.1 200 OK\r\ncontent-type: text/plain\r\ncontent-length: {length}\r\n\r\n").into_bytes();
    let with_head = length.min(USUAL);
    first.extend_from_slice(&FILLED[..with_head]);
    stream.write_all(&first).await?;
    let mut left = length - with_head;
    while left > 0 {
        let part = left.min(CHUNK);
        stream.write_all(&FILLED[..part]).await?;
        left -= part;
    }
    stream.flush().await
}

/// What of a request decides its answer.
struct Asked {
    authorized: bool,
    bytes: usize,
}

impl Asked {
    fn read(head: &[u8]) -> Self {
        let target = head.split(|byte| *byte == b' ').nth(1).unwrap_or_default();
        let authorization = http1::field(head, "authorization");
        Self { authorized: authorization == Some(AUTHORIZATION.as_bytes()), bytes: bytes_of(target) }
    }

    fn length(&self) -> Option<usize> {
        self.authorized.then_some(self.bytes)
    }
}

fn bytes_of(path: &[u8]) -> usize {
    std::str::from_utf8(path).ok().and_then(|path| path.rsplit_once("/bytes/")?.1.parse().ok()).unwrap_or(USUAL)
}

async fn answer_http2<S: AsyncRead + AsyncWrite + Unpin + Send + 'static>(stream: S) -> io::Result<()> {
    hyper::server::conn::http2::Builder::new(TokioExecutor::new())
        .max_concurrent_streams(1000)
        .serve_connection(
            TokioIo::new(stream),
            service_fn(|request| async move { Ok::<_, Infallible>(http2(&request)) }),
        )
        .await
        .map_err(io::Error::other)
}

fn http2(request: &Request<Incoming>) -> Response<Filling> {
    let authorized = request.headers().get(header::AUTHORIZATION).is_some_and(|value| value == AUTHORIZATION);
    let mut response =
        Response::new(Filling { left: if authorized { bytes_of(request.uri().path().as_bytes()) } else { 0 } });
    if authorized {
        response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain"));
    } else {
        *response.status_mut() = StatusCode::UNAUTHORIZED;
    }
    response
}

/// A body of so many bytes.
struct Filling {
    left: usize,
}

impl Body for Filling {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let part = self.left.min(CHUNK);
        self.left -= part;
        Poll::Ready((part > 0).then(|| Ok(Frame::data(Bytes::from_static(&FILLED[..part])))))
    }

    fn is_end_stream(&self) -> bool {
        self.left == 0
    }

    fn size_hint(&self) -> SizeHint {
        SizeHint::with_exact(self.left as u64)
    }
}

/// A token for whoever asks: client credentials and refresh tokens alike.
async fn give_tokens(stream: TcpStream, lifetime: u32) -> io::Result<()> {
    hyper::server::conn::http1::Builder::new()
        .serve_connection(
            TokioIo::new(stream),
            service_fn(move |_: Request<Incoming>| async move { Ok::<_, Infallible>(token(lifetime)) }),
        )
        .await
        .map_err(io::Error::other)
}

fn token(lifetime: u32) -> Response<Full<Bytes>> {
    let access_token = AUTHORIZATION.trim_start_matches("Bearer ");
    let answer = serde_json::json!({"access_token": access_token, "token_type": "Bearer", "expires_in": lifetime});
    let mut response = Response::new(Full::from(answer.to_string()));
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}
