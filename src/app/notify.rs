//! Tells whoever is configured to be told that a user has to connect: a webhook, a command.

use std::collections::HashMap;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;
use tokio::process::Command;
use tokio::sync::broadcast::{self, error::RecvError};
use tokio::sync::{Semaphore, watch};

use crate::drain::Drain;
use crate::events::{Events, Missing};
use crate::names::ProviderName;
use crate::oauth::{OnMissing, Provider};
use crate::secret::Secret;
use crate::systemd;
use crate::upstream::Calls;

/// How long a command may take.
const COMMAND: Duration = Duration::from_secs(30);
/// So many are told at once.
const AT_ONCE: usize = 8;
/// So many may wait to be told; beyond, nobody is: an agent may make up any number of users.
const WAITING: usize = 1000;
/// As much of a webhook's answer as is read.
const ANSWER: usize = 4 << 10;

/// Who is told, of which provider.
pub(super) type Told = HashMap<ProviderName, OnMissing>;

/// Who is to be told, as these providers have it.
pub(super) fn told(providers: &[Arc<Provider>]) -> Told {
    let wanted = providers
        .iter()
        .filter(|provider| provider.on_missing.webhook.is_some() || !provider.on_missing.command.is_empty());
    wanted.map(|provider| (provider.name.clone(), provider.on_missing.clone())).collect()
}

/// Waits for what is to be told.
pub(super) struct Notifier {
    told: watch::Receiver<Told>,
    calls: Arc<Calls>,
    events: Events,
    /// None where nobody is to be told.
    missing: Option<broadcast::Receiver<Missing>>,
    drain: Drain,
}

impl Notifier {
    pub(super) fn new(told: watch::Receiver<Told>, calls: Arc<Calls>, events: &Events, drain: &Drain) -> Self {
        let mut notifier = Self { told, calls, events: events.clone(), missing: None, drain: drain.clone() };
        notifier.listen();
        notifier
    }

    /// Watches where somebody is to be told, and goes on where it did so before.
    fn listen(&mut self) {
        let missing = self.missing.take().unwrap_or_else(|| self.events.watch_missing());
        self.missing = Some(missing).filter(|_| !self.told.borrow_and_update().is_empty());
    }

    /// Tells, until the stop begins.
    pub(super) async fn run(mut self) {
        let stop = self.drain.started();
        tokio::pin!(stop);
        let (waiting, at_once) = (Arc::new(Semaphore::new(WAITING)), Arc::new(Semaphore::new(AT_ONCE)));
        loop {
            let told_of = tokio::select! {
                () = &mut stop => return,
                changed = self.told.changed() => match changed {
                    Ok(()) => {
                        self.listen();
                        continue;
                    }
                    Err(_) => return,
                },
                one = next(&mut self.missing) => one,
            };
            match told_of {
                Ok(missing) => {
                    let Some(whom) = self.told.borrow().get(&missing.provider).cloned() else { continue };
                    let Ok(place) = waiting.clone().try_acquire_owned() else {
                        tracing::warn!(provider = %missing.provider, "too many users have to connect: one is not told");
                        continue;
                    };
                    // Side by side: a webhook that hangs must not keep the next user waiting.
                    let (calls, at_once) = (self.calls.clone(), at_once.clone());
                    tokio::spawn(async move {
                        let _turn = at_once.acquire().await;
                        tell(calls, whom, missing).await;
                        drop(place);
                    });
                }
                Err(RecvError::Lagged(_)) => {}
                Err(RecvError::Closed) => return,
            }
        }
    }
}

/// The next one who has to connect; none ever where nobody is to be told.
async fn next(missing: &mut Option<broadcast::Receiver<Missing>>) -> Result<Missing, RecvError> {
    match missing {
        Some(missing) => missing.recv().await,
        None => std::future::pending().await,
    }
}

async fn tell(calls: Arc<Calls>, whom: OnMissing, missing: Missing) {
    let provider = &missing.provider;
    if let Some(url) = &whom.webhook {
        let message = json!({
            "event": "not_connected",
            "provider": provider.as_str(),
            "title": missing.title,
            "user": missing.user.as_str(),
            "connect_url": missing.connect_url,
            "waits_s": missing.wait.map(|wait| wait.as_secs()),
        });
        match calls.post_json(url, &Secret::new(message.to_string()), ANSWER).await {
            Ok(reply) if reply.status.is_success() => {}
            Ok(reply) => tracing::warn!(%provider, status = reply.status.as_u16(), "the webhook refused the message"),
            Err(error) => tracing::warn!(%provider, %error, "the webhook could not be told"),
        }
    }
    if let Some((program, arguments)) = whom.command.split_first() {
        // Never through a shell: the link is one argument, whatever is in it.
        let mut command = Command::new(program);
        command.args(arguments).arg(&missing.connect_url).stdin(Stdio::null()).stdout(Stdio::null());
        command.stderr(Stdio::null()).kill_on_drop(true);
        for name in systemd::VARIABLES {
            command.env_remove(name);
        }
        match tokio::time::timeout(COMMAND, command.status()).await {
            Ok(Ok(status)) if status.success() => {}
            Ok(Ok(status)) => tracing::warn!(%provider, %status, "the command that tells a user failed"),
            Ok(Err(error)) => tracing::warn!(%provider, %error, "the command that tells a user does not start"),
            Err(_) => tracing::warn!(%provider, "the command that tells a user took longer than 30 s, and was ended"),
        }
    }
}
