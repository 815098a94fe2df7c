//! What renewals ask for: what a provider refuses of it says nothing of anything else that may be asked for.

use std::fmt;
use std::str::FromStr;

use sha2::{Digest, Sha256};

use super::Provider;

/// What the renewals of a provider ask for: a digest of that, as it is configured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wanted(u64);

impl Wanted {
    /// Of a provider.
    pub fn of(provider: &Provider) -> Self {
        let (target, names_scopes) = (&provider.target, provider.quirks.scopes_on_refresh);
        let wanted = (names_scopes, &target.scopes, &target.audience, &target.resource);
        let digest = Sha256::digest(serde_json::to_vec(&wanted).expect("strings and lists of them are JSON"));
        Self(digest.iter().take(8).fold(0, |number, byte| number << 8 | u64::from(*byte)))
    }
}

impl fmt::Display for Wanted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:016x}", self.0)
    }
}

impl FromStr for Wanted {
    type Err = ();

    /// Exactly what is written: a provider's words may look like a number, too.
    fn from_str(text: &str) -> Result<Self, ()> {
        let wanted = u64::from_str_radix(text, 16).map(Self).map_err(|_| ())?;
        Some(wanted).filter(|wanted| wanted.to_string() == text).ok_or(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::oauth::{Grant, Target};

    #[test]
    fn other_scopes_are_wanted_otherwise_and_another_secret_is_not() {
        let of = |scopes: &[&str]| {
            let target = Target { scopes: scopes.iter().map(ToString::to_string).collect(), ..Target::default() };
            Provider { target, ..Provider::new("acme".parse().unwrap(), "id", Grant::AuthorizationCode) }
        };
        let acme = of(&["read", "write"]);
        let secret = Provider { client_secret: Some(crate::secret::Secret::new("s")), ..acme.clone() };
        assert_eq!(Wanted::of(&acme), Wanted::of(&secret));
        let mut unnamed = acme.clone();
        unnamed.quirks.scopes_on_refresh = false;
        for other in [of(&["read"]), of(&["read write"]), unnamed] {
            assert_ne!(Wanted::of(&acme), Wanted::of(&other));
        }
        let wanted = Wanted::of(&acme);
        assert_eq!(wanted.to_string().parse(), Ok(wanted));
        assert_eq!("400".parse::<Wanted>(), Err(()));
    }
}
