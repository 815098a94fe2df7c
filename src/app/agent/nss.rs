//! Adds the CA to an NSS database: browsers look for roots there, and at no variable.

use std::io::{self, Write};
use std::path::Path;
use std::process::{Command, Output};

use tempfile::NamedTempFile;

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
    /// The CA's own file cannot be handed over.
    #[error("cannot hand the CA over to {place}: {error}")]
    Roots {
        /// Where the database is.
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
            NssError::Folder { .. } | NssError::Roots { .. } => "name a folder that can be written",
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
    for number in 1.. {
        if !certutil(&["-D", "-n", &nickname(number)])?.status.success() {
            break;
        }
    }
    for (number, root) in (1..).zip(roots(ca, folder).map_err(|error| NssError::Roots { place: place.clone(), error })?)
    {
        let root = root.path().display().to_string();
        must(certutil(&["-A", "-t", "C,,", "-n", &nickname(number), "-i", &root])?)?;
    }
    Ok(())
}

fn nickname(number: usize) -> String {
    if number == 1 { NICKNAME.to_owned() } else { format!("{NICKNAME}-{number}") }
}

/// Each root in a file of its own, for as long as it is held: of several in one, the tool reads the first.
fn roots(ca: &Path, folder: &Path) -> io::Result<Vec<NamedTempFile>> {
    let roots = pem::parse_many(std::fs::read(ca)?).map_err(io::Error::other)?;
    let write = |root: &pem::Pem| {
        let mut file = NamedTempFile::new_in(folder)?;
        file.write_all(pem::encode(root).as_bytes())?;
        Ok(file)
    };
    roots.iter().map(write).collect()
}

fn last_line(text: &[u8]) -> String {
    String::from_utf8_lossy(text).trim_end().lines().next_back().unwrap_or("it did not say why").to_owned()
}
