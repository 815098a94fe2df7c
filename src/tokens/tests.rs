//! The life of tokens against a strict authorization server in memory, a real store, and a clock that the tests move.

mod ahead;
mod discovery;
mod fares;
mod fleet;
mod grants;
mod leases;
mod model;
mod outage;
mod rejected;
mod reload;
mod rotation;
mod server;
mod world;

use std::cell::Cell;

thread_local! {
    /// What the next jitter is made of, in a test that has to go the same way again.
    static JITTER: Cell<Option<u32>> = const { Cell::new(None) };
}

/// From 0 to 1, the same numbers again for the same test; none in tests that do not mind.
pub(super) fn jitter() -> Option<f64> {
    let number = JITTER.get()?.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
    JITTER.set(Some(number));
    Some(f64::from(number) / f64::from(u32::MAX))
}
