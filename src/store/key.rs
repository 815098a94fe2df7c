//! The keys that the store's secrets are sealed with.

mod command;

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use hkdf::Hkdf;
use sha2::Sha256;
use zeroize::Zeroizing;

pub use self::command::{KeyCommand, KeyCommandError};
use crate::secret::Secret;

/// The keys of `store.keys`: the first one seals, all of them open. Clones share them.
#[derive(Clone)]
pub struct Keyring(Arc<[Key]>);

/// Which key sealed a value. Says nothing about the key itself.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct KeyId(pub(super) [u8; 8]);

/// What is derived from one master key (RFC 5869).
pub(super) struct Key {
    pub id: KeyId,
    pub sealing: Zeroizing<[u8; KEY_BYTES]>,
}

impl Keyring {
    /// The keys, each 32 bytes in standard base64.
    ///
    /// # Errors
    /// When there is none, or one of them is something else.
    pub fn from_secrets(secrets: &[Secret]) -> Result<Self, KeyError> {
        if secrets.is_empty() {
            return Err(KeyError::None);
        }
        let key = |(index, secret): (usize, &Secret)| {
            Key::parse(secret.expose()).ok_or_else(|| KeyError::Garbled { place: format!("store.keys[{index}]") })
        };
        Ok(Self(secrets.iter().enumerate().map(key).collect::<Result<_, _>>()?))
    }

    /// The key in the file at `path`.
    ///
    /// # Errors
    /// When there is no such file, others can get at it, or it holds something else.
    pub fn load(path: &Path) -> Result<Self, KeyError> {
        let text = read(path)?;
        if text.trim().is_empty() {
            return Err(KeyError::Empty { path: path.into() });
        }
        let key = Key::parse(&text).ok_or_else(|| KeyError::Garbled { place: path.display().to_string() })?;
        Ok(Self([key].into()))
    }

    /// The key in the file at `path`, which is made when it is not there; and whether it was made just now.
    ///
    /// # Errors
    /// As [`Keyring::load`], and when the file cannot be made.
    pub fn load_or_create(path: &Path) -> Result<(Self, bool), KeyError> {
        match Self::load(path) {
            Err(KeyError::Missing { .. }) => {
                let made = create(path).map_err(|error| KeyError::Io { path: path.into(), error })?;
                Ok((Self::load(path)?, made))
            }
            loaded => Ok((loaded?, false)),
        }
    }

    /// The keys that a command prints.
    ///
    /// # Errors
    /// When it fails, takes too long, or prints something else.
    pub async fn from_command(command: &KeyCommand) -> Result<Self, KeyError> {
        Ok(Self(command.keys().await?.into()))
    }

    /// The keys' ids, in order.
    pub fn ids(&self) -> Vec<KeyId> {
        self.0.iter().map(|key| key.id).collect()
    }

    /// The key that seals.
    pub(super) fn first(&self) -> &Key {
        &self.0[0]
    }

    pub(super) fn find(&self, id: KeyId) -> Option<&Key> {
        self.0.iter().find(|key| key.id == id)
    }
}

impl Key {
    fn parse(text: &str) -> Option<Self> {
        let master = Zeroizing::new(BASE64_STANDARD.decode(text.trim()).ok()?);
        (master.len() == KEY_BYTES).then(|| Self::derive(&master))
    }

    fn derive(master: &[u8]) -> Self {
        let derived = Hkdf::<Sha256>::new(None, master);
        let (mut id, mut sealing) = ([0; 8], Zeroizing::new([0; KEY_BYTES]));
        let long_enough = "SHA-256 expands to 8160 bytes (RFC 5869 section 2.3)";
        derived.expand(b"sidebearer key id v1", &mut id).expect(long_enough);
        derived.expand(b"sidebearer seal v1", &mut *sealing).expect(long_enough);
        Self { id: KeyId(id), sealing }
    }
}

/// Why there is no key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// An empty list of keys.
    #[error("`store.keys` names no key")]
    None,
    /// No such file.
    #[error("there is no key file at `{path}`")]
    Missing {
        /// Where it was looked for.
        path: PathBuf,
    },
    /// A file with nothing in it.
    #[error("the key file `{path}` is empty")]
    Empty {
        /// The file.
        path: PathBuf,
    },
    /// Not 32 bytes in base64.
    #[error("`{place}` is not a key: not 32 bytes in standard base64")]
    Garbled {
        /// The file, or the place in `proxy.yaml`.
        place: String,
    },
    /// A file that others can get at, or that is no file.
    #[error("the key file `{path}` {why}")]
    Permissions {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: &'static str,
    },
    /// The file can be neither read nor made.
    #[error("the key file `{path}`: {error}")]
    Io {
        /// The file.
        path: PathBuf,
        /// Why.
        error: io::Error,
    },
    /// The command prints none.
    #[error(transparent)]
    Command(#[from] KeyCommandError),
}

impl KeyError {
    /// A stable name for machines.
    pub fn code(&self) -> &'static str {
        match self {
            KeyError::None | KeyError::Missing { .. } => "key_missing",
            KeyError::Empty { .. } | KeyError::Garbled { .. } => "key_garbled",
            KeyError::Permissions { .. } => "key_permissions",
            KeyError::Io { .. } => "key_io",
            KeyError::Command(error) => error.code(),
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            KeyError::None => "make one with `openssl rand -base64 32`".into(),
            KeyError::Missing { .. } => "put the key back: without it, what it sealed cannot be opened".into(),
            KeyError::Empty { .. } | KeyError::Garbled { .. } => {
                "put the key back; if nothing was sealed with it yet, make one with `openssl rand -base64 32`".into()
            }
            KeyError::Permissions { path, .. } => format!("let only its owner at it: `chmod 600 {}`", path.display()),
            KeyError::Io { path, .. } => format!("let this user read and write `{}`", super::parent(path).display()),
            KeyError::Command(error) => error.hint(),
        }
    }
}

fn read(path: &Path) -> Result<Zeroizing<String>, KeyError> {
    let failed = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound => KeyError::Missing { path: path.into() },
        io::ErrorKind::InvalidData => KeyError::Garbled { place: path.display().to_string() },
        _ => KeyError::Io { path: path.into(), error },
    };
    // Before it is opened: opening a pipe would wait for a writer.
    let metadata = fs::metadata(path).map_err(failed)?;
    let refused = |why| KeyError::Permissions { path: path.into(), why };
    if !metadata.is_file() {
        return Err(refused("is not a regular file"));
    }
    if metadata.mode() & 0o007 != 0 {
        return Err(refused("is open to every user of this machine"));
    }
    // All its room at once: a string that grows leaves copies of what it held in freed memory.
    let mut text = Zeroizing::new(String::with_capacity(FILE_LIMIT as usize));
    File::open(path).and_then(|file| file.take(FILE_LIMIT).read_to_string(&mut text)).map_err(failed)?;
    Ok(text)
}

/// Makes a key file; `false` when another process was quicker, whose key it then is.
fn create(path: &Path) -> io::Result<bool> {
    let directory = super::parent(path);
    super::make_directory(directory)?;
    let mut master = Zeroizing::new([0; KEY_BYTES]);
    getrandom::fill(&mut *master)?;
    let text = Zeroizing::new(BASE64_STANDARD.encode(*master));
    // Whole or not at all: made elsewhere with mode 0600, then given its name, unless that is taken.
    let mut file = tempfile::Builder::new().prefix(".key-").tempfile_in(directory)?;
    writeln!(file, "{}", *text)?;
    file.as_file().sync_all()?;
    super::settle(file.into_temp_path(), path)
}

impl fmt::Display for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for KeyId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl fmt::Debug for Keyring {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Keyring").field(&self.ids()).finish()
    }
}

const KEY_BYTES: usize = 32;
/// A key's text has 44 characters; whatever is much longer is some other file.
const FILE_LIMIT: u64 = 1024;

#[cfg(test)]
mod tests {
    use std::os::unix::fs::{PermissionsExt, symlink};

    use super::*;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().mode() & 0o777
    }

    #[test]
    fn a_key_file_is_made_once_for_its_owner_only() {
        // TLS-004: the CA's key is in the store, sealed with this one.
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("keys/store.key");
        let (made, is_new) = Keyring::load_or_create(&path).unwrap();
        let (again, is_new_again) = Keyring::load_or_create(&path).unwrap();
        assert_eq!((is_new, is_new_again), (true, false));
        assert_eq!(made.ids(), again.ids());
        assert_eq!(Keyring::load(&path).unwrap().ids(), made.ids());
        assert_eq!((mode(&path), mode(path.parent().unwrap())), (0o600, 0o700));
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn many_who_make_the_same_key_file_end_with_one_key() {
        // TOK-029
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.key");
        let made = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| Keyring::load_or_create(&path).unwrap())).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<_>>()
        });
        assert_eq!(made.iter().filter(|(_, is_new)| *is_new).count(), 1);
        assert!(made.iter().all(|(keys, _)| keys.ids() == made[0].0.ids()));
    }

    #[test]
    fn a_key_file_that_is_none_is_refused_by_what_is_wrong_with_it() {
        // TLS-004
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("store.key");
        let refused = || Keyring::load_or_create(&path).unwrap_err();
        let write = |content: &[u8], mode| {
            fs::write(&path, content).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        };
        assert_eq!(Keyring::load(&path).unwrap_err().code(), "key_missing");
        write(b" \n", 0o600);
        assert_eq!(refused().to_string(), format!("the key file `{}` is empty", path.display()));
        for garbled in [&b"canary"[..], b"Y2FuYXJ5", b"\xff\xff", &[b'A'; 5000]] {
            write(garbled, 0o600);
            let said = format!("`{}` is not a key: not 32 bytes in standard base64", path.display());
            assert_eq!(refused().to_string(), said);
        }
        let key = BASE64_STANDARD.encode([7; 32]);
        write(key.as_bytes(), 0o644);
        assert_eq!(
            refused().to_string(),
            format!("the key file `{}` is open to every user of this machine", path.display())
        );
        assert_eq!(refused().hint(), format!("let only its owner at it: `chmod 600 {}`", path.display()));
        write(key.as_bytes(), 0o440);
        assert!(Keyring::load(&path).is_ok(), "a mounted secret is readable for its group");
    }

    #[test]
    fn a_link_is_followed_to_a_file_and_nowhere_else() {
        let directory = tempfile::tempdir().unwrap();
        let at = |name: &str| directory.path().join(name);
        Keyring::load_or_create(&at("real")).unwrap();
        symlink(at("real"), at("good")).unwrap();
        symlink(directory.path(), at("directory")).unwrap();
        symlink(at("nowhere"), at("dangling")).unwrap();
        assert!(Keyring::load_or_create(&at("good")).is_ok());
        let error = Keyring::load_or_create(&at("directory")).unwrap_err();
        let said = format!("the key file `{}` is not a regular file", at("directory").display());
        assert_eq!(error.to_string(), said);
        assert_eq!(Keyring::load_or_create(&at("dangling")).unwrap_err().code(), "key_missing");
        assert!(!at("nowhere").exists());
    }

    #[test]
    fn keys_in_the_configuration_are_named_by_their_place() {
        let key = Secret::new(BASE64_STANDARD.encode([7; 32]));
        assert_eq!(Keyring::from_secrets(&[]).unwrap_err().code(), "key_missing");
        let error = Keyring::from_secrets(&[key.clone(), Secret::new("canary")]).unwrap_err();
        assert_eq!(error.to_string(), "`store.keys[1]` is not a key: not 32 bytes in standard base64");
        let shown = format!("{:?}", Keyring::from_secrets(&[key]).unwrap());
        assert_eq!(shown.len(), "Keyring([0123456789abcdef])".len());
    }
}
