//! What the store promises, on real files.

mod archive;
mod rekey;

use std::collections::HashSet;
use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::PathBuf;
use std::process::{Child, ChildStdout, Command, Stdio};

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use rusqlite::Connection;
use tempfile::TempDir;

use super::*;
use crate::names::UserName;

pub(super) fn keys(seed: u8) -> Keyring {
    keyring(&[seed])
}

/// The first seals, all open.
pub(super) fn keyring(seeds: &[u8]) -> Keyring {
    let secret = |seed: &u8| Secret::new(BASE64_STANDARD.encode([*seed; 32]));
    Keyring::from_secrets(&seeds.iter().map(secret).collect::<Vec<_>>()).unwrap()
}

pub(super) fn github() -> ProviderName {
    "github".parse().unwrap()
}

pub(super) fn user(name: &str) -> Subject {
    Subject::User(name.parse().unwrap())
}

pub(super) fn at(seconds: u64) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(seconds)
}

pub(super) fn row(name: &str, generation: u64) -> Row {
    Row {
        provider: github(),
        subject: user(name),
        generation,
        target: Target { scopes: vec!["a".into()], audience: Some("b".into()), resource: vec!["c".into()] },
        refresh_token: Some(Secret::new(format!("canary-rt-{name}-{generation}"))),
        access: Some(Access {
            token: Secret::new(format!("canary-at-{name}-{generation}")),
            obtained_at: at(1000),
            expires_at: Some(at(4600)),
        }),
        granted_scopes: Some(vec!["a".into()]),
        further_scopes: vec!["b".into(), "c".into()],
        registration: "0123456789abcdef0123456789abcdef".parse().ok(),
        state: State::reauthorize("invalid_grant"),
        intent: Some(Intent { refresh_token_hash: [7; 32], at: at(900) }),
        renewed_at: Some(at(1001)),
        stored_at: at(1002),
    }
}

async fn create(directory: &TempDir) -> Store {
    Store::open(directory.path(), keys(1), true).await.unwrap()
}

/// A directory with a store that holds alice's grant.
async fn with_alice() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    create(&directory).await.put(row("alice", 1), None).await.unwrap();
    directory
}

fn database(directory: &TempDir) -> PathBuf {
    directory.path().join("sidebearer.db")
}

fn sqlite(directory: &TempDir, sql: &str) {
    Connection::open(database(directory)).unwrap().execute_batch(sql).unwrap();
}

async fn refused(directory: &TempDir) -> StoreError {
    Store::open(directory.path(), keys(1), true).await.err().expect("the store opened")
}

#[tokio::test]
async fn a_grant_that_does_not_open_can_be_removed_and_replaced() {
    let directory = with_alice().await;
    sqlite(&directory, "UPDATE grants SET refresh_token = x'01'");
    let store = create(&directory).await;
    assert!(store.grant(&github(), &user("alice")).await.is_err());
    let removed = store.remove(&github(), &user("alice")).await.unwrap().unwrap();
    assert_eq!(removed.refresh_token, None);
    assert_eq!(store.replace(row("alice", 1)).await.unwrap(), 2);
    assert!(store.grant(&github(), &user("alice")).await.unwrap().is_some());
}

pub(super) const MOST: Most = Most { flows: 10, of_one: 3 };

pub(super) fn alices() -> (ProviderName, Subject) {
    (github(), user("alice"))
}

pub(super) fn flow(name: u8, ends: u64) -> Flow {
    Flow { id: [name; 32], content: Secret::new(format!("flow {name}")), expires_at: at(ends) }
}

#[tokio::test]
async fn a_state_is_not_in_the_store_and_neither_is_what_it_opens() {
    // LEK-011: whoever has a copy can finish nothing with it.
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    let kept = Flow { id: [1; 32], content: Secret::new("canary-verifier"), expires_at: at(600) };
    store.put_flow(kept, alices(), MOST, at(0)).await.unwrap();
    let files = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    for path in files.filter(|path| path.is_file()) {
        assert!(!fs::read(&path).unwrap().windows(6).any(|window| window == b"canary"), "{}", path.display());
    }
    sqlite(&directory, "UPDATE flows SET id = zeroblob(32)");
    assert_eq!(store.take_flow([0; 32], at(1)).await.unwrap_err().code(), "store_value_corrupt");
}

#[tokio::test]
async fn a_flow_opens_under_its_own_state_only_and_shows_nothing() {
    // TOK-026, LEK-011
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    store.put_flow(flow(1, 600), alices(), MOST, at(0)).await.unwrap();
    store.put_flow(flow(2, 600), alices(), MOST, at(0)).await.unwrap();
    let (one, two) = ("01".repeat(32), "02".repeat(32));
    let swap =
        format!("UPDATE flows SET content = (SELECT content FROM flows WHERE id = x'{two}') WHERE id = x'{one}'");
    sqlite(&directory, &swap);
    assert_eq!(store.take_flow([1; 32], at(1)).await.unwrap_err().code(), "store_value_corrupt");
    assert!(matches!(store.take_flow([2; 32], at(1)).await.unwrap(), Taken::Flow(_)));
    drop(store);
    let files = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path());
    for file in files.filter(|path| path.is_file()) {
        assert!(!fs::read(&file).unwrap().windows(6).any(|window| window == b"flow 2"), "{}", file.display());
    }
}

#[tokio::test]
async fn a_stamp_is_for_its_purpose_and_its_store() {
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    let word = store.stamp("ticket", "alice").unwrap();
    assert_eq!(store.stamped("ticket", &word), Some(Secret::new("alice")));
    assert_eq!(store.stamped("another", &word), None);
    assert!(word.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_')), "{word}");
    assert_eq!(store.stamped("ticket", &word[1..]), None);
    let other = tempfile::tempdir().unwrap();
    let other = Store::open(other.path(), keys(2), true).await.unwrap();
    assert_eq!(other.stamped("ticket", &word), None);
}

/// The tables of schema 1, as it was released.
const SCHEMA_1: &str = "
    CREATE TABLE meta (key_check BLOB NOT NULL) STRICT;
    CREATE TABLE sealed (name TEXT PRIMARY KEY, value BLOB NOT NULL) STRICT, WITHOUT ROWID;
    CREATE TABLE grants (
        provider TEXT NOT NULL,
        subject TEXT NOT NULL,
        generation INTEGER NOT NULL,
        target TEXT NOT NULL,
        refresh_token BLOB,
        access_token BLOB,
        obtained_at INTEGER,
        expires_at INTEGER,
        granted_scopes TEXT,
        state TEXT NOT NULL,
        reason TEXT,
        intent_hash BLOB,
        intent_at INTEGER,
        renewed_at INTEGER,
        stored_at INTEGER NOT NULL,
        PRIMARY KEY (provider, subject)
    ) STRICT, WITHOUT ROWID;
    PRAGMA application_id = 0x53644272;
    PRAGMA user_version = 1;";

/// A store of schema 1 with the rows of another one.
fn of_schema_1(rows: &TempDir) -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    fs::write(database(&directory), "").unwrap();
    fs::set_permissions(database(&directory), fs::Permissions::from_mode(0o600)).unwrap();
    let columns = "provider, subject, generation, target, refresh_token, access_token, obtained_at, expires_at,
        granted_scopes, state, reason, intent_hash, intent_at, renewed_at, stored_at";
    let copy = format!(
        "{SCHEMA_1} ATTACH '{}' AS rows; INSERT INTO meta SELECT * FROM rows.meta;
         INSERT INTO sealed SELECT * FROM rows.sealed; INSERT INTO grants SELECT {columns} FROM rows.grants;",
        database(rows).display()
    );
    sqlite(&directory, &copy);
    directory
}

#[tokio::test]
async fn a_store_of_the_release_before_is_brought_up_to_date() {
    let now = with_alice().await;
    create(&now).await.put_sealed("ca", Secret::new("the CA"), None).await.unwrap();
    let directory = of_schema_1(&now);
    for _ in 0..2 {
        let store = Store::open(directory.path(), keys(1), false).await.unwrap();
        let alice = store.grant(&github(), &user("alice")).await.unwrap().unwrap();
        assert_eq!(alice, Row { further_scopes: Vec::new(), ..row("alice", 1) });
        assert_eq!(store.sealed("ca").await.unwrap(), Some(Secret::new("the CA")));
    }
    let store = Store::open(directory.path(), keys(1), false).await.unwrap();
    store.put_flow(flow(1, 600), alices(), MOST, at(0)).await.unwrap();
    assert_eq!(store.replace(row("alice", 1)).await.unwrap(), 2);
    assert_eq!(store.grant(&github(), &user("alice")).await.unwrap(), Some(Row { generation: 2, ..row("alice", 1) }));
    // What comes of it is what a new store has.
    let tables = |directory: &TempDir| {
        let tables =
            "SELECT name, (SELECT group_concat(name) FROM pragma_table_info(tables.name)) FROM sqlite_schema AS tables
                      WHERE type IN ('table', 'index') ORDER BY name";
        let connection = Connection::open(database(directory)).unwrap();
        let mut statement = connection.prepare(tables).unwrap();
        let rows = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
        rows.map(Result::unwrap).collect::<Vec<(String, Option<String>)>>()
    };
    assert_eq!(tables(&directory), tables(&now));
}

#[tokio::test]
async fn a_sidecar_of_the_release_before_goes_on_beside_a_newer_command() {
    // TOK-029, C12: what it cannot write it has lost, and its provider has replaced the token before.
    let directory = of_schema_1(&with_alice().await);
    let before = Connection::open(database(&directory)).unwrap();
    // Sealed for the same place, so that it opens there.
    let rotates = |generation: u64, stored_at: &str| {
        let write = format!(
            "INSERT OR REPLACE INTO grants VALUES ('github', 'alice', {generation}, '{{\"scopes\":[],\"resource\":[]}}',
             (SELECT refresh_token FROM grants WHERE subject = 'alice'), NULL, NULL, NULL, NULL, 'connected', NULL, NULL, NULL,
             NULL, {stored_at})"
        );
        before.execute(&write, []).unwrap_or_else(|error| panic!("it is lost: {error}"));
    };
    let same = "(SELECT stored_at FROM grants WHERE subject = 'alice')";
    let store = Store::open(directory.path(), keys(1), false).await.unwrap();
    let alice = async || store.grant(&github(), &user("alice")).await.unwrap().unwrap();
    rotates(2, same);
    assert_eq!((alice().await.generation, alice().await.refresh_token), (2, row("alice", 1).refresh_token));
    // What it knows nothing of stays with the grant, and goes with it.
    let further = vec!["b".to_owned()];
    assert_eq!(store.replace(Row { further_scopes: further.clone(), ..alice().await }).await.unwrap(), 3);
    rotates(4, same);
    assert_eq!((alice().await.generation, alice().await.further_scopes), (4, further));
    rotates(5, "4102444800000");
    assert_eq!((alice().await.generation, alice().await.further_scopes), (5, Vec::<String>::new()));
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_open_a_store_of_the_release_before_bring_it_up_to_date_once() {
    // TOK-029
    let directory = of_schema_1(&with_alice().await);
    let opening: Vec<_> = (0..8)
        .map(|_| {
            let path = directory.path().to_owned();
            tokio::spawn(async move { Store::open(&path, keys(1), false).await.map(|_| ()) })
        })
        .collect();
    for opened in opening {
        opened.await.unwrap().unwrap();
    }
}

#[tokio::test]
async fn users_with_odd_names_are_kept_apart() {
    // TOK-042
    let long = "x".repeat(1024);
    let names = [
        "a:b",
        "a/b",
        "../a",
        "..",
        ".",
        "a",
        "A",
        "a ",
        "a%00",
        "%",
        "_",
        "é",
        "e\u{301}",
        "'; DROP TABLE grants; --",
        "\u{202e}",
        &long,
        &long[1..],
    ];
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    let mut leases = Vec::new();
    for name in names {
        assert_eq!(store.put(row(name, 1), None).await.unwrap(), Put::Done, "{name:?}");
        leases.push(store.lease(&github(), &user(name)).await.unwrap().expect(name));
    }
    for name in names {
        assert_eq!(store.grant(&github(), &user(name)).await.unwrap(), Some(row(name, 1)), "{name:?}");
    }
    assert_eq!(fs::read_dir(directory.path().join("leases")).unwrap().count(), names.len());
    assert!("a\0b".parse::<UserName>().is_err());
    let pairs = [("a", "bc"), ("ab", "c"), ("abc", "d")];
    let distinct: HashSet<_> = pairs.iter().map(|(p, s)| sqlite::lease_name(&Names::parse(p, s).unwrap())).collect();
    assert_eq!(distinct.len(), 3);
}

#[tokio::test]
async fn a_store_that_is_not_there_is_not_made_unasked() {
    // TOK-025
    let directory = tempfile::tempdir().unwrap();
    for path in [directory.path().to_owned(), directory.path().join("deeper")] {
        let error = Store::open(&path, keys(1), false).await.err().unwrap();
        let file = path.join("sidebearer.db");
        assert_eq!(error.to_string(), format!("there is no store at `{}`", file.display()));
        let hint =
            "`sidebearer run`, `connect` and `import` make one; if there should be one, check `store` in `proxy.yaml`";
        assert_eq!(error.hint(), hint);
    }
    assert_eq!(fs::read_dir(directory.path()).unwrap().count(), 0);
}

#[tokio::test]
async fn a_lost_database_is_not_taken_for_a_first_start() {
    // TOK-025
    let directory = with_alice().await;
    fs::rename(database(&directory), directory.path().join("sidebearer.db-wal")).unwrap();
    let error = refused(&directory).await;
    let file = database(&directory);
    assert_eq!(error.to_string(), format!("there is no store at `{}`, only its write-ahead log", file.display()));
    assert!(!file.exists());
}

#[tokio::test]
async fn a_file_that_is_no_store_is_refused_and_left_alone() {
    // TOK-025
    let whole = fs::read(database(&with_alice().await)).unwrap();
    let mut headless = whole.clone();
    headless[0] ^= 1;
    let mut blank_page = whole.clone();
    // The last page is the grants': nothing else that is done at the start would come upon it.
    let last = blank_page.len() - 4096;
    blank_page[last..].fill(0);
    for (content, what) in [
        (&whole[..0], "it is empty"),
        (b"canary", "it is no SQLite database"),
        (&headless, "it is no SQLite database"),
        (&whole[..whole.len() / 2], "database disk image is malformed"),
        (&whole[..512], "database disk image is malformed"),
        (&blank_page, ""),
    ] {
        let directory = tempfile::tempdir().unwrap();
        fs::write(database(&directory), content).unwrap();
        fs::set_permissions(database(&directory), fs::Permissions::from_mode(0o600)).unwrap();
        match refused(&directory).await {
            StoreError::Corrupt { what: said, .. } if said.contains(what) => {}
            other => panic!("{what}: {other:?}"),
        }
        assert_eq!(fs::read(database(&directory)).unwrap(), content, "{what}");
    }
}

#[tokio::test]
async fn a_store_of_another_program_or_of_the_future_is_refused() {
    // TOK-025
    let directory = with_alice().await;
    sqlite(&directory, "PRAGMA user_version = 99");
    let error = refused(&directory).await;
    let said = "was made by a newer version: its schema is 99, and 3 is the newest known";
    assert_eq!(error.to_string(), format!("the store `{}` {said}", database(&directory).display()));
    assert_eq!(error.hint(), "run the version that made it, or a later one");
    sqlite(&directory, "PRAGMA application_id = 1; PRAGMA journal_mode = DELETE");
    let theirs = fs::read(database(&directory)).unwrap();
    let said = "is damaged: it is another program's database";
    let error = refused(&directory).await;
    assert_eq!(error.to_string(), format!("the store `{}` {said}", database(&directory).display()));
    assert_eq!(fs::read(database(&directory)).unwrap(), theirs);
}

#[tokio::test]
async fn a_store_that_others_can_get_at_is_refused() {
    // TOK-025
    let directory = with_alice().await;
    let path = database(&directory);
    fs::set_permissions(&path, fs::Permissions::from_mode(0o644)).unwrap();
    let error = refused(&directory).await;
    assert_eq!(error.to_string(), format!("the store `{}` is open to every user of this machine", path.display()));
    assert_eq!(
        error.hint(),
        format!("make `{}` readable and writable for this user, and for nobody else", path.display())
    );
    fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
    fs::rename(&path, directory.path().join("elsewhere.db")).unwrap();
    symlink(directory.path().join("elsewhere.db"), &path).unwrap();
    assert_eq!(refused(&directory).await.to_string(), format!("the store `{}` is a symbolic link", path.display()));
    fs::remove_file(&path).unwrap();
    symlink(directory.path().join("nowhere.db"), &path).unwrap();
    assert_eq!(refused(&directory).await.code(), "store_permissions");
    assert!(!directory.path().join("nowhere.db").exists());
    fs::remove_file(&path).unwrap();
    fs::create_dir(&path).unwrap();
    let said = "is not a regular file";
    assert_eq!(refused(&directory).await.to_string(), format!("the store `{}` {said}", path.display()));
    let error = Store::open(&directory.path().join("elsewhere.db"), keys(1), true).await.err().unwrap();
    assert!(error.to_string().ends_with("is not a directory"), "{error}");
}

#[tokio::test]
async fn a_linked_directory_is_followed() {
    let directory = with_alice().await;
    let links = tempfile::tempdir().unwrap();
    symlink(directory.path(), links.path().join("data")).unwrap();
    let store = Store::open(&links.path().join("data"), keys(1), false).await.unwrap();
    assert_eq!(store.grants().await.unwrap().len(), 1);
}

#[tokio::test]
async fn a_wrong_key_is_told_at_once_even_without_rows() {
    // TOK-025
    let directory = tempfile::tempdir().unwrap();
    create(&directory).await;
    let error = Store::open(directory.path(), keys(2), true).await.err().unwrap();
    let (right, wrong) = (keys(1).ids()[0], keys(2).ids()[0]);
    let said = format!("is sealed with key `{right}`, and the keys at hand are [{wrong}]");
    assert_eq!(error.to_string(), format!("the store `{}` {said}", database(&directory).display()));
    assert_eq!(error.hint(), "put the key it was sealed with into `store.keys`");
    assert!(Store::open(directory.path(), keys(1), true).await.is_ok());
}

#[tokio::test]
async fn the_first_key_seals_and_every_key_opens() {
    let directory = with_alice().await;
    let secret = |seed: u8| Secret::new(BASE64_STANDARD.encode([seed; 32]));
    let both = Keyring::from_secrets(&[secret(2), secret(1)]).unwrap();
    let store = Store::open(directory.path(), both, false).await.unwrap();
    assert!(store.grant(&github(), &user("alice")).await.is_ok());
    store.put(row("alice", 2), Some(1)).await.unwrap();
    let old_only = create(&directory).await;
    assert_eq!(old_only.grant(&github(), &user("alice")).await.unwrap_err().code(), "store_wrong_key");
}

#[tokio::test]
async fn a_value_copied_to_another_user_does_not_open_and_hides_no_other() {
    // TOK-025, TOK-026
    let directory = with_alice().await;
    let store = create(&directory).await;
    for name in ["bob", "carol"] {
        store.put(row(name, 1), None).await.unwrap();
    }
    let alices = "(SELECT refresh_token FROM grants WHERE subject = 'alice')";
    sqlite(&directory, &format!("UPDATE grants SET refresh_token = {alices} WHERE subject = 'bob'"));
    sqlite(&directory, "UPDATE grants SET access_token = refresh_token WHERE subject = 'carol'");
    let error = store.grant(&github(), &user("bob")).await.unwrap_err();
    let said = "`refresh_token` of user `bob` at `github` is damaged in the store";
    assert_eq!(error.to_string(), format!("{said} `{}`", database(&directory).display()));
    assert_eq!(error.hint(), "connect this user again");
    let opened: Vec<_> =
        store.grants().await.unwrap().into_iter().map(|(_, who, row)| (who.to_string(), row.is_ok())).collect();
    assert_eq!(opened, [("alice", true), ("bob", false), ("carol", false)].map(|(a, b)| (a.to_owned(), b)));
    store.remove(&github(), &user("bob")).await.unwrap();
    assert_eq!(store.put(row("bob", 2), None).await.unwrap(), Put::Done);
}

#[tokio::test]
async fn a_flipped_bit_never_yields_another_token_or_an_empty_store() {
    // TOK-025
    let original = with_alice().await;
    let whole = fs::read(database(&original)).unwrap();
    for offset in (0..whole.len()).step_by(61) {
        let directory = tempfile::tempdir().unwrap();
        let mut flipped = whole.clone();
        flipped[offset] ^= 1 << (offset % 8);
        fs::write(database(&directory), &flipped).unwrap();
        fs::set_permissions(database(&directory), fs::Permissions::from_mode(0o600)).unwrap();
        let Ok(store) = Store::open(directory.path(), keys(1), true).await else { continue };
        let Ok(listed) = store.grants().await else { continue };
        assert_eq!(listed.len(), 1, "offset {offset}");
        if let (_, _, Ok(found)) = &listed[0] {
            assert_eq!(found.refresh_token, row("alice", 1).refresh_token, "offset {offset}");
            assert_eq!(found.access.as_ref().map(|a| &a.token), row("alice", 1).access.as_ref().map(|a| &a.token));
        }
    }
}

#[tokio::test]
async fn no_file_of_the_store_holds_a_secret() {
    // LEK-006, LEK-011
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    store.put(row("alice", 1), None).await.unwrap();
    store.put_sealed("ca_key", Secret::new("canary-ca"), None).await.unwrap();
    let _lease = store.lease(&github(), &user("alice")).await.unwrap();
    let assert_clean = || {
        let files: Vec<_> = fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().path()).collect();
        for path in files.iter().filter(|path| path.is_file()) {
            let content = fs::read(path).unwrap();
            assert!(!content.windows(6).any(|window| window == b"canary"), "{}", path.display());
            assert_eq!(fs::metadata(path).unwrap().mode() & 0o777, 0o600, "{}", path.display());
        }
        files.len()
    };
    assert_eq!(assert_clean(), 4, "database, -wal, -shm and leases");
    drop(store);
    assert_eq!(assert_clean(), 2);
    assert_eq!(fs::metadata(directory.path().join("leases")).unwrap().mode() & 0o777, 0o700);
}

#[tokio::test]
async fn a_secret_of_the_sidecar_is_kept_under_its_name() {
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    assert_eq!(store.sealed("ca_key").await.unwrap(), None);
    let put = async |value: &str, previous: Option<&str>| {
        let previous = previous.map(Secret::new);
        store.put_sealed("ca_key", Secret::new(value), previous.as_ref()).await.unwrap()
    };
    assert_eq!(put("old", None).await, Secret::new("old"));
    assert_eq!(put("new", Some("old")).await, Secret::new("new"));
    assert_eq!(put("late", Some("old")).await, Secret::new("new"), "another was quicker");
    assert_eq!(store.sealed("ca_key").await.unwrap(), Some(Secret::new("new")));
    sqlite(&directory, "INSERT INTO sealed SELECT 'other', value FROM sealed");
    assert_eq!(store.sealed("other").await.unwrap_err().code(), "store_value_corrupt");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_who_open_a_new_store_at_once_get_the_same_one() {
    // TOK-029
    let directory = tempfile::tempdir().unwrap();
    let opening: Vec<_> = (0..12)
        .map(|index| {
            let path = directory.path().join("store");
            tokio::spawn(async move {
                let store = Store::open(&path, keys(1), true).await.unwrap();
                store.put(row(&format!("user{index}"), 1), None).await.unwrap()
            })
        })
        .collect();
    for opened in opening {
        assert_eq!(opened.await.unwrap(), Put::Done);
    }
    let store = Store::open(&directory.path().join("store"), keys(1), false).await.unwrap();
    assert_eq!(store.grants().await.unwrap().len(), 12);
    assert_eq!(fs::metadata(directory.path().join("store")).unwrap().mode() & 0o777, 0o700);
    drop(store);
    assert_eq!(fs::read_dir(directory.path().join("store")).unwrap().count(), 2, "database and leases");
}

/// This test binary as another process, which does what [`other_process`] says until it is killed.
fn spawn(directory: &TempDir, task: &str) -> (Child, BufReader<ChildStdout>) {
    let mut child = Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "store::tests::other_process", "--ignored", "--nocapture"])
        .env("STORE_TEST_DIRECTORY", directory.path())
        .env("STORE_TEST_TASK", task)
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let stdout = BufReader::new(child.stdout.take().unwrap());
    (child, stdout)
}

#[tokio::test]
#[ignore = "the other half of the tests that call `spawn`"]
async fn other_process() {
    let Ok(directory) = std::env::var("STORE_TEST_DIRECTORY") else { return };
    let say = |what: &str| writeln!(std::io::stdout(), "\n{what}").unwrap();
    if std::env::var("STORE_TEST_TASK").unwrap() == "rekey" {
        let store = Store::open(Path::new(&directory), keyring(&[2, 1]), false).await.unwrap();
        store.rekey(|done, _| say(&format!("sealed {done}"))).await.unwrap();
        std::future::pending::<()>().await;
    }
    let store = Store::open(Path::new(&directory), keys(1), true).await.unwrap();
    if std::env::var("STORE_TEST_TASK").unwrap() == "hold" {
        let _lease = store.lease(&github(), &user("alice")).await.unwrap().unwrap();
        say("held");
        std::future::pending::<()>().await;
    }
    let mut generation = store.grant(&github(), &user("alice")).await.unwrap().map(|row| row.generation);
    loop {
        let next = generation.unwrap_or(0) + 1;
        assert_eq!(store.put(row("alice", next), generation).await.unwrap(), Put::Done);
        say(&format!("wrote {next}"));
        generation = Some(next);
    }
}

#[tokio::test]
async fn a_lease_ends_with_its_process() {
    // C12
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    let (mut child, stdout) = spawn(&directory, "hold");
    assert!(stdout.lines().any(|line| line.unwrap() == "held"));
    assert!(store.lease(&github(), &user("alice")).await.unwrap().is_none());
    child.kill().unwrap();
    child.wait().unwrap();
    super::contract::given_back(&store).await;
}

#[tokio::test]
async fn what_was_written_survives_the_death_of_the_writer() {
    // TOK-020, TOK-029
    let directory = tempfile::tempdir().unwrap();
    for round in 1..=6 {
        let (mut child, stdout) = spawn(&directory, "write");
        let written = |line: io::Result<String>| line.unwrap().strip_prefix("wrote ")?.parse::<u64>().ok();
        let mut written = stdout.lines().filter_map(written);
        let told = written.nth(round * 3).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let told = written.last().unwrap_or(told);
        let store = Store::open(directory.path(), keys(1), false).await.unwrap();
        let stored = store.grant(&github(), &user("alice")).await.unwrap().unwrap();
        assert_eq!(stored, row("alice", stored.generation));
        assert!((told..=told + 1).contains(&stored.generation), "told {told}, stored {}", stored.generation);
    }
}
