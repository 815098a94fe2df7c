//! Proof Key for Code Exchange (RFC 7636): whoever redeems a code shows that they asked for it.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use sha2::{Digest, Sha256};

use crate::secret::Secret;

/// The only method that is spoken: `plain` would show the verifier to the browser.
pub const METHOD: &str = "S256";

/// A `code_verifier`: 43 characters that hold 256 random bits (RFC 7636 section 4.1).
///
/// # Errors
/// Where the machine has no randomness.
pub fn verifier() -> Result<Secret, getrandom::Error> {
    Secret::random()
}

/// The `code_challenge` of a verifier (RFC 7636 section 4.2).
pub fn challenge(verifier: &Secret) -> String {
    BASE64_URL_SAFE_NO_PAD.encode(Sha256::digest(verifier.expose().as_bytes()))
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_challenge_is_that_of_the_rfc() {
        // RFC 7636 appendix B.
        let verifier = Secret::new("dBjftJeZ4CVP-mB92K27uhbUJU1p1r_wW1gFWFOEjXk");
        assert_eq!(challenge(&verifier), "E9Melhoa2OwvFrEMTJguCHaoeK1t8URWbuGJSstw-cM");
    }

    #[test]
    fn a_verifier_has_the_length_and_the_characters_of_the_rfc_and_never_comes_twice() {
        // OAU-007
        let verifiers: HashSet<String> = (0..1000).map(|_| verifier().unwrap().expose().to_owned()).collect();
        assert_eq!(verifiers.len(), 1000);
        let unreserved = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_' | b'~');
        assert!(verifiers.iter().all(|v| (43..=128).contains(&v.len()) && v.bytes().all(unreserved)));
    }
}
