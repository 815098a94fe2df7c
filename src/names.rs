//! The names that people give to providers and users.

use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// A provider's name in `proxy.yaml`: `github`, `billing-eu`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct ProviderName(Arc<str>);

impl ProviderName {
    /// The name as it was written.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for ProviderName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        let plain = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_');
        if text.is_empty() || text.len() > 64 || !text.bytes().all(plain) {
            return Err(NameError::Provider);
        }
        Ok(Self(text.into()))
    }
}

/// A user of the agent's service: whatever that service calls them, an address or an opaque id.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct UserName(Arc<str>);

impl UserName {
    /// The name as it was given, byte for byte: two Unicode spellings are two users.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl Default for UserName {
    /// The one user of a sidecar that nobody told about users.
    fn default() -> Self {
        Self("default".into())
    }
}

impl FromStr for UserName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        if text.is_empty() || text.len() > 1024 || text.chars().any(char::is_control) {
            return Err(NameError::User);
        }
        Ok(Self(text.into()))
    }
}

/// For whom a token speaks.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Subject {
    /// The client itself (RFC 6749 section 4.4): one token serves every user.
    Client,
    /// A user who granted access.
    User(UserName),
}

impl Subject {
    /// The subject in a row of the store. No user's name is empty, so the client's place is its own.
    pub fn as_str(&self) -> &str {
        match self {
            Subject::Client => "",
            Subject::User(name) => name.as_str(),
        }
    }

    /// The reverse of [`Subject::as_str`].
    ///
    /// # Errors
    /// When the text is no user's name.
    pub fn from_row(text: &str) -> Result<Self, NameError> {
        if text.is_empty() { Ok(Subject::Client) } else { text.parse().map(Subject::User) }
    }
}

/// Why a name was refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Not a provider's name.
    #[error("a provider's name has 1 to 64 characters: lower-case letters, digits, `-` and `_`")]
    Provider,
    /// Not a user's name.
    #[error("a user's name has 1 to 1024 bytes and no control characters")]
    User,
}

impl fmt::Display for ProviderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Subject::Client => f.write_str("(client)"),
            Subject::User(name) => name.fmt(f),
        }
    }
}

impl fmt::Debug for ProviderName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for UserName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}
