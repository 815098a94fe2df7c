//! What keys are proved and rotated by, on real files.

use super::*;
use crate::store::upkeep::{Fault, Kept};

async fn both(directory: &TempDir) -> Store {
    Store::open(directory.path(), keyring(&[2, 1]), false).await.unwrap()
}

fn of_grant(name: &str, column: &str) -> Kept {
    Kept::OfGrant { provider: github(), subject: user(name), column: column.into() }
}

#[tokio::test]
async fn opening_a_store_changes_none_of_its_seals() {
    // Of two sidecars whose keys are in another order, each would undo what the other has done, for ever.
    let directory = with_alice().await;
    for seeds in [[2, 1], [1, 2]] {
        let store = Store::open(directory.path(), keyring(&seeds), false).await.unwrap();
        assert!(store.grant(&github(), &user("alice")).await.is_ok());
    }
    assert!(Store::open(directory.path(), keys(1), false).await.is_ok());
    assert!(Store::open(directory.path(), keys(2), false).await.is_err());
}

#[tokio::test]
async fn a_rekey_that_is_killed_at_any_moment_goes_on_where_it_was() {
    // TOK-020
    let directory = tempfile::tempdir().unwrap();
    let store = create(&directory).await;
    let all = 1200;
    for number in 0..all / 2 {
        store.put(row(&format!("user {number}"), 1), None).await.unwrap();
    }
    drop(store);
    let mut before = 0;
    for steps in 1..4 {
        let (mut child, stdout) = spawn(&directory, "rekey");
        let mut done = stdout.lines().filter_map(|line| line.unwrap().strip_prefix("sealed ")?.parse::<usize>().ok());
        let told = done.nth(steps - 1).unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
        let verified = both(&directory).await.verify().await.unwrap();
        assert_eq!((verified.faults, verified.values), (vec![], all + 1));
        let sealed_anew = verified.keys[0].1;
        assert!(sealed_anew >= before + told, "told {told} after {before}, stored {sealed_anew}");
        before = sealed_anew;
    }
    let store = both(&directory).await;
    assert_eq!(store.rekey(|_, _| {}).await.unwrap().resealed, all + 1 - before);
    let store = Store::open(directory.path(), keys(2), false).await.unwrap();
    let opened = store.grants().await.unwrap().into_iter().map(|(.., row)| row.unwrap());
    assert_eq!(opened.filter(|row| row.generation == 1 && row.refresh_token.is_some()).count(), all / 2);
}

#[tokio::test]
async fn what_does_not_open_is_named_and_hides_nothing() {
    // TOK-025, TOK-026
    let directory = with_alice().await;
    let store = create(&directory).await;
    for name in ["bob", "carol", "dave"] {
        store.put(row(name, 1), None).await.unwrap();
    }
    store.put_sealed("ca", Secret::new("the CA"), None).await.unwrap();
    store.put_flow(flow(1, 600), alices(), MOST, at(0)).await.unwrap();
    let third = Store::open(directory.path(), keyring(&[3, 1]), false).await.unwrap();
    third.put(row("dave", 2), Some(1)).await.unwrap();
    let alices = "(SELECT refresh_token FROM grants WHERE subject = 'alice')";
    sqlite(&directory, &format!("UPDATE grants SET refresh_token = {alices} WHERE subject = 'bob'"));
    sqlite(&directory, "UPDATE grants SET access_token = zeroblob(70), target = '{' WHERE subject = 'carol'");
    sqlite(&directory, "UPDATE sealed SET value = x'01'; UPDATE flows SET content = x''");

    let damaged = |what: Kept| Fault { what, sealed_with: None };
    let unknown = |column: &str| Fault { what: of_grant("dave", column), sealed_with: Some(keys(3).ids()[0]) };
    let expected = [
        damaged(of_grant("bob", "refresh_token")),
        damaged(of_grant("carol", "access_token")),
        unknown("refresh_token"),
        unknown("access_token"),
        damaged(Kept::Consent),
        damaged(Kept::Own("ca".into())),
    ];
    let store = both(&directory).await;
    let verified = store.verify().await.unwrap();
    assert_eq!(verified.faults, expected);
    let [one, two, three] = [1, 2, 3].map(|seed| keys(seed).ids()[0]);
    // Bob's token is alice's, so that it counts for the key although it does not open.
    assert_eq!((verified.keys, verified.at_hand, verified.values), (vec![(two, 0), (one, 6), (three, 2)], 2, 11));

    let rekeyed = store.rekey(|_, _| {}).await.unwrap();
    assert_eq!((rekeyed.resealed, rekeyed.behind), (5, 0));
    assert_eq!(rekeyed.faults, expected);
    assert_eq!(rekeyed.faults[0].to_string(), "`refresh_token` of user `bob` at `github` is damaged");
    let said = format!("`refresh_token` of user `dave` at `github` is sealed with key `{three}`, which is not at hand");
    assert_eq!(rekeyed.faults[2].to_string(), said);
    assert_eq!(rekeyed.faults[5].to_string(), "the secret `ca` is damaged");
    assert_eq!((rekeyed.faults[0].code(), rekeyed.faults[2].code()), ("store_value_corrupt", "store_wrong_key"));
    let new = Store::open(directory.path(), keys(2), false).await.unwrap();
    assert_eq!(new.grant(&github(), &user("alice")).await.unwrap(), Some(row("alice", 1)));
    // Who has the third key finishes it.
    let all = Store::open(directory.path(), keyring(&[2, 1, 3]), false).await.unwrap();
    assert_eq!(all.rekey(|_, _| {}).await.unwrap().resealed, 2);
}

#[tokio::test]
async fn a_column_that_is_not_sealed_may_be_damaged_too() {
    // TOK-025
    for (damage, column) in [("target = '{'", "target"), ("state = 'odd'", "state"), ("generation = -1", "generation")]
    {
        let directory = with_alice().await;
        sqlite(&directory, &format!("UPDATE grants SET {damage}"));
        let verified = create(&directory).await.verify().await.unwrap();
        assert_eq!(verified.faults, [Fault { what: of_grant("alice", column), sealed_with: None }]);
    }
}
