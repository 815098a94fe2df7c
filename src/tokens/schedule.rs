//! Renews tokens ahead of their end, those that were used since their last renewal.

use std::sync::{Arc, Weak};

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::time::DelayQueue;

use super::{Cause, Inner, Key};
use crate::drain::Drain;

/// Takes the moments at which to look at a token again.
pub(super) struct Schedule {
    planned: mpsc::UnboundedSender<(Key, Instant)>,
}

impl Schedule {
    pub(super) fn at(&self, key: Key, at: Instant) {
        // The only error is that the stop has begun, and nothing is renewed ahead any more.
        let _ = self.planned.send((key, at));
    }
}

/// Starts the one task that waits for all of them.
pub(super) fn start(tokens: Weak<Inner>, drain: &Drain) -> Schedule {
    let (planned, mut incoming) = mpsc::unbounded_channel();
    let stop = drain.started();
    tokio::spawn(async move {
        tokio::pin!(stop);
        let mut queue = DelayQueue::new();
        loop {
            tokio::select! {
                () = &mut stop => return,
                plan = incoming.recv() => match plan {
                    Some((key, at)) => { queue.insert_at(key, at); }
                    None => return,
                },
                Some(due) = queue.next() => {
                    let Some(tokens) = tokens.upgrade() else { return };
                    renew_ahead(&tokens, &due.into_inner());
                }
            }
        }
    });
    Schedule { planned }
}

/// A plan can be outdated: the slot alone knows whether the token that it was made for is due now.
fn renew_ahead(tokens: &Arc<Inner>, key: &Key) {
    let slot = tokens.slot(key);
    let mut state = slot.lock();
    if state.due_and_used(tokens.clock.now()) {
        let _ = Inner::fly(tokens, &slot, &mut state, Cause::Ahead);
    }
}
