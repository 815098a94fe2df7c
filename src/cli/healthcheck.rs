//! `sidebearer healthcheck`: a probe of a sidecar that runs, for images that have no shell and no curl.

use std::net::SocketAddr;
use std::path::Path;

use http::Method;
use url::Url;

use super::CliError;
use super::ask::{Question, here};
use crate::config;

/// What is asked, and of whom.
#[derive(clap::Args)]
pub(super) struct Options {
    /// Whether it takes requests, and not only whether it lives: not before its start, and not while it stops.
    #[arg(long)]
    ready: bool,
    /// Whether it has started.
    #[arg(long, conflicts_with = "ready")]
    startup: bool,
    /// Where its health listener is; what proxy.yaml says when left out.
    #[arg(long, env = "SIDEBEARER_HEALTH", value_name = "ADDRESS")]
    address: Option<SocketAddr>,
    /// Ask this instead, an `http` URL.
    #[arg(long, conflicts_with_all = ["ready", "startup"], value_name = "URL")]
    url: Option<Url>,
}

/// Prints the answer; 0 when it is a good one.
pub(super) async fn healthcheck(config: &Path, options: Options) -> Result<u8, CliError> {
    let path = match (options.ready, options.startup) {
        (true, _) => "/readyz",
        (_, true) => "/startupz",
        _ => "/livez",
    };
    let (authority, path) = match &options.url {
        Some(url) => asked(url)?,
        None => (listener(config, options.address)?.to_string(), path.to_owned()),
    };
    let question = Question { method: Method::GET, authority, path: path.clone(), token: None };
    let hint = "is it running? its log says where its `health` is";
    let (status, text) = question.ask().await.map_err(|error| CliError::failed(error, hint))?;
    if status.is_success() {
        anstream::print!("{text}");
        return Ok(0);
    }
    let what = format!("{path} was answered with {}: {}", status.as_u16(), text.trim());
    Err(CliError::failed(what, "its log says what it waits for, or that it stops"))
}

fn listener(config: &Path, given: Option<SocketAddr>) -> Result<SocketAddr, CliError> {
    let found = match given {
        Some(address) => Some(address),
        None => config::health(config)?,
    };
    let off = || CliError::failed("`health` is off in proxy.yaml: there is nothing to ask", "leave out `health: off`");
    let open = || CliError::failed("`health` has port 0: nobody knows which port it got", "write a port");
    let address = found.ok_or_else(off)?;
    if address.port() == 0 { Err(open()) } else { Ok(here(address)) }
}

fn asked(url: &Url) -> Result<(String, String), CliError> {
    let host = url.host_str().filter(|_| url.scheme() == "http");
    let host =
        host.ok_or_else(|| CliError::failed("only an `http` URL can be asked", "as http://127.0.0.1:3130/livez"))?;
    let path = &url[url::Position::BeforePath..url::Position::AfterQuery];
    Ok((format!("{host}:{}", url.port_or_known_default().unwrap_or(80)), path.to_owned()))
}
