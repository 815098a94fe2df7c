//! `doctor --run -- CMD`: runs a command behind a sidecar of its own, and tells what came to it.

use std::collections::BTreeMap;
use std::ffi::OsString;

use serde_json::{Value, json};
use tokio::sync::broadcast::{Receiver, error::RecvError};
use tokio::sync::oneshot;

use super::super::exec::{self, Prepared};
use super::bench;
use crate::app::child;
use crate::cli::CliError;
use crate::config::Settings;
use crate::events::{self, Event, Tunnel, TunnelStep};
use crate::names::UserName;

/// Runs it with its output on standard error, so that the report has standard output for itself.
const ASIDE: &str = "exec \"$@\" >&2";

/// Runs the command, prints what came, and gives 0 where something did and all of it was well.
pub(super) async fn run(settings: Option<Settings>, command: &[OsString], json: bool) -> Result<u8, CliError> {
    let folder = bench::folder()?;
    let settings = exec::private(settings.map_or_else(|| bench::no_routes(folder.path()), Ok)?);
    let Prepared { app, variables, folder: _prepared } = exec::prepare(&settings, UserName::default()).await?;
    let (tunnels, requests) = (app.events.watch_tunnels(), app.events.watch());
    let ((ended, stop), (over, gone)) = (oneshot::channel::<()>(), oneshot::channel::<()>());
    let watching = tokio::spawn(Heard::all(tunnels, requests, gone));
    let sidecar = tokio::spawn(app.run(async {
        let _ = stop.await;
    }));
    let aside = ["sh", "-c", ASIDE, "sh"].map(OsString::from);
    let command: Vec<OsString> = aside.into_iter().chain(command.iter().cloned()).collect();
    let code = child::run(&command, variables, &settings.secret_variables).await;
    let _ = ended.send(());
    let _ = sidecar.await;
    let _ = over.send(());
    let heard = watching.await.unwrap_or_default();
    let code = code?;
    match json {
        true => anstream::println!("{:#}", heard.json(code)),
        false => anstream::println!("{}", heard.table(code)),
    }
    Ok(u8::from(!heard.is_ok()))
}

/// What came, by the authority that it was for.
#[derive(Debug, Default)]
struct Heard {
    hosts: BTreeMap<String, Host>,
}

/// What came for one authority.
#[derive(Debug, Default)]
struct Host {
    tunnels: usize,
    h2: Option<bool>,
    failed: usize,
    error: String,
    requests: usize,
    passed_on: usize,
    refused: Option<&'static str>,
}

impl Heard {
    /// Listens until the sidecar is gone.
    async fn all(
        mut tunnels: Receiver<Tunnel>,
        mut requests: Receiver<Event>,
        mut gone: oneshot::Receiver<()>,
    ) -> Self {
        let mut heard = Self::default();
        loop {
            tokio::select! {
                // What was told before the end is heard before it.
                biased;
                tunnel = tunnels.recv() => match tunnel {
                    Ok(tunnel) => heard.tunnel(tunnel),
                    Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return heard,
                },
                event = requests.recv() => match event {
                    Ok(Event::Request(request)) => heard.request(&request),
                    Ok(_) | Err(RecvError::Lagged(_)) => {}
                    Err(RecvError::Closed) => return heard,
                },
                _ = &mut gone => return heard,
            }
        }
    }

    fn tunnel(&mut self, tunnel: Tunnel) {
        let host = self.hosts.entry(tunnel.authority).or_default();
        match tunnel.step {
            TunnelStep::Open => host.tunnels += 1,
            TunnelStep::Tls { h2 } => host.h2 = Some(h2),
            TunnelStep::Failed { error } => (host.failed, host.error) = (host.failed + 1, error),
        }
    }

    fn request(&mut self, request: &events::Request) {
        let host = self.hosts.entry(request.authority.to_string()).or_default();
        match request.method == http::Method::CONNECT && request.code.is_none() {
            true => host.passed_on += 1,
            false => host.requests += 1,
        }
        host.refused = host.refused.or(request.code);
    }

    fn is_ok(&self) -> bool {
        !self.hosts.is_empty() && self.hosts.values().all(|host| matches!(host.verdict().0, "ok" | "passed_on"))
    }

    fn table(&self, code: u8) -> String {
        let mut lines = vec![format!("the command ended with {code}, and this came to the proxy:")];
        let width = self.hosts.keys().map(String::len).max().unwrap_or_default();
        for (authority, host) in &self.hosts {
            let (_, word, detail) = host.told();
            lines.push(format!("{authority:width$}  {word:9}  {detail}"));
        }
        if self.hosts.is_empty() {
            lines.push("nothing: it made no call, or it went around the proxy".to_owned());
            lines.push("    fix: `sidebearer doctor -- CMD` tries its runtime".to_owned());
        }
        lines.join("\n")
    }

    fn json(&self, code: u8) -> Value {
        let host = |(authority, host): (&String, &Host)| {
            let (verdict, _, detail) = host.told();
            json!({ "authority": authority, "verdict": verdict, "detail": detail })
        };
        json!({ "ok": self.is_ok(), "exit_code": code, "hosts": self.hosts.iter().map(host).collect::<Vec<_>>() })
    }
}

impl Host {
    /// For scripts, and for people.
    fn verdict(&self) -> (&'static str, &'static str) {
        match self {
            Host { refused: Some(_), .. } => ("refused", "refused"),
            Host { failed: 1.., requests: 0, .. } => ("untrusted", "no trust"),
            Host { passed_on: 1.., requests: 0, .. } => ("passed_on", "passed on"),
            _ => ("ok", "ok"),
        }
    }

    /// Its verdict, with what was seen.
    fn told(&self) -> (&'static str, &'static str, String) {
        let (verdict, word) = self.verdict();
        let detail = match verdict {
            "refused" => format!("with `{}`", self.refused.unwrap_or_default()),
            "untrusted" => format!("{} of {} tunnels: {}", self.failed, self.tunnels, self.error),
            "passed_on" => format!("{}: no route names it", counted(self.passed_on, "tunnel")),
            _ => format!("{}, {}", counted(self.requests, "request"), super::verdict::protocol(self.h2)),
        };
        (verdict, word, detail)
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tunnel(heard: &mut Heard, host: &str, step: TunnelStep) {
        heard.tunnel(Tunnel { authority: format!("{host}:443"), step });
    }

    #[test]
    fn a_host_whose_tunnels_all_failed_is_one_of_no_trust_and_an_unused_tunnel_beside_requests_is_not() {
        let mut heard = Heard::default();
        assert!(!heard.is_ok() && heard.table(0).contains("nothing: it made no call"));
        for _ in 0..2 {
            tunnel(&mut heard, "a.test", TunnelStep::Open);
            tunnel(&mut heard, "a.test", TunnelStep::Failed { error: "received fatal alert: UnknownCA".into() });
        }
        assert!(!heard.is_ok());
        let said = "the command ended with 3, and this came to the proxy:\n\
                    a.test:443  no trust   2 of 2 tunnels: received fatal alert: UnknownCA";
        assert_eq!(heard.table(3), said);
        let host = heard.hosts.get_mut("a.test:443").unwrap();
        (host.requests, host.h2) = (1, Some(true));
        assert_eq!(host.told(), ("ok", "ok", "1 request, HTTP/2".to_owned()));
        assert!(heard.is_ok());
    }
}
