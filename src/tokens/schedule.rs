//! Renews tokens ahead of their end, those that were used since their last renewal.

use std::collections::HashMap;
use std::sync::{Arc, Weak};

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::time::{DelayQueue, delay_queue};

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
        let mut plans = Plans::default();
        loop {
            tokio::select! {
                () = &mut stop => return,
                plan = incoming.recv() => match plan {
                    Some((key, at)) => plans.put(key, at),
                    None => return,
                },
                Some(key) = plans.next() => {
                    let Some(tokens) = tokens.upgrade() else { return };
                    renew_ahead(&tokens, &key);
                }
            }
        }
    });
    Schedule { planned }
}

/// The next moment of each token: one a token, or a token that is rejected often would leave its old ones behind.
#[derive(Default)]
struct Plans {
    queue: DelayQueue<Key>,
    places: HashMap<Key, delay_queue::Key>,
}

impl Plans {
    fn put(&mut self, key: Key, at: Instant) {
        match self.places.get(&key) {
            Some(place) => self.queue.reset_at(place, at),
            None => {
                let place = self.queue.insert_at(key.clone(), at);
                self.places.insert(key, place);
            }
        }
    }

    async fn next(&mut self) -> Option<Key> {
        let key = self.queue.next().await?.into_inner();
        self.places.remove(&key);
        Some(key)
    }
}

/// A plan can be outdated: the slot alone knows whether the token that it was made for is due now.
fn renew_ahead(tokens: &Arc<Inner>, key: &Key) {
    let slot = tokens.slot(key);
    let mut state = slot.lock();
    if state.due_and_used(tokens.clock.now()) {
        drop(Inner::fly(tokens, &slot, &mut state, Cause::Ahead));
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::names::Subject;

    #[tokio::test(start_paused = true)]
    async fn a_token_has_one_plan_however_often_it_is_renewed() {
        let key = Key { provider: "acme".parse().unwrap(), subject: Subject::Client, target: Arc::default() };
        let (start, mut plans) = (Instant::now(), Plans::default());
        for hours in [1, 9, 3] {
            plans.put(key.clone(), start + Duration::from_secs(3600 * hours));
        }
        assert_eq!((plans.next().await, start.elapsed().as_secs()), (Some(key), 3 * 3600));
        assert_eq!((plans.next().await, plans.places.len()), (None, 0));
    }
}
