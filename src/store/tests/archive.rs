//! What an export is, and what is taken for none.

use super::*;
use crate::store::archive::{Archive, ArchiveError, Exported};

/// A store with a grant of alice and one of bob, a removed one, and a CA.
async fn filled(directory: &TempDir) -> Store {
    let store = create(directory).await;
    store.put(row("alice", 3), None).await.unwrap();
    store.put(Row { intent: None, ..row("bob", 1) }, None).await.unwrap();
    store.replace(row("gone", 1)).await.unwrap();
    store.remove(&github(), &user("gone")).await.unwrap();
    store.put_sealed("ca", Secret::new("canary-ca"), None).await.unwrap();
    store
}

async fn exported(store: &Store) -> Vec<u8> {
    let mut file = Vec::new();
    store.export(&mut file).await.unwrap();
    file
}

fn refused(file: &[u8]) -> ArchiveError {
    let read = Archive::read(file).and_then(|archive| archive.check(&keys(1)));
    read.expect_err("it was taken for an export")
}

#[tokio::test]
async fn an_export_is_sealed_all_the_way() {
    // LEK-006, LEK-011
    let directory = tempfile::tempdir().unwrap();
    let store = filled(&directory).await;
    let path = directory.path().join("export");
    let exported = store.export_to(&path).await.unwrap();
    assert_eq!(exported, Exported { grants: 2, removed: 1, secrets: 1, pending: vec![(github(), user("alice"))] });
    assert_eq!(fs::metadata(&path).unwrap().mode() & 0o777, 0o600);
    let file = fs::read(&path).unwrap();
    assert!(!file.windows(6).any(|window| window == b"canary"));
    let lines: Vec<serde_json::Value> =
        file.lines().map(|line| serde_json::from_str(&line.unwrap()).unwrap()).collect();
    let head =
        serde_json::json!({ "format": "sidebearer store", "version": 1, "keys": [keys(1).ids()[0].to_string()] });
    assert_eq!((lines.len(), &lines[0]), (6, &head));
    let sealed = BASE64_STANDARD.decode(lines[1]["grant"]["refresh_token"].as_str().unwrap()).unwrap();
    let kept: Vec<u8> = Connection::open(database(&directory))
        .unwrap()
        .query_row("SELECT refresh_token FROM grants WHERE subject = 'alice'", [], |row| row.get(0))
        .unwrap();
    assert_eq!(sealed, kept, "it is copied as it is");

    let before = fs::read_dir(directory.path()).unwrap().count();
    let error = store.export_to(&path).await.unwrap_err();
    assert_eq!((error.code(), &*error.hint()), ("archive_io", "name a new file"));
    assert_eq!((fs::read(&path).unwrap(), fs::read_dir(directory.path()).unwrap().count()), (file, before));
}

#[tokio::test]
async fn whatever_is_changed_or_cut_off_is_noticed() {
    // TOK-025
    let directory = tempfile::tempdir().unwrap();
    let file = exported(&filled(&directory).await).await;
    Archive::read(&file[..]).unwrap().check(&keys(1)).unwrap();
    for at in 0..file.len() {
        let mut flipped = file.clone();
        flipped[at] ^= 1 << (at % 7);
        refused(&flipped);
        refused(&file[..at]);
    }
    let text = String::from_utf8(file.clone()).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    assert_eq!(refused(text.trim_end().as_bytes()).to_string(), "it was cut off: its last line is missing");
    assert_eq!(refused(lines[..5].concat().as_bytes()).code(), "archive_cut");
    for without in 1..5 {
        let rest = [&lines[..without], &lines[without + 1..]].concat().concat();
        assert_eq!(refused(rest.as_bytes()).to_string(), "it was changed after it was written");
    }
    let another = text.replace("\"subject\":\"bob\"", "\"subject\":\"eve\"");
    assert_eq!(refused(another.as_bytes()).code(), "archive_changed", "what is not sealed by itself");
}

#[tokio::test]
async fn what_is_no_export_is_told_by_its_line() {
    let directory = tempfile::tempdir().unwrap();
    let text = String::from_utf8(exported(&filled(&directory).await).await).unwrap();
    let lines: Vec<&str> = text.split_inclusive('\n').collect();
    for other in ["", "\n", "{}\n", "hunter2", &"x".repeat(3 << 20), "{\"format\":\"sidebearer store\"}\n"] {
        assert_eq!(refused(other.as_bytes()).to_string(), "it is no export of a store");
    }
    let newer = text.replace("\"version\":1", "\"version\":2");
    let said = "it was written by a newer version: its format is 2, and 1 is the newest known";
    assert_eq!(refused(newer.as_bytes()).to_string(), said);
    let with = |second: &str| [lines[0], second, lines[2], lines[3], lines[4], lines[5]].concat();
    for (second, said) in [
        ("hunter2\n", "line 2 is not a line of an export"),
        ("{\"grant\":{}}\n", "line 2 is not a line of an export"),
        ("{\"secret\":{\"name\":\"x\",\"value\":\"?\"}}\n", "line 2 is not a line of an export"),
        (
            "{\"removed\":{\"provider\":\"NO\",\"subject\":\"\",\"generation\":1}}\n",
            "line 2 has a name or a value that is none",
        ),
        (lines[2], "line 3 is there twice"),
    ] {
        assert_eq!(refused(with(second).as_bytes()).to_string(), said, "{second}");
    }
    let long = format!("{}\n", "x".repeat(2 << 20));
    assert_eq!(refused(with(&long).as_bytes()).to_string(), "line 2 is longer than a megabyte");
    assert_eq!(refused(format!("{text}{{}}\n").as_bytes()).to_string(), "line 7 comes after the end");
}

#[tokio::test]
async fn without_the_keys_nothing_is_imported() {
    // TOK-025
    let directory = tempfile::tempdir().unwrap();
    let archive = Archive::read(&exported(&filled(&directory).await).await[..]).unwrap();
    let elsewhere = tempfile::tempdir().unwrap();
    let store = Store::open(elsewhere.path(), keys(2), true).await.unwrap();
    let error = store.import(&archive, true).await.unwrap_err();
    let (old, new) = (keys(1).ids()[0], keys(2).ids()[0]);
    assert_eq!(error.to_string(), format!("it is sealed with key `{old}`, and the keys at hand are `{new}`"));
    assert_eq!(error.hint(), "put the old store's keys into `store.keys` of the new one");
    assert_eq!(store.grants().await.unwrap().len(), 0);
}

#[tokio::test]
async fn what_does_not_open_is_neither_exported_nor_imported() {
    // TOK-026
    let directory = tempfile::tempdir().unwrap();
    let store = filled(&directory).await;
    let mut snapshot = store.engine.snapshot().await.unwrap();
    // By one who has the keys, and exchanges what two users have.
    let [(_, Ok(alice)), (_, Ok(bob))] = &mut snapshot.grants[..] else { panic!("there are two") };
    std::mem::swap(&mut alice.refresh_token, &mut bob.refresh_token);
    let mut file = Vec::new();
    crate::store::archive::write(&snapshot, &store.sealer, &mut file).unwrap();
    let said = "`refresh_token` of user `alice` at `github` is damaged\n\
                `refresh_token` of user `bob` at `github` is damaged";
    let error = refused(&file);
    assert_eq!((error.to_string().as_str(), error.code()), (said, "archive_unopened"));

    let alices = "(SELECT refresh_token FROM grants WHERE subject = 'alice')";
    sqlite(&directory, &format!("UPDATE grants SET refresh_token = {alices} WHERE subject = 'bob'"));
    let path = directory.path().join("export");
    let error = store.export_to(&path).await.unwrap_err();
    assert_eq!(error.to_string(), "`refresh_token` of user `bob` at `github` is damaged");
    assert!(!path.exists());
    store.remove(&github(), &user("bob")).await.unwrap();
    assert_eq!(store.export_to(&path).await.unwrap().grants, 1);
}

#[tokio::test]
async fn a_damaged_grant_is_not_replaced_unseen() {
    let directory = tempfile::tempdir().unwrap();
    let archive = Archive::read(&exported(&filled(&directory).await).await[..]).unwrap();
    sqlite(&directory, "UPDATE grants SET generation = -1 WHERE subject = 'bob'");
    let error = create(&directory).await.import(&archive, true).await.unwrap_err();
    assert_eq!(error.to_string(), "the grant of user `bob` at `github` is there already, and damaged");
    assert_eq!(error.hint(), "disconnect the grants that are damaged: `sidebearer disconnect`");
}
