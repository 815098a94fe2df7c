//! Seals a secret for its one place in the store: XChaCha20-Poly1305 under a key of the keyring.

use chacha20poly1305::aead::{Aead, Payload};
use chacha20poly1305::{KeyInit, XChaCha20Poly1305, XNonce};
use zeroize::Zeroize;

use super::key::{Key, KeyId, Keyring};
use crate::secret::Secret;

/// Where a sealed value belongs. Copied anywhere else, it does not open.
#[derive(Debug, Clone, Copy)]
pub(super) struct Place<'a> {
    pub provider: &'a str,
    pub subject: &'a str,
    pub column: &'a str,
}

/// Why a value does not open.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Unopened {
    /// Sealed with a key that is not at hand.
    UnknownKey(KeyId),
    /// Changed, cut off, or moved here from another place.
    Damaged,
}

/// Seals `secret`. Fails only where the machine has no randomness.
pub(super) fn seal(keys: &Keyring, place: Place<'_>, secret: &Secret) -> Result<Vec<u8>, getrandom::Error> {
    let key = keys.first();
    // 192 random bits: however many values are sealed, no two share a nonce.
    let mut nonce = [0; 24];
    getrandom::fill(&mut nonce)?;
    let payload = Payload { msg: secret.expose().as_bytes(), aad: &associated(place, key.id) };
    let ciphertext = cipher(key).encrypt(&XNonce::from(nonce), payload).expect("a secret is shorter than 256 GiB");
    Ok([&[VERSION], &key.id.0[..], &nonce, &ciphertext].concat())
}

/// Opens what [`seal`] made for the same place.
pub(super) fn open(keys: &Keyring, place: Place<'_>, sealed: &[u8]) -> Result<Secret, Unopened> {
    let id = key_id(sealed).ok_or(Unopened::Damaged)?;
    let key = keys.find(id).ok_or(Unopened::UnknownKey(id))?;
    let (head, ciphertext) = sealed.split_at_checked(CIPHERTEXT_AT).ok_or(Unopened::Damaged)?;
    let nonce = XNonce::try_from(&head[NONCE_AT..]).map_err(|_| Unopened::Damaged)?;
    let payload = Payload { msg: ciphertext, aad: &associated(place, id) };
    let plain = cipher(key).decrypt(&nonce, payload).map_err(|_| Unopened::Damaged)?;
    String::from_utf8(plain).map(Secret::new).map_err(|error| {
        error.into_bytes().zeroize();
        Unopened::Damaged
    })
}

/// Which key a value was sealed with.
pub(super) fn key_id(sealed: &[u8]) -> Option<KeyId> {
    let head = sealed.get(..NONCE_AT)?;
    (head[0] == VERSION).then_some(KeyId(head[ID_AT..].try_into().ok()?))
}

/// The parts as one, so that no other parts make the same one: `a:b` and `c` are not `a` and `b:c`.
pub(super) fn join(parts: &[&[u8]]) -> Vec<u8> {
    parts.iter().flat_map(|part| (part.len() as u64).to_be_bytes().into_iter().chain(part.iter().copied())).collect()
}

fn associated(place: Place<'_>, id: KeyId) -> Vec<u8> {
    join(&[&[VERSION], place.provider.as_bytes(), place.subject.as_bytes(), place.column.as_bytes(), &id.0])
}

fn cipher(key: &Key) -> XChaCha20Poly1305 {
    XChaCha20Poly1305::new((&*key.sealing).into())
}

// A sealed value: version, key id, nonce, ciphertext with its tag.
const VERSION: u8 = 1;
const ID_AT: usize = 1;
const NONCE_AT: usize = ID_AT + 8;
const CIPHERTEXT_AT: usize = NONCE_AT + 24;

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use base64::Engine;
    use base64::prelude::BASE64_STANDARD;
    use proptest::prelude::*;

    use super::*;

    const HOME: Place<'_> = Place { provider: "github", subject: "alice", column: "refresh_token" };

    fn keys(seeds: &[u8]) -> Keyring {
        let secrets: Vec<Secret> = seeds.iter().map(|seed| Secret::new(BASE64_STANDARD.encode([*seed; 32]))).collect();
        Keyring::from_secrets(&secrets).unwrap()
    }

    #[test]
    fn a_value_opens_at_its_own_place_only() {
        // TOK-026
        let sealed = seal(&keys(&[1]), HOME, &Secret::new("rt")).unwrap();
        assert_eq!(open(&keys(&[1]), HOME, &sealed), Ok(Secret::new("rt")));
        for elsewhere in [
            Place { provider: "gitlab", ..HOME },
            Place { subject: "bob", ..HOME },
            Place { column: "access_token", ..HOME },
            Place { provider: "githuba", subject: "lice", ..HOME },
            Place { subject: "", column: "alicerefresh_token", ..HOME },
        ] {
            assert_eq!(open(&keys(&[1]), elsewhere, &sealed), Err(Unopened::Damaged), "{elsewhere:?}");
        }
    }

    #[test]
    fn a_new_first_key_seals_and_the_old_one_still_opens() {
        let old = seal(&keys(&[1]), HOME, &Secret::new("rt")).unwrap();
        let both = keys(&[2, 1]);
        assert_eq!(open(&both, HOME, &old), Ok(Secret::new("rt")));
        let new = seal(&both, HOME, &Secret::new("rt")).unwrap();
        assert_eq!(open(&keys(&[2]), HOME, &new), Ok(Secret::new("rt")));
        assert_eq!(open(&keys(&[2]), HOME, &old), Err(Unopened::UnknownKey(keys(&[1]).ids()[0])));
    }

    #[test]
    fn every_flipped_bit_and_every_cut_is_noticed() {
        // TOK-025
        let keys = keys(&[1]);
        let sealed = seal(&keys, HOME, &Secret::new("rt")).unwrap();
        for bit in 0..sealed.len() * 8 {
            let mut flipped = sealed.clone();
            flipped[bit / 8] ^= 1 << (bit % 8);
            assert!(open(&keys, HOME, &flipped).is_err(), "bit {bit}");
        }
        for length in 0..sealed.len() {
            assert!(open(&keys, HOME, &sealed[..length]).is_err(), "{length} bytes");
        }
    }

    #[test]
    fn no_nonce_comes_twice() {
        // TOK-027
        let keys = keys(&[1]);
        let nonce = |_| seal(&keys, HOME, &Secret::new("rt")).unwrap()[NONCE_AT..CIPHERTEXT_AT].to_vec();
        assert_eq!((0..20_000).map(nonce).collect::<HashSet<_>>().len(), 20_000);
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(tail in prop::collection::vec(any::<u8>(), 0..80)) {
            let keys = keys(&[1]);
            prop_assert!(open(&keys, HOME, &tail).is_err());
            let named = [&[VERSION], &keys.ids()[0].0[..], &tail].concat();
            prop_assert_eq!(open(&keys, HOME, &named), Err(Unopened::Damaged));
        }

        #[test]
        fn other_parts_never_join_to_the_same(a: Vec<Vec<u8>>, b: Vec<Vec<u8>>) {
            let join_all = |parts: &[Vec<u8>]| join(&parts.iter().map(Vec::as_slice).collect::<Vec<_>>());
            prop_assert_eq!(a == b, join_all(&a) == join_all(&b));
        }
    }
}
