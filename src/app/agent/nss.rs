//! Adds the CA to an NSS database: browsers look for roots there, and at no variable.

use std::io;
use std::path::Path;
use std::process::{Command, Output};

const NICKNAME: &str = "sidebearer";

/// Why the CA is not in a database.
#[derive(Debug, thiserror::Error)]
pub enum NssError {
    /// NSS's own tool, which alone writes these, is not there.
    #[error("cannot run `certutil`: {0}")]
    Tool(io::Error),
    /// The folder is not there and cannot be made.
    #[error("cannot make {place}: {error}")]
    Folder {
        /// Where it was to be.
        place: String,
        /// Why not.
        error: io::Error,
    },
    /// The tool refused.
    #[error("certutil did not add the CA to {place}: {said}")]
    Refused {
        /// Where the database is.
        place: String,
        /// Why, in its own words.
        said: String,
    },
}

impl NssError {
    /// What to do next.
    pub fn hint(&self) -> &'static str {
        match self {
            NssError::Tool(_) => "install it: Debian and Ubuntu have it in `libnss3-tools`, Fedora in `nss-tools`",
            NssError::Folder { .. } => "name a folder that can be written",
            NssError::Refused { .. } => "name a folder with an NSS database that has no password, or one that is empty",
        }
    }
}

/// Makes a database in a folder where there is none, and has it trust the CA in place of the one from the time before.
///
/// # Errors
/// See [`NssError`].
pub fn trust(folder: &Path, ca: &Path) -> Result<(), NssError> {
    let place = folder.display().to_string();
    std::fs::create_dir_all(folder).map_err(|error| NssError::Folder { place: place.clone(), error })?;
    let database = format!("sql:{place}");
    let certutil = |arguments: &[&str]| {
        let mut command = Command::new("certutil");
        command.args(["-d", &database]).args(arguments).output().map_err(NssError::Tool)
    };
    let must = |done: Output| match done.status.success() {
        true => Ok(()),
        false => Err(NssError::Refused { place: place.clone(), said: last_line(&done.stderr) }),
    };
    if !folder.join("cert9.db").exists() {
        must(certutil(&["-N", "--empty-password"])?)?;
    }
    // Fails where there is none, as it should the first time.
    certutil(&["-D", "-n", NICKNAME])?;
    must(certutil(&["-A", "-t", "C,,", "-n", NICKNAME, "-i", &ca.display().to_string()])?)
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).trim_end().lines().next_back().unwrap_or("it did not say why").to_owned()
}
