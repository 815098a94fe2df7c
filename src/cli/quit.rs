//! `sidebearer quit`: has a sidecar that runs on this machine stop, as SIGTERM would; for Jobs that end before it.

use std::net::SocketAddr;
use std::path::Path;

use http::{Method, StatusCode};

use super::CliError;
use super::ask::{Question, here};
use crate::config;

/// Of whom it is asked.
#[derive(clap::Args)]
pub(super) struct Options {
    /// Where its admin listener is; what proxy.yaml says when left out.
    #[arg(long, value_name = "ADDRESS")]
    address: Option<SocketAddr>,
}

/// Asks it to stop; 0 when it does.
pub(super) async fn quit(config: &Path, options: Options) -> Result<u8, CliError> {
    let (written, token) = config::admin(config)?;
    let Some(address) = options.address.or(written) else {
        return Err(CliError::failed("`admin` is off in proxy.yaml: there is nobody to ask", "send it SIGTERM"));
    };
    let (authority, path) = (here(address).to_string(), "/quit".to_owned());
    let question = Question { method: Method::POST, authority, path, token };
    let hint = "is it running? its log says where its `admin` is";
    let (status, text) = question.ask().await.map_err(|error| CliError::failed(error, hint))?;
    match status {
        StatusCode::ACCEPTED => {
            anstream::println!("it stops as soon as live requests have finished");
            Ok(0)
        }
        StatusCode::NOT_FOUND => {
            Err(CliError::failed("it takes no such request", "write `quit: true` into its proxy.yaml"))
        }
        status => {
            let what = format!("it refused, with {}: {}", status.as_u16(), text.trim());
            Err(CliError::failed(what, "look at `admin` and `admin_token` in proxy.yaml"))
        }
    }
}
