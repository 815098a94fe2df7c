//! Bytes in a row's place open only if they were sealed for that place, with a key at hand (TOK-025, TOK-026).
//!
//! The input: a byte for what is done, and bytes to do it with to a sealed value, or to put in its place.
#![no_main]

use std::sync::LazyLock;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use libfuzzer_sys::fuzz_target;
use sidebearer::secret::Secret;
use sidebearer::store::fuzzing;
use sidebearer::store::key::Keyring;

static KEYS: LazyLock<Keyring> = LazyLock::new(|| keys(1));
static SEALED: LazyLock<Vec<u8>> = LazyLock::new(|| fuzzing::seal(&KEYS, "alice", &Secret::new("refresh token")));

fuzz_target!(|data: &[u8]| {
    let Some((how, with)) = data.split_first() else { return };
    let mut tried = SEALED.clone();
    match how % 4 {
        0 => tried = with.to_vec(),
        // Right up to where only the key is missing.
        1 => tried.splice(33.., with.iter().copied()).for_each(drop),
        2 => tried.iter_mut().zip(with).for_each(|(byte, mask)| *byte ^= mask),
        _ => tried
            .splice(..with.first().map_or(0, |at| usize::from(*at) % tried.len()), with.iter().copied())
            .for_each(drop),
    }
    let opened = fuzzing::open(&KEYS, "alice", &tried);
    assert_eq!(opened.is_some(), tried == *SEALED, "other bytes than those that were sealed");
    assert!(opened.is_none_or(|secret| secret == Secret::new("refresh token")));
    assert!(fuzzing::open(&KEYS, "bob", &tried).is_none(), "at another's place");
    assert!(fuzzing::open(&keys(2), "alice", &tried).is_none(), "with another key");
});

fn keys(seed: u8) -> Keyring {
    Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([seed; 32]))]).expect("a key")
}
