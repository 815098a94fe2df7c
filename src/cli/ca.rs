//! `sidebearer ca`: the local CA, for agents that need it by hand.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

use super::CliError;
use crate::app::{self, agent};
use crate::ca::files::CaFiles;
use crate::config::Settings;

/// What to print; without any of them, what the CA is.
#[derive(clap::Args)]
#[group(multiple = false)]
pub(super) struct Options {
    /// Print the root's certificate; where hosts were added later, those of several.
    #[arg(long)]
    pem: bool,
    /// Print the system's roots with ours.
    #[arg(long)]
    bundle: bool,
    /// Write a PKCS #12 truststore for Java.
    #[arg(long, value_name = "PATH")]
    java: Option<PathBuf>,
    /// Have an NSS database trust the root, for a browser of its own (HOME or XDG_DATA_HOME).
    #[arg(long, value_name = "DIR")]
    nss: Option<PathBuf>,
}

/// Prints or writes it.
pub(super) async fn ca(settings: &Settings, options: &Options) -> Result<u8, CliError> {
    let files = CaFiles::within(&settings.ca_path);
    match options {
        Options { pem: true, .. } => copy_out(&files.ca),
        Options { bundle: true, .. } => copy_out(&files.bundle),
        Options { java: Some(to), .. } => {
            let truststore = read(&files.truststore)?;
            let written = fs::write(to, truststore);
            written.map_err(|error| {
                CliError::failed(format!("cannot write {}: {error}", to.display()), "name a file that can be written")
            })?;
            Ok(0)
        }
        Options { nss: Some(database), .. } => {
            read(&files.ca)?;
            agent::trust(database, &files.ca)?;
            Ok(0)
        }
        _ => describe(settings, &files).await,
    }
}

async fn describe(settings: &Settings, files: &CaFiles) -> Result<u8, CliError> {
    let ca = app::last_ca(settings).await?;
    let ends = time::OffsetDateTime::from(ca.not_after()).date();
    for root in pem::parse_many(ca.roots_pem()).unwrap_or_default() {
        let fingerprint: Vec<String> =
            Sha256::digest(root.contents()).iter().map(|byte| format!("{byte:02X}")).collect();
        anstream::println!("root         SHA-256 {}", fingerprint.join(":"));
    }
    anstream::println!("valid until  {ends}");
    anstream::println!("speaks for   {}", ca.permitted().collect::<Vec<_>>().join(", "));
    anstream::println!("ca.pem       {}", files.ca.display());
    anstream::println!("bundle.pem   {}", files.bundle.display());
    anstream::println!("Java         {}", files.truststore.display());
    Ok(0)
}

fn copy_out(path: &Path) -> Result<u8, CliError> {
    let bytes = read(path)?;
    let written = io::stdout().write_all(&bytes);
    written.map_err(|error| CliError::failed(format!("cannot write to standard output: {error}"), "try again"))?;
    Ok(0)
}

fn read(path: &Path) -> Result<Vec<u8>, CliError> {
    fs::read(path).map_err(|error| {
        let hint = "`sidebearer run` writes it at its start; `ca.path` in proxy.yaml says where";
        CliError::failed(format!("cannot read {}: {error}", path.display()), hint)
    })
}
