//! Renews tokens ahead of their end, those that were used since their last renewal.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::{Arc, Weak};

use futures_util::StreamExt;
use tokio::sync::mpsc;
use tokio::time::Instant;
use tokio_util::time::{DelayQueue, delay_queue};

use super::Inner;
use super::slot::Slot;
use crate::drain::Drain;

/// Takes the moments at which to look at a token again.
pub(super) struct Schedule {
    planned: mpsc::UnboundedSender<(Weak<Slot>, Instant)>,
}

impl Schedule {
    pub(super) fn at(&self, slot: &Arc<Slot>, at: Instant) {
        // The only error is that the stop has begun, and nothing is renewed ahead any more.
        let _ = self.planned.send((Arc::downgrade(slot), at));
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
                    Some((slot, at)) => plans.put(slot, at),
                    None => return,
                },
                Some(slot) = plans.next() => {
                    let Some(tokens) = tokens.upgrade() else { return };
                    if let Some(slot) = slot.upgrade() {
                        renew_ahead(&tokens, &slot);
                    }
                }
            }
        }
    });
    Schedule { planned }
}

/// The next moment of each token: one a token, or a token that is rejected often would leave its old ones behind.
#[derive(Default)]
struct Plans {
    queue: DelayQueue<Weak<Slot>>,
    /// By the address of the slot, which no other has while it is in the queue.
    places: HashMap<usize, delay_queue::Key>,
}

impl Plans {
    fn put(&mut self, slot: Weak<Slot>, at: Instant) {
        match self.places.entry(slot.as_ptr().addr()) {
            Entry::Occupied(place) => self.queue.reset_at(place.get(), at),
            Entry::Vacant(place) => {
                place.insert(self.queue.insert_at(slot, at));
            }
        }
    }

    async fn next(&mut self) -> Option<Weak<Slot>> {
        let slot = self.queue.next().await?.into_inner();
        self.places.remove(&slot.as_ptr().addr());
        Some(slot)
    }
}

/// A plan can be outdated: the slot alone knows whether the token that it was made for is due now.
fn renew_ahead(tokens: &Arc<Inner>, slot: &Arc<Slot>) {
    let mut state = slot.lock();
    if state.due_and_worth_it(tokens.clock.now()) {
        Inner::fly_ahead(tokens, slot, &mut state);
    }
    drop(state);
    // If nothing comes of it, or nobody has used it, that was the last plan.
    tokens.wanes(&slot.key);
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::super::Key;
    use super::*;
    use crate::names::Subject;

    #[tokio::test(start_paused = true)]
    async fn a_token_has_one_plan_however_often_it_is_renewed() {
        let provider = "acme".parse().unwrap();
        let key = Key { provider, subject: Subject::Client, target: Arc::default(), registration: Default::default() };
        let slot = Arc::new(Slot::new(key));
        let (start, mut plans) = (Instant::now(), Plans::default());
        for hours in [1, 9, 3] {
            plans.put(Arc::downgrade(&slot), start + Duration::from_secs(3600 * hours));
        }
        let next = plans.next().await.and_then(|slot| slot.upgrade());
        assert!(next.is_some_and(|next| Arc::ptr_eq(&next, &slot)));
        assert_eq!(start.elapsed().as_secs(), 3 * 3600);
        assert!(plans.next().await.is_none() && plans.places.is_empty());
    }
}
