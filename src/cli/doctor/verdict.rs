//! What came of a call, judged by what the proxy saw and never by what the program said.

use super::attempt::{Ended, How};
use super::probes::NOT_CALLED;

/// What the proxy saw of one host.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Seen {
    /// A CONNECT came for it.
    pub connect: bool,
    /// TLS was finished, in HTTP/2 or not.
    pub tls: Option<bool>,
    /// TLS failed, and how.
    pub failed: Option<String>,
    /// A request came, and this is what became of it.
    pub request: Option<Answer>,
}

/// What became of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Answer {
    /// It got a token and an answer from the API.
    Authenticated,
    /// We refused it.
    Refused(String),
}

/// What came of a call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It came through, with a token.
    Ok { protocol: &'static str },
    /// Nothing of it came to the proxy.
    Direct { timed_out: bool },
    /// It came, and its TLS did not.
    Untrusted { why: String },
    /// It came, and was refused.
    Refused { code: String },
    /// The program does not run.
    NotStarted { why: String },
    /// Nobody knows how to try it.
    NotTried { why: String },
}

impl Seen {
    /// Whether nothing more is to be waited for once the program has ended.
    pub fn is_settled(&self) -> bool {
        !self.connect || self.request.is_some() || self.failed.is_some()
    }
}

impl Verdict {
    pub fn of(seen: Seen, ended: &Ended) -> Self {
        match (seen, &ended.how) {
            (Seen { request: Some(Answer::Authenticated), tls, .. }, _) => Verdict::Ok { protocol: protocol(tls) },
            (Seen { request: Some(Answer::Refused(code)), .. }, _) => Verdict::Refused { code },
            (Seen { connect: true, failed, tls, .. }, _) => Verdict::Untrusted { why: no_request(failed, tls) },
            (_, How::NotStarted(why)) => Verdict::NotStarted { why: why.clone() },
            (_, How::Exited(Some(code @ (126 | 127 | NOT_CALLED)))) => Verdict::not_started(*code, &ended.said),
            (_, how) => Verdict::Direct { timed_out: *how == How::TimedOut },
        }
    }

    /// Of a program that ended before it could make a call.
    pub fn not_started(code: i32, said: &str) -> Self {
        let last = said.lines().rev().map(str::trim).find(|line| !line.is_empty());
        let why = last.map_or_else(|| format!("it exits with {code}"), plain);
        Verdict::NotStarted { why }
    }

    /// For scripts; stable.
    pub fn code(&self) -> &'static str {
        match self {
            Verdict::Ok { .. } => "ok",
            Verdict::Direct { .. } => "direct",
            Verdict::Untrusted { .. } => "untrusted",
            Verdict::Refused { .. } => "refused",
            Verdict::NotStarted { .. } => "not_started",
            Verdict::NotTried { .. } => "not_tried",
        }
    }

    /// For people.
    pub fn word(&self) -> &'static str {
        match self {
            Verdict::Ok { .. } => "ok",
            Verdict::Direct { .. } => "goes direct",
            Verdict::Untrusted { .. } => "no trust",
            Verdict::Refused { .. } => "refused",
            Verdict::NotStarted { .. } => "does not start",
            Verdict::NotTried { .. } => "not tried",
        }
    }

    /// What was seen.
    pub fn detail(&self) -> String {
        match self {
            Verdict::Ok { protocol } => (*protocol).to_owned(),
            Verdict::Direct { timed_out: false } => "nothing of it came to the proxy".to_owned(),
            Verdict::Direct { timed_out: true } => "nothing of it came to the proxy in 10 s".to_owned(),
            Verdict::Untrusted { why } => format!("it uses the proxy and does not trust the CA: {why}"),
            Verdict::Refused { code } => format!("its request was refused: {code}"),
            Verdict::NotStarted { why } | Verdict::NotTried { why } => why.clone(),
        }
    }

    pub fn is_ok(&self) -> bool {
        matches!(self, Verdict::Ok { .. })
    }

    /// Whether it says something of the runtime.
    pub fn is_tried(&self) -> bool {
        !matches!(self, Verdict::NotTried { .. })
    }
}

/// What was spoken in a tunnel.
pub(super) fn protocol(tls: Option<bool>) -> &'static str {
    match tls {
        Some(true) => "HTTP/2",
        Some(false) => "HTTP/1.1",
        // `http://` through the proxy.
        None => "without TLS",
    }
}

/// Clients built on GnuTLS finish the handshake first, and look at the certificate then.
fn no_request(failed: Option<String>, tls: Option<bool>) -> String {
    match (failed, tls) {
        (Some(error), _) => error,
        (None, Some(_)) => "it hung up right after the handshake".to_owned(),
        (None, None) => "no TLS came".to_owned(),
    }
}

/// A line of a program's as it may be shown: without control characters, and without what a URL may hold before its `@`.
fn plain(line: &str) -> String {
    let words = line.split(' ').map(|word| match (word.find("://"), word.rfind('@')) {
        (Some(scheme), Some(at)) if scheme < at => format!("{}{}", &word[..scheme + 3], &word[at + 1..]),
        _ => word.to_owned(),
    });
    let line: String = words.collect::<Vec<_>>().join(" ").chars().filter(|c| !c.is_control()).take(200).collect();
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    fn verdict(seen: Seen, how: How, said: &str) -> Verdict {
        Verdict::of(seen, &Ended { how, said: said.to_owned() })
    }

    fn failed() -> How {
        How::Exited(Some(1))
    }

    #[test]
    fn what_the_proxy_saw_decides_and_not_how_the_program_ended() {
        let came = Seen { connect: true, tls: Some(true), request: Some(Answer::Authenticated), ..Seen::default() };
        assert_eq!(verdict(came.clone(), failed(), "error!"), Verdict::Ok { protocol: "HTTP/2" });
        assert_eq!(verdict(came, How::TimedOut, ""), Verdict::Ok { protocol: "HTTP/2" });
        let nothing = verdict(Seen::default(), How::Exited(Some(0)), "all is well");
        assert_eq!(nothing, Verdict::Direct { timed_out: false });
        assert_eq!(verdict(Seen::default(), How::TimedOut, ""), Verdict::Direct { timed_out: true });
    }

    #[test]
    fn a_connect_without_a_request_is_a_matter_of_trust_however_it_shows() {
        let connect = Seen { connect: true, ..Seen::default() };
        let why = |seen| match verdict(seen, failed(), "") {
            Verdict::Untrusted { why } => why,
            other => panic!("{other:?}"),
        };
        let alert = "received fatal alert: UnknownCA".to_owned();
        assert_eq!(why(Seen { failed: Some(alert.clone()), ..connect.clone() }), alert);
        assert_eq!(why(Seen { tls: Some(false), ..connect.clone() }), "it hung up right after the handshake");
        assert_eq!(why(connect), "no TLS came");
    }

    #[test]
    fn a_program_that_does_not_get_as_far_as_a_call_does_not_go_direct() {
        let why = |how, said| match verdict(Seen::default(), how, said) {
            Verdict::NotStarted { why } => why,
            other => panic!("{other:?}"),
        };
        assert_eq!(why(How::NotStarted("no such file".into()), ""), "no such file");
        assert_eq!(
            why(How::Exited(Some(NOT_CALLED)), "Traceback\nNo module named 'idna'\n\n"),
            "No module named 'idna'"
        );
        assert_eq!(why(How::Exited(Some(127)), ""), "it exits with 127");
    }

    #[test]
    fn what_a_program_says_is_shown_without_credentials_and_control_characters() {
        let said = Verdict::not_started(1, "no proxy at http://ada:hunter2@corp:8080/ \x1b[31mred");
        assert_eq!(said.detail(), "no proxy at http://corp:8080/ [31mred");
    }
}
