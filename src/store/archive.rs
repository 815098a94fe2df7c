//! A store as a file, to move from one engine to another: JSON Lines, in which every secret stays sealed as it was.
//!
//! The first line says what it is, each further one holds a grant, the generation of a removed grant, or a secret of the
//! sidecar's own, and the last one says how many there were. It also seals a digest of all lines before it: what is not
//! sealed by itself, such as whose grant it is and for which scopes, cannot be changed on the way either.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::io::{self, BufRead, BufReader, BufWriter, Read, Write};
use std::path::Path;

use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use super::engine::{IntentRecord, Names, Plan, Record, Slot, Snapshot, StateRecord};
use super::key::{KeyId, Keyring};
use super::record::{Sealer, hex};
use super::seal::{self, Place};
use super::{Fault, Kept, Store, StoreError};
use crate::names::{ProviderName, Subject};
use crate::secret::Secret;

/// What an export was read from, whole and unchanged.
#[derive(Debug)]
pub struct Archive {
    keys: Vec<String>,
    grants: Vec<Record>,
    removed: Vec<(Names, u64)>,
    own: Vec<(String, Vec<u8>)>,
    digest: String,
    seal: Vec<u8>,
}

/// What was exported.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Exported {
    /// How many grants.
    pub grants: usize,
    /// How many generations of removed grants.
    pub removed: usize,
    /// How many secrets of the sidecar's own.
    pub secrets: usize,
    /// Whose refresh token may be on its way to the provider.
    pub pending: Vec<(ProviderName, Subject)>,
}

/// What was imported.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Imported {
    /// How many grants.
    pub grants: usize,
    /// How many generations of removed grants.
    pub removed: usize,
    /// How many secrets of the sidecar's own.
    pub secrets: usize,
    /// How many of all these were there already.
    pub same: usize,
}

impl Store {
    /// Writes all grants, the generations of removed ones and the sidecar's own secrets, as of one moment. Consents that are
    /// under way are left out.
    ///
    /// # Errors
    /// When the store cannot be read or the file cannot be written; and when something does not open, before a byte is
    /// written.
    pub async fn export(&self, out: &mut (impl Write + Send)) -> Result<Exported, ArchiveError> {
        let mut snapshot = self.engine.snapshot().await?;
        snapshot.flows.clear();
        let faults = self.sealer.faults(&snapshot, &snapshot.values());
        if !faults.is_empty() {
            return Err(ArchiveError::Unopened(faults));
        }
        let mut pending = Vec::new();
        let grants = snapshot.grants.iter().filter_map(|(_, record)| record.as_ref().ok());
        for record in grants.filter(|record| record.intent.is_some()) {
            pending.push((record.names.provider.clone(), record.names.subject.clone()));
        }
        write(&snapshot, &self.sealer, out)?;
        let (grants, removed, secrets) = (snapshot.grants.len(), snapshot.removed.len(), snapshot.own.len());
        Ok(Exported { grants, removed, secrets, pending })
    }

    /// As [`Store::export`], to a file that appears when it is whole, for its owner only.
    ///
    /// # Errors
    /// As [`Store::export`]; and when there is such a file already.
    pub async fn export_to(&self, path: &Path) -> Result<Exported, ArchiveError> {
        // Mode 0600.
        let file = tempfile::Builder::new().prefix(".export-").tempfile_in(super::parent(path))?;
        let mut out = BufWriter::new(file);
        let exported = self.export(&mut out).await?;
        let file = out.into_inner().map_err(io::IntoInnerError::into_error)?;
        file.as_file().sync_all()?;
        match super::settle(file.into_temp_path(), path)? {
            true => Ok(exported),
            false => Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is such a file already").into()),
        }
    }

    /// Writes what an archive holds, all of it or nothing. What is there already stays, if it is the same; another one is
    /// replaced only if `replace` says so. Generations are kept, and go up where this store has known that one or a later one.
    ///
    /// # Errors
    /// When something does not open or is in the way, and when the store cannot be written.
    pub async fn import(&self, archive: &Archive, replace: bool) -> Result<Imported, ArchiveError> {
        archive.check(&self.sealer.keys)?;
        for _ in 0..TRIES {
            let snapshot = self.engine.snapshot().await?;
            let (plan, same) = self.plan(archive, &snapshot, replace)?;
            if self.engine.carry_out(&plan).await? {
                let (grants, removed, secrets) = (plan.grants.len(), plan.removed.len(), plan.own.len());
                return Ok(Imported { grants, removed, secrets, same });
            }
        }
        Err(ArchiveError::Contended)
    }

    /// What is to be written, and how much is there already.
    fn plan(&self, archive: &Archive, there: &Snapshot, replace: bool) -> Result<(Plan, usize), ArchiveError> {
        let mut plan = Plan::default();
        let (mut in_the_way, mut same) = (Vec::new(), 0);
        let grants: HashMap<&Names, _> = there.grants.iter().map(|(names, record)| (names, record)).collect();
        let removed: HashMap<&Names, u64> = there.removed.iter().map(|(names, last)| (names, *last)).collect();
        for record in &archive.grants {
            let (grant, last) = (grants.get(&record.names), removed.get(&record.names).copied());
            match self.found(record, grant.copied(), last) {
                Found::Nothing => plan.grants.push((record.clone(), None)),
                Found::Same => same += 1,
                Found::Removed(last) if replace => plan.grants.push((with_generation(record, last + 1), None)),
                Found::Other(generation) if replace => {
                    let above = record.generation.max(generation + 1).max(last.map_or(0, |last| last + 1));
                    plan.grants.push((with_generation(record, above), Some(generation)));
                }
                found => in_the_way.push(InTheWay { what: Kept::grant(&record.names), why: found.why() }),
            }
        }
        let own: HashMap<&str, &Vec<u8>> = there.own.iter().map(|(name, value)| (&**name, value)).collect();
        for (name, value) in &archive.own {
            let opened = |value: &[u8]| self.sealer.opened(&Slot::Own(name.clone()), value).ok();
            match own.get(&**name) {
                Some(there) if opened(there) == opened(value) => same += 1,
                Some(_) if !replace => in_the_way.push(InTheWay { what: Kept::Own(name.clone()), why: IS_ANOTHER }),
                there => plan.own.push((name.clone(), value.clone(), there.map(|there| there.to_vec()))),
            }
        }
        for (names, last) in &archive.removed {
            match removed.get(names) {
                Some(known) if known >= last => same += 1,
                _ => plan.removed.push((names.clone(), *last)),
            }
        }
        if in_the_way.is_empty() { Ok((plan, same)) } else { Err(ArchiveError::InTheWay(in_the_way)) }
    }

    /// What this store has in the place of a grant.
    fn found(&self, record: &Record, there: Option<&Result<Record, StoreError>>, last: Option<u64>) -> Found {
        let Some(there) = there else {
            return match last {
                Some(last) if last >= record.generation => Found::Removed(last),
                _ => Found::Nothing,
            };
        };
        let Ok(there) = there else { return Found::Damaged };
        // Sealed with another key, or given a higher generation, it is still the same.
        let opened = |record: &Record| self.sealer.row(with_generation(record, 0)).ok();
        let is_same =
            there.generation >= record.generation && opened(there).is_some_and(|row| Some(row) == opened(record));
        if is_same { Found::Same } else { Found::Other(there.generation) }
    }
}

/// What is in the place of a grant.
enum Found {
    Nothing,
    Same,
    /// There was one of at least that generation.
    Removed(u64),
    /// Another one, of this generation.
    Other(u64),
    Damaged,
}

impl Found {
    fn why(&self) -> &'static str {
        match self {
            Found::Removed(_) => "was disconnected here since",
            Found::Damaged => IS_DAMAGED,
            _ => IS_ANOTHER,
        }
    }
}

fn with_generation(record: &Record, generation: u64) -> Record {
    Record { generation, ..record.clone() }
}

/// A line, the first one apart.
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
enum Line {
    Grant(Box<GrantLine>),
    Removed(RemovedLine),
    Secret(SecretLine),
    End(EndLine),
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    format: String,
    version: u64,
    /// The ids of the keys that values are sealed with.
    keys: Vec<String>,
}

/// A [`Record`].
#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct GrantLine {
    provider: String,
    subject: String,
    generation: u64,
    target: String,
    refresh_token: Option<Base64>,
    access_token: Option<Base64>,
    obtained_at: Option<i64>,
    expires_at: Option<i64>,
    granted_scopes: Option<String>,
    further_scopes: Option<String>,
    state: String,
    reason: Option<String>,
    intent_hash: Option<Base64>,
    intent_at: Option<i64>,
    renewed_at: Option<i64>,
    stored_at: i64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct RemovedLine {
    provider: String,
    subject: String,
    generation: u64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct SecretLine {
    name: String,
    value: Base64,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct EndLine {
    grants: usize,
    removed: usize,
    secrets: usize,
    /// SHA-256 of all lines before this one, sealed.
    seal: Base64,
}

/// Bytes, as they are written in JSON.
struct Base64(Vec<u8>);

impl Serialize for Base64 {
    fn serialize<S: serde::Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.serialize_str(&BASE64_STANDARD.encode(&self.0))
    }
}

impl<'de> Deserialize<'de> for Base64 {
    fn deserialize<D: serde::Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        let text = String::deserialize(from)?;
        BASE64_STANDARD.decode(text).map(Self).map_err(|_| serde::de::Error::custom("not base64"))
    }
}

/// Takes a digest of what passes.
struct Digesting<W> {
    out: W,
    digest: Sha256,
}

impl<W: Write> Digesting<W> {
    fn line(&mut self, line: &impl Serialize) -> io::Result<()> {
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.digest.update(&text);
        self.out.write_all(&text)
    }
}

pub(super) fn write(snapshot: &Snapshot, sealer: &Sealer, out: &mut impl Write) -> Result<(), ArchiveError> {
    let mut keys: Vec<String> = Vec::new();
    for (slot, sealed) in snapshot.values() {
        let key = seal::key_id(sealed).filter(|_| slot != Slot::KeyCheck).map(|key| key.to_string());
        keys.extend(key.filter(|key| !keys.contains(key)));
    }
    let mut out = Digesting { out, digest: Sha256::new() };
    out.line(&Head { format: FORMAT.into(), version: VERSION, keys })?;
    for record in snapshot.grants.iter().filter_map(|(_, record)| record.as_ref().ok()) {
        out.line(&Line::Grant(Box::new(record.into())))?;
    }
    for (Names { provider, subject }, generation) in &snapshot.removed {
        let (provider, subject) = (provider.to_string(), subject.as_str().to_owned());
        out.line(&Line::Removed(RemovedLine { provider, subject, generation: *generation }))?;
    }
    for (name, value) in &snapshot.own {
        out.line(&Line::Secret(SecretLine { name: name.clone(), value: Base64(value.clone()) }))?;
    }
    let digest = Secret::new(hex(&out.digest.clone().finalize()));
    let (grants, removed, secrets) = (snapshot.grants.len(), snapshot.removed.len(), snapshot.own.len());
    let seal = Base64(sealer.seal(WHOLE, &digest)?);
    out.line(&Line::End(EndLine { grants, removed, secrets, seal }))?;
    Ok(out.out.flush()?)
}

impl Archive {
    /// Reads a file to its end.
    ///
    /// # Errors
    /// When it is no export, or not a whole one.
    pub fn read(from: impl Read) -> Result<Self, ArchiveError> {
        let mut lines = Lines { from: BufReader::new(from), number: 0, digest: Sha256::new() };
        let head = lines.next().ok().flatten().ok_or(ArchiveError::NotOne)?;
        let mut archive = Archive::begin(&head)?;
        let mut seen = HashSet::new();
        loop {
            let digest = hex(&lines.digest.clone().finalize());
            let text = lines.next()?.ok_or(ArchiveError::Cut)?;
            let wrong = |what| ArchiveError::Line { line: lines.number, what };
            let line = serde_json::from_slice(&text).map_err(|_| wrong("is not a line of an export"))?;
            if let Line::End(end) = line {
                archive.end(end, digest)?;
                return if lines.next()?.is_none() { Ok(archive) } else { Err(lines.wrong("comes after the end")) };
            }
            let place = archive.add(line).ok_or_else(|| wrong("has a name or a value that is none"))?;
            if !seen.insert(place) {
                return Err(wrong("is there twice"));
            }
        }
    }

    fn begin(head: &[u8]) -> Result<Self, ArchiveError> {
        // A later version may have more to say.
        let value: serde_json::Value = serde_json::from_slice(head).map_err(|_| ArchiveError::NotOne)?;
        if value["format"] != FORMAT {
            return Err(ArchiveError::NotOne);
        }
        let version = value["version"].as_u64().ok_or(ArchiveError::NotOne)?;
        if version > VERSION {
            return Err(ArchiveError::Newer { found: version });
        }
        let Head { keys, .. } = serde_json::from_value(value).map_err(|_| ArchiveError::NotOne)?;
        let (grants, removed, own, digest, seal) = Default::default();
        Ok(Self { keys, grants, removed, own, digest, seal })
    }

    /// Takes a line in. Gives the place that only one of them may have.
    fn add(&mut self, line: Line) -> Option<(u8, String, String)> {
        match line {
            Line::Grant(line) => {
                let record = Record::try_from(*line).ok()?;
                let place = (0, record.names.provider.to_string(), record.names.subject.as_str().to_owned());
                self.grants.push(record);
                Some(place)
            }
            Line::Removed(RemovedLine { provider, subject, generation }) => {
                self.removed.push((Names::parse(&provider, &subject)?, generation));
                Some((1, provider, subject))
            }
            Line::Secret(SecretLine { name, value }) => {
                self.own.push((name.clone(), value.0));
                Some((2, name, String::new()))
            }
            Line::End(_) => None,
        }
    }

    fn end(&mut self, end: EndLine, digest: String) -> Result<(), ArchiveError> {
        let EndLine { grants, removed, secrets, seal } = end;
        if (grants, removed, secrets) != (self.grants.len(), self.removed.len(), self.own.len()) {
            return Err(ArchiveError::Changed);
        }
        (self.digest, self.seal) = (digest, seal.0);
        Ok(())
    }

    /// Whether it is as it was written, and everything in it opens with these keys.
    ///
    /// # Errors
    /// What does not.
    pub fn check(&self, keys: &Keyring) -> Result<(), ArchiveError> {
        let at_hand: Vec<String> = keys.ids().iter().map(KeyId::to_string).collect();
        let missing: Vec<String> = self.keys.iter().filter(|key| !at_hand.contains(key)).cloned().collect();
        if !missing.is_empty() {
            return Err(ArchiveError::Keys { missing, at_hand });
        }
        let sealer = Sealer { keys: keys.clone(), at: "the export".into() };
        match sealer.open(WHOLE, &self.seal) {
            Ok(digest) if digest == Secret::new(&*self.digest) => {}
            Err(StoreError::WrongKey { sealed_with, .. }) => {
                return Err(ArchiveError::Keys { missing: vec![sealed_with.to_string()], at_hand });
            }
            _ => return Err(ArchiveError::Changed),
        }
        let grants = self.grants.iter().map(|record| (record.names.clone(), Ok(record.clone())));
        let (grants, own) = (grants.collect(), self.own.clone());
        let snapshot = Snapshot { key_check: None, grants, removed: Vec::new(), own, flows: Vec::new() };
        let faults = sealer.faults(&snapshot, &snapshot.values());
        if faults.is_empty() { Ok(()) } else { Err(ArchiveError::Unopened(faults)) }
    }
}

/// The lines of a file, none of which can fill the memory.
struct Lines<R> {
    from: BufReader<R>,
    number: usize,
    digest: Sha256,
}

impl<R: Read> Lines<R> {
    fn next(&mut self) -> Result<Option<Vec<u8>>, ArchiveError> {
        let mut line = Vec::new();
        self.number += 1;
        (&mut self.from).take(LONGEST).read_until(b'\n', &mut line)?;
        self.digest.update(&line);
        match line.pop() {
            None => Ok(None),
            Some(b'\n') => Ok(Some(line)),
            Some(_) if line.len() as u64 + 1 == LONGEST => Err(self.wrong("is longer than a megabyte")),
            Some(_) => Err(ArchiveError::Cut),
        }
    }

    fn wrong(&self, what: &'static str) -> ArchiveError {
        ArchiveError::Line { line: self.number, what }
    }
}

impl From<&Record> for GrantLine {
    fn from(record: &Record) -> Self {
        let base64 = |bytes: &Option<Vec<u8>>| bytes.clone().map(Base64);
        Self {
            provider: record.names.provider.to_string(),
            subject: record.names.subject.as_str().to_owned(),
            generation: record.generation,
            target: record.target.clone(),
            refresh_token: base64(&record.refresh_token),
            access_token: base64(&record.access_token),
            obtained_at: record.obtained_at,
            expires_at: record.expires_at,
            granted_scopes: record.granted_scopes.clone(),
            further_scopes: record.further_scopes.clone(),
            state: record.state.state.clone(),
            reason: record.state.reason.clone(),
            intent_hash: record.intent.as_ref().map(|intent| Base64(intent.hash.to_vec())),
            intent_at: record.intent.as_ref().map(|intent| intent.at),
            renewed_at: record.renewed_at,
            stored_at: record.stored_at,
        }
    }
}

impl TryFrom<GrantLine> for Record {
    type Error = ();

    fn try_from(line: GrantLine) -> Result<Self, ()> {
        let intent = match (line.intent_hash, line.intent_at) {
            (Some(Base64(hash)), Some(at)) => Some(IntentRecord { hash: hash.try_into().map_err(|_| ())?, at }),
            (None, None) => None,
            _ => return Err(()),
        };
        Ok(Self {
            names: Names::parse(&line.provider, &line.subject).ok_or(())?,
            generation: line.generation,
            target: line.target,
            refresh_token: line.refresh_token.map(|sealed| sealed.0),
            access_token: line.access_token.map(|sealed| sealed.0),
            obtained_at: line.obtained_at,
            expires_at: line.expires_at,
            granted_scopes: line.granted_scopes,
            further_scopes: line.further_scopes,
            state: StateRecord { state: line.state, reason: line.reason },
            intent,
            renewed_at: line.renewed_at,
            stored_at: line.stored_at,
        })
    }
}

/// Why nothing was exported or imported.
#[derive(Debug, thiserror::Error)]
pub enum ArchiveError {
    /// The file can be neither read nor written.
    #[error("{0}")]
    Io(#[from] io::Error),
    /// It is some other file.
    #[error("it is no export of a store")]
    NotOne,
    /// It was written by a later release.
    #[error("it was written by a newer version: its format is {found}, and {VERSION} is the newest known")]
    Newer {
        /// Its format.
        found: u64,
    },
    /// A line that is none.
    #[error("line {line} {what}")]
    Line {
        /// Which, from 1.
        line: usize,
        /// What is wrong with it.
        what: &'static str,
    },
    /// Its last line is not there.
    #[error("it was cut off: its last line is missing")]
    Cut,
    /// It is not as it was written.
    #[error("it was changed after it was written")]
    Changed,
    /// A key that is not at hand.
    #[error("it is sealed with key {}, and the keys at hand are {}", listed(.missing), listed(.at_hand))]
    Keys {
        /// The keys that are missing.
        missing: Vec<String>,
        /// The keys that are there.
        at_hand: Vec<String>,
    },
    /// Some of it does not open.
    #[error("{}", lines(.0))]
    Unopened(Vec<Fault>),
    /// Something else is in its place.
    #[error("{}", lines(.0))]
    InTheWay(Vec<InTheWay>),
    /// Others write all the time.
    #[error("others went on writing to the store")]
    Contended,
    /// The store cannot be used.
    #[error(transparent)]
    Store(#[from] StoreError),
}

/// What is there already, and is not what was to be written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InTheWay {
    /// What it is.
    pub what: Kept,
    /// What is wrong with that.
    pub why: &'static str,
}

impl ArchiveError {
    /// A stable name for machines.
    pub fn code(&self) -> &'static str {
        match self {
            ArchiveError::Io(_) => "archive_io",
            ArchiveError::NotOne | ArchiveError::Line { .. } => "archive_garbled",
            ArchiveError::Newer { .. } => "archive_newer",
            ArchiveError::Cut => "archive_cut",
            ArchiveError::Changed => "archive_changed",
            ArchiveError::Keys { .. } => "archive_wrong_key",
            ArchiveError::Unopened(_) => "archive_unopened",
            ArchiveError::InTheWay(_) => "archive_in_the_way",
            ArchiveError::Contended => "archive_contended",
            ArchiveError::Store(error) => error.code(),
        }
    }

    /// What to do next.
    pub fn hint(&self) -> String {
        match self {
            ArchiveError::Io(error) if error.kind() == io::ErrorKind::AlreadyExists => "name a new file".into(),
            ArchiveError::Io(_) => "name a file that this user may read or write".into(),
            ArchiveError::NotOne => "name a file that `sidebearer store export` has written".into(),
            ArchiveError::Newer { .. } => "import it with the version that wrote it, or a later one".into(),
            ArchiveError::Line { .. } | ArchiveError::Cut | ArchiveError::Changed => {
                "copy it again from where it was exported, or export it again".into()
            }
            ArchiveError::Keys { .. } => "put the old store's keys into `store.keys` of the new one".into(),
            ArchiveError::Unopened(_) => {
                "`sidebearer store verify` says what to do for each; a grant that is lost can be disconnected".into()
            }
            ArchiveError::InTheWay(all) if all.iter().any(|one| one.why == IS_DAMAGED) => {
                "disconnect the grants that are damaged: `sidebearer disconnect`".into()
            }
            ArchiveError::InTheWay(_) => "with `--replace`, what is in the file takes its place".into(),
            ArchiveError::Contended => "stop the sidecars, and run it again".into(),
            ArchiveError::Store(error) => error.hint(),
        }
    }
}

impl fmt::Display for InTheWay {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.what, self.why)
    }
}

fn listed(names: &[String]) -> String {
    names.iter().map(|name| format!("`{name}`")).collect::<Vec<_>>().join(", ")
}

/// The first so many, and how many more there are.
fn lines(all: &[impl fmt::Display]) -> String {
    let mut lines: Vec<String> = all.iter().take(SHOWN).map(ToString::to_string).collect();
    if all.len() > SHOWN {
        lines.push(format!("and {} more", all.len() - SHOWN));
    }
    lines.join("\n")
}

const FORMAT: &str = "sidebearer store";
const VERSION: u64 = 1;
/// Where the digest of an export belongs.
const WHOLE: Place<'_> = Place { provider: "", subject: "", column: "whole export" };
const LONGEST: u64 = 1 << 20;
const IS_ANOTHER: &str = "is there already, and is another one";
const IS_DAMAGED: &str = "is there already, and damaged";
const TRIES: usize = 5;
const SHOWN: usize = 20;
