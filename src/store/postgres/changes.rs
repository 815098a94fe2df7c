//! What other sidecars change: told by `NOTIFY`, and looked for where nothing can be told.
//!
//! A connection of its own listens. It also tells itself something now and then, and believes in the silence of others only
//! as long as it hears that: behind a pooler that hands connections around, a `LISTEN` is taken and nothing ever comes.

use std::collections::HashSet;
use std::future::poll_fn;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use tokio::sync::Notify;
use tokio::sync::mpsc::{self, UnboundedReceiver};
use tokio::time::Instant;
use tokio_postgres::types::Type;
use tokio_postgres::{AsyncMessage, Client, Notification};
use tokio_util::task::AbortOnDropHandle;

use super::super::engine::{Change, Changes, Names, Result};
use super::{Connected, DEADLINE, Postgres};

/// Begins to listen.
pub(super) fn listen(postgres: Postgres) -> Told {
    let news = Arc::new(News::default());
    let listening = tokio::spawn(go_on_listening(postgres, news.clone()));
    Told { news, _listening: AbortOnDropHandle::new(listening) }
}

/// What a notification says: from whom it is, and of which grant.
pub(super) fn news(origin: &str, names: &Names) -> String {
    serde_json::json!([origin, names.provider.as_str(), names.subject.as_str()]).to_string()
}

/// What was told and not asked for yet.
pub(super) struct Told {
    news: Arc<News>,
    _listening: AbortOnDropHandle<()>,
}

#[async_trait]
impl Changes for Told {
    async fn next(&mut self) -> Change {
        loop {
            if let Some(change) = self.news.take() {
                return change;
            }
            self.news.more.notified().await;
        }
    }
}

/// Each change once, however often it is told before somebody asks.
#[derive(Default)]
struct News {
    waiting: Mutex<Waiting>,
    more: Notify,
}

#[derive(Default)]
struct Waiting {
    anything: bool,
    of: HashSet<Names>,
}

impl News {
    fn add(&self, change: Option<Names>) {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        match change {
            Some(names) if waiting.of.len() < KEPT_APART => drop(waiting.of.insert(names)),
            _ => waiting.anything = true,
        }
        drop(waiting);
        self.more.notify_one();
    }

    fn take(&self) -> Option<Change> {
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if std::mem::take(&mut waiting.anything) {
            waiting.of.clear();
            return Some(Change::Anything);
        }
        let names = waiting.of.iter().next()?.clone();
        waiting.of.remove(&names);
        Some(Change::Of(names.provider, names.subject))
    }
}

async fn go_on_listening(postgres: Postgres, news: Arc<News>) {
    let mut away = false;
    loop {
        if let Err(error) = hear(&postgres, &news, &mut away).await
            && !std::mem::replace(&mut away, true)
        {
            tracing::warn!(%error, "the store is away: valid tokens go on being used, and none is renewed");
        }
        news.add(None);
        tokio::time::sleep(LOOK_EVERY).await;
    }
}

/// Listens for as long as the connection lives.
async fn hear(postgres: &Postgres, news: &News, away: &mut bool) -> Result<()> {
    let inner = &postgres.inner;
    let connected = postgres.in_time(inner.servers.patience(), inner.servers.reach()).await?;
    let (client, mut heard, _driving) = drive(connected);
    let own = format!("sidebearer_{}", inner.origin);
    postgres.in_time(SIGN_WITHIN, client.batch_execute(&format!("LISTEN sidebearer; LISTEN {own}"))).await?;
    if std::mem::take(away) {
        tracing::info!("the store can be reached again");
    }

    let mut line = Line { last: None, since: Instant::now() };
    let (mut look, mut sign) = (tokio::time::interval(LOOK_EVERY), tokio::time::interval(SIGN_EVERY));
    loop {
        tokio::select! {
            biased;
            notification = heard.recv() => match notification {
                Some(notification) => line.hears(&inner.origin, &own, &notification, news),
                None => return Err(postgres.away("the connection has ended".into())),
            },
            _ = sign.tick() => {
                // From another connection, as others' news come: a pooler may give us back what we say on our own.
                let sign = "SELECT pg_catalog.pg_notify($1, '')";
                postgres.query(sign, &[(&own, Type::TEXT)]).await?;
            }
            _ = look.tick() => {
                if line.is_dead() {
                    return Err(postgres.away("nothing is heard any more".into()));
                }
                if line.is_silent() {
                    news.add(None);
                }
            }
        }
    }
}

/// Runs a connection until it is dropped, and gives what is told on it.
fn drive((client, mut connection): Connected) -> (Client, UnboundedReceiver<Notification>, AbortOnDropHandle<()>) {
    let (sender, heard) = mpsc::unbounded_channel();
    let driving = tokio::spawn(async move {
        while let Some(Ok(message)) = poll_fn(|context| connection.poll_message(context)).await {
            if let AsyncMessage::Notification(notification) = message
                && sender.send(notification).is_err()
            {
                return;
            }
        }
    });
    (client, heard, AbortOnDropHandle::new(driving))
}

/// Whether something is heard on a connection.
struct Line {
    last: Option<Instant>,
    since: Instant,
}

impl Line {
    fn hears(&mut self, origin: &str, own: &str, notification: &Notification, news: &News) {
        if self.is_silent() {
            // What was told before could not be heard.
            news.add(None);
        }
        self.last = Some(Instant::now());
        if notification.channel() == own {
            return;
        }
        match serde_json::from_str::<(String, String, String)>(notification.payload()) {
            Ok((from, ..)) if from == origin => {}
            Ok((_, provider, subject)) => news.add(Names::parse(&provider, &subject)),
            Err(_) => news.add(None),
        }
    }

    /// Nothing has been heard for so long that one has to look.
    fn is_silent(&self) -> bool {
        self.last.is_none_or(|last| last.elapsed() > SIGN_EVERY + SIGN_WITHIN)
    }

    /// It was heard once, and is no more.
    fn is_dead(&self) -> bool {
        self.last.is_some() && self.is_silent() && self.since.elapsed() > DEADLINE
    }
}

/// How often it is looked for changes while nothing can be heard.
const LOOK_EVERY: Duration = Duration::from_millis(500);
const SIGN_EVERY: Duration = Duration::from_secs(2);
const SIGN_WITHIN: Duration = Duration::from_secs(2);
/// Beyond this many grants it is looked at all of them.
const KEPT_APART: usize = 1000;
