//! What has happened lately, and what happens: for the dashboard's list and its live view.

use std::time::SystemTime;

use futures_util::Stream;
use futures_util::stream;
use serde::Serialize;
use time::OffsetDateTime;
use tokio::sync::broadcast;

use crate::connections::spoken;
use crate::drain::Drain;
use crate::events::{Event, Events, Missing, Request, Token, TokenChange};

/// So many moments are kept for whoever comes later.
const KEPT: usize = 100;
/// How often a stream without news says that it is alive, so that nobody on the way closes it.
const ALIVE: std::time::Duration = std::time::Duration::from_secs(15);

/// The last moments, and those to come. A clone is the same.
#[derive(Clone)]
pub(super) struct Live {
    events: Events,
    drain: Drain,
}

/// One thing that happened, as people read it. Holds no secret and no query.
#[derive(Debug, Clone, Default, Serialize)]
pub(super) struct Moment {
    /// The time of day, UTC.
    pub at: String,
    /// `request`, `token` or `consent`.
    pub kind: &'static str,
    /// `good`, `odd` or `bad`.
    pub level: &'static str,
    pub what: String,
    pub outcome: String,
    pub note: String,
    pub route: String,
    pub took: String,
}

impl Live {
    /// Has the last moments kept from now on.
    pub fn start(events: &Events, drain: &Drain) -> Self {
        events.keep(KEPT);
        Self { events: events.clone(), drain: drain.clone() }
    }

    /// The last moments, newest first.
    pub fn recent(&self) -> Vec<Moment> {
        self.events.recent().iter().map(|(at, event)| Moment::of(*at, event)).collect()
    }

    /// The moments to come, as server-sent events, until the stop begins.
    pub fn stream(&self) -> impl Stream<Item = String> + Send + use<> {
        let (coming, stop) = (self.events.watch(), Box::pin(self.drain.started()));
        stream::unfold((coming, stop, true), |(mut coming, mut stop, first)| async move {
            if first {
                return Some((": here\n\n".to_owned(), (coming, stop, false)));
            }
            let text = tokio::select! {
                () = &mut stop => return None,
                () = tokio::time::sleep(ALIVE) => ":\n\n".to_owned(),
                event = coming.recv() => match event {
                    Ok(event) => format!("data: {}\n\n", Moment::of(SystemTime::now(), &event).json()),
                    Err(broadcast::error::RecvError::Lagged(_)) => ": too fast\n\n".to_owned(),
                    Err(broadcast::error::RecvError::Closed) => return None,
                },
            };
            Some((text, (coming, stop, false)))
        })
    }
}

impl Moment {
    fn of(at: SystemTime, event: &Event) -> Self {
        let moment = match event {
            Event::Request(request) => Self::of_request(request),
            Event::Token(token) => Self::of_token(token),
            Event::Missing(missing) => Self::of_missing(missing),
        };
        let (hour, minute, second) = OffsetDateTime::from(at).to_hms();
        Self { at: format!("{hour:02}:{minute:02}:{second:02}"), ..moment }
    }

    fn json(&self) -> String {
        serde_json::to_string(self).unwrap_or_default()
    }

    fn of_request(request: &Request) -> Self {
        let status = request.status.map(|status| status.as_u16());
        let mut notes = Vec::new();
        notes.extend(request.code.map(|code| code.replace('_', " ")));
        notes.extend(request.retried.then(|| "sent twice".to_owned()));
        notes.extend(request.passed.map(|why| format!("not sent again: {}", why.replace('_', " "))));
        notes.extend(request.agent.as_ref().map(|agent| format!("by {agent}")));
        notes.extend(request.user.as_ref().filter(|_| request.provider.is_some()).map(|user| format!("for {user}")));
        Self {
            kind: "request",
            level: match status {
                Some(..400) if request.retried => "odd",
                Some(..400) => "good",
                _ => "bad",
            },
            what: format!("{} {}{}", request.method, request.authority, request.path),
            outcome: status.map_or_else(|| "gone".to_owned(), |status| status.to_string()),
            note: notes.join(", "),
            route: request.route.as_deref().unwrap_or_default().to_owned(),
            took: format!("{:.1} ms", request.took.as_secs_f64() * 1000.0),
            ..Self::default()
        }
    }

    fn of_token(token: &Token) -> Self {
        let what = format!("{} for {}", token.provider, token.subject);
        let (level, outcome, note) = match &token.what {
            TokenChange::Obtained { cause, lifetime, .. } => {
                let lives = lifetime.map(|life| format!("good for {}", spoken(life)));
                let outcome = match *cause {
                    "consent" => "connected",
                    "needed" => "fetched",
                    _ => "renewed",
                };
                ("good", outcome, lives.unwrap_or_default())
            }
            TokenChange::Adopted { .. } => ("good", "found in the store", String::new()),
            TokenChange::Failed { error, serving_old: true, .. } => ("odd", "not renewed yet", error.clone()),
            TokenChange::Failed { error, .. } => ("bad", "none", error.clone()),
            TokenChange::Disconnected => ("odd", "disconnected", String::new()),
            TokenChange::Rejected { .. } => ("odd", "rejected with 401", String::new()),
        };
        Self { kind: "token", level, what, outcome: outcome.into(), note, ..Self::default() }
    }

    fn of_missing(missing: &Missing) -> Self {
        let note = match missing.wait {
            Some(wait) => format!("a request waits up to {}", spoken(wait)),
            None => String::new(),
        };
        let what = format!("{} has to connect {}", missing.user, missing.title);
        Self { kind: "consent", level: "odd", what, outcome: "not connected".into(), note, ..Self::default() }
    }
}
