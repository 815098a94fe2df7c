//! One line of the trail: JSON in which nothing is a control character.

use std::io;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use http::StatusCode;
use serde::Serialize;
use serde_json::ser::Formatter;
use time::OffsetDateTime;

use super::Facts;
use crate::names::Subject;

/// Of a path, at most so many bytes.
const LONGEST_PATH: usize = 1024;
/// What stands where a path was cut; no path has it.
const CUT: &str = "…";

/// A use, or the intent of one.
pub(super) struct Line {
    pub facts: Arc<Facts>,
    /// None in an intent.
    pub end: Option<End>,
}

/// How a use ended.
pub(super) struct End {
    pub sent: bool,
    pub status: Option<StatusCode>,
    pub outcome: &'static str,
    pub took: Duration,
}

#[derive(Serialize)]
struct Written<'a> {
    time: String,
    run: &'a str,
    seq: u64,
    event: &'static str,
    request: u64,
    #[serde(rename = "try")]
    attempt: u8,
    agent: Option<&'a str>,
    user: &'a str,
    provider: &'a str,
    credential: &'static str,
    generation: u64,
    route: &'a str,
    method: &'a str,
    host: String,
    path: String,
    #[serde(flatten)]
    end: Option<WrittenEnd>,
}

#[derive(Serialize)]
struct WrittenEnd {
    sent: bool,
    status: Option<u16>,
    outcome: &'static str,
    took_ms: f64,
}

impl Line {
    /// Appends it, with its number in this run, and the end of the line.
    pub fn write(&self, run: &str, seq: u64, to: &mut Vec<u8>) {
        let Facts { at, request, attempt, agent, user, provider, subject, generation, route, method, host, path } =
            &*self.facts;
        let end = self.end.as_ref().map(|end| WrittenEnd {
            sent: end.sent,
            status: end.status.map(|status| status.as_u16()),
            outcome: end.outcome,
            took_ms: (end.took.as_secs_f64() * 10_000.0).round() / 10.0,
        });
        let written = Written {
            time: rfc3339(*at),
            run,
            seq,
            event: if end.is_some() { "use" } else { "intent" },
            request: *request,
            attempt: *attempt,
            agent: agent.as_deref(),
            user: user.as_str(),
            provider: provider.as_str(),
            credential: if *subject == Subject::Client { "client" } else { "user" },
            generation: *generation,
            route,
            method: method.as_str(),
            host: host.to_string(),
            path: cut(path),
            end,
        };
        let mut serializer = serde_json::Serializer::with_formatter(&mut *to, Visible);
        written.serialize(&mut serializer).expect("memory takes what is plain data");
        to.push(b'\n');
    }
}

/// In UTC, with milliseconds.
fn rfc3339(at: SystemTime) -> String {
    let at = OffsetDateTime::from(at);
    let ((year, month, day), (hour, minute, second, ms)) = (at.to_calendar_date(), at.to_hms_milli());
    let month = u8::from(month);
    format!("{year:04}-{month:02}-{day:02}T{hour:02}:{minute:02}:{second:02}.{ms:03}Z")
}

fn cut(path: &str) -> String {
    if path.len() <= LONGEST_PATH {
        return path.to_owned();
    }
    let end = (0..=LONGEST_PATH).rev().find(|end| path.is_char_boundary(*end)).unwrap_or_default();
    format!("{}{CUT}", &path[..end])
}

/// JSON on one line in which every character is seen: no terminal and no reader of lines is led astray.
struct Visible;

impl Formatter for Visible {
    fn write_string_fragment<W: ?Sized + io::Write>(&mut self, to: &mut W, text: &str) -> io::Result<()> {
        let mut rest = text;
        while let Some(at) = rest.find(is_hidden) {
            let (before, from) = rest.split_at(at);
            let hidden = from.chars().next().unwrap_or_default();
            to.write_all(before.as_bytes())?;
            for unit in hidden.encode_utf16(&mut [0; 2]) {
                write!(to, "\\u{unit:04x}")?;
            }
            rest = &from[hidden.len_utf8()..];
        }
        to.write_all(rest.as_bytes())
    }
}

/// Controls, the other ends of a line, what turns the direction of a text, and what is not seen at all.
fn is_hidden(c: char) -> bool {
    let in_text = matches!(c, '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}' | '\u{e0000}'..='\u{e0fff}');
    let between = matches!(c, '\u{200b}'..='\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}');
    c.is_control() || in_text || between
}
