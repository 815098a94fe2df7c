//! What every engine has to do alike, tried on each: what [`super::engine`] promises.
//!
//! The tests on PostgreSQL need a server, which `tests/run` has: `SIDEBEARER_TEST_POSTGRES` names it, as a user who may make
//! databases.

use std::collections::{HashMap, HashSet};

use rustls::RootCertStore;
use tempfile::TempDir;

use super::archive::{Archive, Imported};
use super::engine::{Plan, Resealed};
use super::postgres::ServerUrl;
use super::tests::{MOST, alices, at, flow, github, keyring, row, user};
use super::*;

/// A store of one of the engines, which several processes open.
pub(super) enum Ground {
    Embedded(TempDir),
    Shared(Box<ServerUrl>),
    /// Of tests that need many sidecars and no PostgreSQL.
    Memory(memory::Server),
}

macro_rules! on_every_engine {
    ($($promise:ident,)*) => {
        mod embedded {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::$promise(&super::Ground::Embedded(tempfile::tempdir().unwrap())).await;
            })*
        }

        mod in_memory {
            $(#[tokio::test(flavor = "multi_thread")]
            async fn $promise() {
                super::$promise(&super::Ground::Memory(crate::store::memory::Server::new())).await;
            })*
        }

        mod shared {
            $(#[tokio::test(flavor = "multi_thread")]
            #[ignore = "needs a PostgreSQL server: tests/run has one"]
            async fn $promise() {
                super::$promise(&super::Ground::shared().await).await;
            })*
        }
    };
}

on_every_engine! {
    what_is_put_comes_back_whole,
    only_who_knows_the_generation_writes,
    no_grant_has_the_generation_of_one_before_it,
    grants_are_counted_by_whose_they_are_and_in_which_state,
    what_waits_for_the_operator_is_connected_again_all_at_once,
    a_flow_is_taken_once,
    of_many_processes_that_take_a_flow_one_gets_it,
    so_many_flows_are_kept_and_no_more,
    an_intent_stays_until_the_row_is_written_or_marked,
    another_s_write_is_told_and_one_s_own_is_not,
    of_many_writers_of_one_generation_one_wins,
    a_lease_is_held_by_one_until_it_is_dropped,
    no_generation_comes_back_whoever_removes_and_replaces_at_once,
    a_long_name_is_told_of_too,
    sidecars_that_start_at_once_share_what_the_first_has_made,
    what_is_sealed_anew_opens_with_the_new_key_alone,
    sealing_anew_overwrites_nothing_that_was_written_meanwhile,
    a_sidecar_that_renews_all_the_time_does_not_notice_a_rekey,
    of_many_rekeys_at_once_each_value_is_done_by_one,
    whoever_goes_on_sealing_with_the_old_key_is_told_of,
    a_store_moves_to_another_engine_and_back,
    an_import_that_is_repeated_changes_nothing,
    what_is_in_the_way_of_an_import_is_named_and_nothing_is_written,
    an_import_that_replaces_gives_a_generation_that_nobody_has_had,
    a_plan_is_carried_out_whole_or_not_at_all,
}

impl Ground {
    /// In a database of its own.
    async fn shared() -> Self {
        let admin = std::env::var("SIDEBEARER_TEST_POSTGRES").expect("SIDEBEARER_TEST_POSTGRES is the URL of a server");
        let name = tempfile::Builder::new().prefix("engine_").tempdir().unwrap();
        let name = name.path().file_name().unwrap().to_str().unwrap().to_lowercase();
        let (client, connection) = tokio_postgres::connect(&admin, tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        client.batch_execute(&format!("CREATE DATABASE {name}")).await.unwrap();
        let (server, query) = admin.split_once('?').unwrap();
        let (server, _) = server.rsplit_once('/').unwrap();
        let url = Secret::new(format!("{server}/{name}?{query}"));
        Ground::Shared(Box::new(ServerUrl::parse(&url, None, &HashMap::new()).unwrap()))
    }

    /// As another process opens it.
    pub(super) async fn store(&self) -> Store {
        self.store_with(&[1]).await
    }

    pub(super) async fn store_with(&self, seeds: &[u8]) -> Store {
        self.open(seeds).await.unwrap()
    }

    async fn open(&self, seeds: &[u8]) -> Result<Store, StoreError> {
        match self {
            Ground::Embedded(directory) => Store::open(directory.path(), keyring(seeds), true).await,
            Ground::Shared(server) => Store::connect(server, no_tls(), keyring(seeds), true).await,
            Ground::Memory(server) => server.open_with(keyring(seeds), &memory::Process::default()).await,
        }
    }
}

fn no_tls() -> ClientConfig {
    let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
    let config = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    config.with_root_certificates(RootCertStore::empty()).with_no_client_auth()
}

async fn what_is_put_comes_back_whole(ground: &Ground) {
    let bare = Row {
        subject: Subject::Client,
        target: Target::default(),
        refresh_token: None,
        access: None,
        granted_scopes: None,
        further_scopes: Vec::new(),
        state: State::Connected,
        intent: None,
        renewed_at: None,
        stored_at: SystemTime::UNIX_EPOCH - Duration::from_millis(1),
        ..row("alice", 0)
    };
    let full = Row { state: State::FixConfiguration { reason: "invalid_client".into() }, ..row("alice", 1) };
    let store = ground.store().await;
    assert_eq!(store.grant(&github(), &user("alice")).await.unwrap(), None);
    for row in [&full, &bare] {
        assert_eq!(store.put(row.clone(), None).await.unwrap(), Put::Done);
    }
    drop(store);
    let store = ground.store().await;
    assert_eq!(store.grant(&github(), &user("alice")).await.unwrap(), Some(full.clone()));
    let listed: Vec<Row> = store.grants().await.unwrap().into_iter().map(|(_, _, row)| row.unwrap()).collect();
    assert_eq!(listed, [bare, full]);
}

async fn only_who_knows_the_generation_writes(ground: &Ground) {
    // TOK-031, TOK-038
    ground.store().await.put(row("alice", 1), None).await.unwrap();
    let store = ground.store().await;
    assert_eq!(store.put(row("alice", 2), Some(1)).await.unwrap(), Put::Done);
    let stored = Put::Stale(Box::new(row("alice", 2)));
    assert_eq!(store.put(row("alice", 9), Some(1)).await.unwrap(), stored);
    assert_eq!(store.put(row("alice", 9), None).await.unwrap(), stored);
    let removed = store.remove(&github(), &user("alice")).await.unwrap().unwrap();
    assert_eq!(removed.refresh_token, row("alice", 2).refresh_token);
    assert_eq!(removed.access_token, row("alice", 2).access.map(|access| access.token));
    assert_eq!(removed.registration, row("alice", 2).registration);
    assert_eq!(store.remove(&github(), &user("alice")).await.unwrap(), None);
    assert_eq!(store.put(row("alice", 3), Some(2)).await.unwrap(), Put::Gone);
    assert_eq!(store.grants().await.unwrap().len(), 0);
}

async fn no_grant_has_the_generation_of_one_before_it(ground: &Ground) {
    // TOK-038
    ground.store().await.put(row("alice", 1), None).await.unwrap();
    let store = ground.store().await;
    assert_eq!(store.replace(row("alice", 1)).await.unwrap(), 2);
    store.remove(&github(), &user("alice")).await.unwrap().unwrap();
    assert_eq!(store.replace(row("alice", 1)).await.unwrap(), 3);
    assert_eq!(store.replace(row("bob", 9)).await.unwrap(), 1);
    // What a renewal of the removed grant brings is not written over the new one.
    let late = store.put(row("alice", 3), Some(2)).await.unwrap();
    assert!(matches!(late, Put::Stale(newer) if newer.generation == 3));
    let asked = ["alice", "bob", "nobody"].map(|name| (github(), user(name)));
    let generations = store.generations(asked).await.unwrap();
    assert_eq!(generations.len(), 2);
    assert_eq!(generations[&(github(), user("alice"))], 3);
}

async fn grants_are_counted_by_whose_they_are_and_in_which_state(ground: &Ground) {
    let store = ground.store().await;
    assert_eq!(store.census().await.unwrap(), []);
    let (here, elsewhere) = (row("alice", 1).registration, "00".parse().ok());
    let of = |registration, state: &State, grants| {
        let (provider, state) = (github(), Some(state.clone()));
        Counted { provider, registration, state, grants }
    };
    let (connected, dead) = (State::Connected, State::reauthorize("invalid_grant"));
    let refused = State::Reauthorize { reason: "invalid_scope".into(), wanted: "0123456789abcdef".parse().ok() };
    for (name, registration, state) in [
        ("alice", here, &connected),
        ("bob", here, &connected),
        ("carol", here, &dead),
        ("dave", elsewhere, &connected),
        ("erin", None, &connected),
        ("frank", here, &refused),
    ] {
        store.put(Row { registration, state: state.clone(), ..row(name, 1) }, None).await.unwrap();
    }
    let counted = store.measured_by(&Metrics::default()).census().await.unwrap();
    let expected = [
        of(here, &connected, 2),
        of(here, &dead, 1),
        of(elsewhere, &connected, 1),
        of(None, &connected, 1),
        of(here, &refused, 1),
    ];
    assert_eq!(counted.len(), expected.len(), "{counted:?}");
    expected.iter().for_each(|one| assert!(counted.contains(one), "{counted:?} has no {one:?}"));
}

async fn what_waits_for_the_operator_is_connected_again_all_at_once(ground: &Ground) {
    // TOK-018, C15
    let store = ground.store().await;
    let refused = State::FixConfiguration { reason: "invalid_client".into() };
    let of = |provider: &str, name, state: &State| Row {
        provider: provider.parse().unwrap(),
        state: state.clone(),
        ..row(name, 1)
    };
    let rows = [
        of("github", "alice", &refused),
        of("github", "bob", &refused),
        of("github", "carol", &State::reauthorize("invalid_grant")),
        of("slack", "alice", &refused),
    ];
    for row in &rows {
        store.put(row.clone(), None).await.unwrap();
    }
    let other = ground.store().await;
    let mut changes = other.watch().await;
    store.corrected(&github()).await.unwrap();
    let expected = [(0, State::Connected), (1, State::Connected), (2, rows[2].state.clone()), (3, refused)];
    for (which, state) in expected {
        let row = &rows[which];
        let stored = store.grant(&row.provider, &row.subject).await.unwrap();
        // Intent, generation and all.
        assert_eq!(stored, Some(Row { state, ..row.clone() }));
    }
    // It is no news of any grant.
    if let Ok(Change::Of(..)) = tokio::time::timeout(Duration::from_secs(1), changes.next()).await {
        panic!("a change was told");
    }
    store.corrected(&github()).await.unwrap();
}

async fn a_flow_is_taken_once(ground: &Ground) {
    // OAU-001, OAU-006
    let store = ground.store().await;
    store.put_flow(flow(1, 600), alices(), MOST, at(0)).await.unwrap();
    let racing = (0..8).map(|_| store.take_flow([1; 32], at(1)));
    let taken: Vec<_> = futures_util::future::join_all(racing).await.into_iter().map(Result::unwrap).collect();
    assert_eq!(taken.iter().filter(|taken| **taken == Taken::Flow(flow(1, 600))).count(), 1);
    assert_eq!(taken.iter().filter(|taken| **taken == Taken::Again(flow(1, 600))).count(), 7);
    assert_eq!(store.take_flow([2; 32], at(1)).await.unwrap(), Taken::No);
    assert_eq!(store.take_flow([1; 32], at(600)).await.unwrap(), Taken::Expired);
    // The next one sweeps it out.
    store.put_flow(flow(3, 1200), alices(), MOST, at(600)).await.unwrap();
    assert_eq!(store.take_flow([1; 32], at(600)).await.unwrap(), Taken::No);
}

async fn of_many_processes_that_take_a_flow_one_gets_it(ground: &Ground) {
    // OAU-001
    for name in 0..4 {
        ground.store().await.put_flow(flow(name, 600), alices(), MOST, at(0)).await.unwrap();
        let mut racing = Vec::new();
        for _ in 0..6 {
            let store = ground.store().await;
            racing.push(tokio::spawn(async move { store.take_flow([name; 32], at(1)).await }));
        }
        let mut got = 0;
        for taken in racing {
            got += usize::from(matches!(taken.await.unwrap().unwrap(), Taken::Flow(_)));
        }
        assert_eq!(got, 1);
    }
}

async fn so_many_flows_are_kept_and_no_more(ground: &Ground) {
    // OAU-019
    let store = ground.store().await;
    for name in 0..20 {
        let whose = (github(), user(&format!("user-{name}")));
        store.put_flow(flow(name, 600 + u64::from(name)), whose, MOST, at(0)).await.unwrap();
    }
    let kept = async |name| store.take_flow([name; 32], at(1)).await.unwrap() != Taken::No;
    assert!(!kept(9).await && kept(10).await && kept(19).await);
    // One user's make no room but their own.
    for name in 20..40 {
        store.put_flow(flow(name, 600 + u64::from(name)), alices(), MOST, at(0)).await.unwrap();
    }
    assert!(!kept(12).await && kept(13).await && kept(19).await);
    assert!(!kept(36).await && kept(37).await && kept(39).await);
    let elsewhere = ("slack".parse().unwrap(), user("alice"));
    store.put_flow(flow(40, 700), elsewhere, MOST, at(0)).await.unwrap();
    assert!(!kept(13).await && kept(14).await && kept(37).await && kept(40).await);
}

async fn an_intent_stays_until_the_row_is_written_or_marked(ground: &Ground) {
    // C12
    let store = ground.store().await;
    let clean = Row { intent: None, ..row("alice", 1) };
    let intent = Intent { refresh_token_hash: [3; 32], at: at(2000) };
    let stored = async || store.grant(&github(), &user("alice")).await.unwrap().unwrap();
    let lease = store.lease(&github(), &user("alice")).await.unwrap().unwrap();
    store.put(clean.clone(), None).await.unwrap();
    store.intend(&lease, 1, intent.clone()).await.unwrap();
    assert_eq!(stored().await, Row { intent: Some(intent.clone()), ..clean.clone() });
    let state = State::reauthorize("lost_rotation");
    store.mark(&lease, 1, intent.clone(), state.clone()).await.unwrap();
    assert_eq!(stored().await, Row { state, ..clean.clone() });
    store.intend(&lease, 1, intent.clone()).await.unwrap();
    store.put(Row { generation: 2, ..clean.clone() }, Some(1)).await.unwrap();
    assert_eq!(stored().await, Row { generation: 2, ..clean.clone() });

    let late = store.intend(&lease, 1, intent.clone()).await.unwrap_err();
    let told = late.to_string();
    let moved = "the grant of user `alice` at `github` was changed in between";
    // Where a lease is a row, it ends with what it was for.
    assert!(told == moved || late.code() == "store_lease_lost", "{told}");
    let late = store.mark(&lease, 1, intent, State::Connected).await.unwrap_err();
    assert_eq!(late.code(), "store_moved");
    assert_eq!(stored().await, Row { generation: 2, ..clean });
}

async fn another_s_write_is_told_and_one_s_own_is_not(ground: &Ground) {
    let (one, other) = (ground.store().await, ground.store().await);
    let mut changes = one.watch().await;
    settled(&mut changes).await;
    one.put(row("bob", 1), None).await.unwrap();
    let quiet = tokio::time::timeout(Duration::from_millis(1100), changes.next()).await;
    assert!(quiet.is_err(), "{quiet:?}");
    other.put(row("alice", 1), None).await.unwrap();
    let told = changes.next().await;
    assert!(told == Change::Anything || told == Change::Of(github(), user("alice")), "{told:?}");
}

async fn of_many_writers_of_one_generation_one_wins(ground: &Ground) {
    // TOK-029, TOK-030
    ground.store().await.put(row("alice", 1), None).await.unwrap();
    for generation in 1..5 {
        let mut writers = Vec::new();
        for _ in 0..4 {
            let store = ground.store().await;
            writers.push(tokio::spawn(async move { store.put(row("alice", generation + 1), Some(generation)).await }));
        }
        let mut done = 0;
        for writer in writers {
            done += usize::from(writer.await.unwrap().unwrap() == Put::Done);
        }
        assert_eq!(done, 1);
    }
}

async fn a_lease_is_held_by_one_until_it_is_dropped(ground: &Ground) {
    // C12, C19
    let (one, other) = (ground.store().await, ground.store().await);
    let lease = one.lease(&github(), &user("alice")).await.unwrap().unwrap();
    assert!(other.lease(&github(), &user("alice")).await.unwrap().is_none());
    assert!(one.lease(&github(), &user("alice")).await.unwrap().is_none());
    assert!(other.lease(&github(), &user("bob")).await.unwrap().is_some());
    drop(lease);
    given_back(&other).await;
}

async fn no_generation_comes_back_whoever_removes_and_replaces_at_once(ground: &Ground) {
    // TOK-038
    let mut working = Vec::new();
    for _ in 0..4 {
        let store = ground.store().await;
        working.push(tokio::spawn(async move {
            let mut given = Vec::new();
            for _ in 0..20 {
                given.push(store.replace(row("alice", 1)).await.unwrap());
                store.remove(&github(), &user("alice")).await.unwrap();
            }
            given
        }));
    }
    let mut given = Vec::new();
    for one in working {
        given.extend(one.await.unwrap());
    }
    assert_eq!(given.iter().collect::<HashSet<_>>().len(), given.len(), "{given:?}");
}

async fn a_long_name_is_told_of_too(ground: &Ground) {
    // TOK-042
    let (one, other) = (ground.store().await, ground.store().await);
    let long = "\"\\".repeat(512);
    let mut changes = one.watch().await;
    settled(&mut changes).await;
    other.put(row(&long, 1), None).await.unwrap();
    tokio::time::timeout(Duration::from_secs(5), changes.next()).await.expect("it is told");
    assert_eq!(one.grant(&github(), &user(&long)).await.unwrap(), Some(row(&long, 1)));
}

async fn sidecars_that_start_at_once_share_what_the_first_has_made(ground: &Ground) {
    // TOK-029
    let starting = (0..8).map(async |number| {
        let store = ground.store().await;
        store.put_sealed("ca", Secret::new(format!("CA {number}")), None).await.unwrap()
    });
    let kept = futures_util::future::join_all(starting).await;
    assert!(kept.iter().all(|ca| *ca == kept[0]));
}

/// A store with something of every kind in it, all sealed with key 1.
async fn filled(ground: &Ground) -> Store {
    let store = ground.store().await;
    let client = Row { subject: Subject::Client, refresh_token: None, intent: None, ..row("client", 7) };
    for row in [row("alice", 1), client] {
        store.put(row, None).await.unwrap();
    }
    store.replace(row("gone", 1)).await.unwrap();
    store.remove(&github(), &user("gone")).await.unwrap();
    store.put_sealed("ca", Secret::new("the CA"), None).await.unwrap();
    store.put_flow(flow(1, 600), alices(), MOST, at(0)).await.unwrap();
    store
}

/// How many values each key has sealed.
async fn counts(store: &Store) -> Vec<usize> {
    let verified = store.verify().await.unwrap();
    assert_eq!((verified.faults, verified.at_hand), (vec![], store.sealer.keys.ids().len()));
    assert_eq!(verified.keys.iter().map(|(_, count)| count).sum::<usize>(), verified.values);
    verified.keys.into_iter().map(|(_, count)| count).collect()
}

async fn what_is_sealed_anew_opens_with_the_new_key_alone(ground: &Ground) {
    // TOK-025
    let before: Vec<Row> =
        filled(ground).await.grants().await.unwrap().into_iter().map(|(.., row)| row.unwrap()).collect();
    let both = ground.store_with(&[2, 1]).await;
    // Three tokens, a consent, the CA and the key check.
    assert_eq!(counts(&both).await, [0, 6]);
    let mut told = Vec::new();
    let rekeyed = both.rekey(|done, all| told.push((done, all))).await.unwrap();
    assert_eq!((rekeyed.resealed, rekeyed.behind, rekeyed.faults), (6, 0, vec![]));
    assert_eq!(told, [(6, 6)]);
    assert_eq!(counts(&both).await, [6, 0]);
    assert_eq!(both.rekey(|_, _| panic!("there is nothing to do")).await.unwrap().resealed, 0);

    assert_eq!(ground.open(&[1]).await.err().unwrap().code(), "store_wrong_key");
    let new = ground.store_with(&[2]).await;
    let after: Vec<Row> = new.grants().await.unwrap().into_iter().map(|(.., row)| row.unwrap()).collect();
    assert_eq!(after, before, "generations, intents and all");
    assert_eq!(new.sealed("ca").await.unwrap(), Some(Secret::new("the CA")));
    assert_eq!(new.take_flow([1; 32], at(1)).await.unwrap(), Taken::Flow(flow(1, 600)));
    assert_eq!(new.replace(row("gone", 1)).await.unwrap(), 2);
}

async fn sealing_anew_overwrites_nothing_that_was_written_meanwhile(ground: &Ground) {
    // TOK-031
    filled(ground).await;
    let both = ground.store_with(&[2, 1]).await;
    let snapshot = both.engine.snapshot().await.unwrap();
    let old = snapshot.values();
    let anew: Vec<Resealed> = old.iter().map(|(slot, sealed)| both.sealer.anew(slot, sealed).unwrap()).collect();
    both.put(row("alice", 2), Some(1)).await.unwrap();
    both.remove(&github(), &Subject::Client).await.unwrap();
    let ca = both.put_sealed("ca", Secret::new("another CA"), Some(&Secret::new("the CA"))).await.unwrap();
    assert_eq!(ca, Secret::new("another CA"));
    assert_eq!(both.engine.reseal(&anew).await.unwrap(), 2, "the consent and the key check");
    assert_eq!(both.grant(&github(), &user("alice")).await.unwrap(), Some(row("alice", 2)));
    assert_eq!(both.grant(&github(), &Subject::Client).await.unwrap(), None);
    assert_eq!(both.sealed("ca").await.unwrap(), Some(ca));
    assert_eq!(both.engine.reseal(&anew).await.unwrap(), 0);
}

async fn a_sidecar_that_renews_all_the_time_does_not_notice_a_rekey(ground: &Ground) {
    // TOK-029, C12
    filled(ground).await;
    let (sidecar, both) = (ground.store_with(&[2, 1]).await, ground.store_with(&[2, 1]).await);
    let rekeyed = Arc::new(std::sync::atomic::AtomicBool::new(false));
    let done = rekeyed.clone();
    let renewing = tokio::spawn(async move {
        let mut generation = 1;
        while !done.load(std::sync::atomic::Ordering::Relaxed) || generation < 20 {
            let lease = sidecar.lease(&github(), &user("alice")).await.unwrap().unwrap();
            let intent = Intent { refresh_token_hash: [3; 32], at: at(2000) };
            sidecar.intend(&lease, generation, intent).await.unwrap();
            let next = Row { intent: None, ..row("alice", generation + 1) };
            assert_eq!(sidecar.put(next, Some(generation)).await.unwrap(), Put::Done);
            generation += 1;
        }
        generation
    });
    for _ in 0..10 {
        // Back and forth, so that there is always something to do.
        for seeds in [[1, 2], [2, 1]] {
            let rekeyed = ground.store_with(&seeds).await.rekey(|_, _| {}).await.unwrap();
            assert_eq!(rekeyed.faults, vec![]);
        }
    }
    rekeyed.store(true, std::sync::atomic::Ordering::Relaxed);
    let generation = renewing.await.unwrap();
    let stored = both.grant(&github(), &user("alice")).await.unwrap();
    assert_eq!(stored, Some(Row { intent: None, ..row("alice", generation) }));
    assert_eq!(both.rekey(|_, _| {}).await.unwrap().behind, 0);
    assert_eq!(counts(&both).await[1], 0);
}

async fn of_many_rekeys_at_once_each_value_is_done_by_one(ground: &Ground) {
    let old = filled(ground).await;
    for number in 0..200 {
        old.put(row(&format!("user {number}"), 1), None).await.unwrap();
    }
    let mut working = Vec::new();
    for _ in 0..3 {
        let both = ground.store_with(&[2, 1]).await;
        working.push(tokio::spawn(async move { both.rekey(|_, _| {}).await.unwrap() }));
    }
    let mut resealed = 0;
    for one in working {
        resealed += one.await.unwrap().resealed;
    }
    assert_eq!(resealed, 406);
    assert_eq!(counts(&ground.store_with(&[2]).await).await, [406]);
}

async fn whoever_goes_on_sealing_with_the_old_key_is_told_of(ground: &Ground) {
    let old = filled(ground).await;
    let both = ground.store_with(&[2, 1]).await;
    let (running, mut generation) = (tokio::runtime::Handle::current(), 1);
    // Between the steps, a sidecar that has not got the new key yet writes.
    let rekeyed = both.rekey(|_, _| {
        tokio::task::block_in_place(|| running.block_on(old.put(row("alice", generation + 1), Some(generation))))
            .unwrap();
        generation += 1;
    });
    let rekeyed = rekeyed.await.unwrap();
    assert_eq!((rekeyed.behind, rekeyed.faults), (2, vec![]));
    assert_eq!(both.grant(&github(), &user("alice")).await.unwrap(), Some(row("alice", generation)));
}

fn embedded() -> Ground {
    Ground::Embedded(tempfile::tempdir().unwrap())
}

async fn exported(store: &Store) -> Archive {
    let mut file = Vec::new();
    store.export(&mut file).await.unwrap();
    Archive::read(&file[..]).unwrap()
}

async fn rows(store: &Store) -> Vec<Row> {
    store.grants().await.unwrap().into_iter().map(|(.., row)| row.unwrap()).collect()
}

async fn a_store_moves_to_another_engine_and_back(ground: &Ground) {
    let (first, last) = (embedded(), embedded());
    let before = filled(&first).await;
    let here = ground.store_with(&[2, 1]).await;
    let imported = here.import(&exported(&before).await, false).await.unwrap();
    assert_eq!(imported, Imported { grants: 2, removed: 1, secrets: 1, same: 0 });
    assert_eq!(rows(&here).await, rows(&before).await, "generations, intents and all");
    let counted = counts(&here).await;
    assert!(
        counted[1] >= 4 && counted.iter().sum::<usize>() == 5,
        "all but the key check is as it was sealed: {counted:?}"
    );

    here.put(row("alice", 2), Some(1)).await.unwrap();
    here.rekey(|_, _| {}).await.unwrap();
    let after = last.store_with(&[2]).await;
    let imported = after.import(&exported(&here).await, false).await.unwrap();
    assert_eq!(imported, Imported { grants: 2, removed: 1, secrets: 1, same: 0 });
    assert_eq!(rows(&after).await, rows(&here).await);
    assert_eq!(after.sealed("ca").await.unwrap(), Some(Secret::new("the CA")));
    assert_eq!(after.replace(row("gone", 1)).await.unwrap(), 2, "what a renewal of the removed grant brings is late");
}

async fn an_import_that_is_repeated_changes_nothing(ground: &Ground) {
    let archive = exported(&filled(&embedded()).await).await;
    let here = ground.store_with(&[2, 1]).await;
    here.import(&archive, false).await.unwrap();
    let before = here.engine.snapshot().await.unwrap();
    for replace in [false, true] {
        assert_eq!(here.import(&archive, replace).await.unwrap(), Imported { same: 4, ..Imported::default() });
    }
    let after = here.engine.snapshot().await.unwrap();
    assert!(before.values() == after.values() && before.removed == after.removed);
    here.rekey(|_, _| {}).await.unwrap();
    let sealed_anew = here.import(&archive, false).await.unwrap();
    assert_eq!(sealed_anew, Imported { same: 4, ..Imported::default() });
    assert_eq!(counts(&here).await, [5, 0]);
}

async fn what_is_in_the_way_of_an_import_is_named_and_nothing_is_written(ground: &Ground) {
    let archive = exported(&filled(&embedded()).await).await;
    let here = ground.store().await;
    here.put(row("alice", 9), None).await.unwrap();
    here.put_sealed("ca", Secret::new("another CA"), None).await.unwrap();
    here.put(Row { subject: Subject::Client, ..row("x", 8) }, None).await.unwrap();
    here.remove(&github(), &Subject::Client).await.unwrap();
    let before = here.engine.snapshot().await.unwrap();
    let error = here.import(&archive, false).await.unwrap_err();
    assert_eq!(
        error.to_string(),
        "the grant of the client itself at `github` was disconnected here since\n\
         the grant of user `alice` at `github` is there already, and is another one\n\
         the secret `ca` is there already, and is another one"
    );
    assert_eq!(
        (error.code(), &*error.hint()),
        ("archive_in_the_way", "with `--replace`, what is in the file takes its place")
    );
    let after = here.engine.snapshot().await.unwrap();
    assert!(before.values() == after.values() && before.removed == after.removed);
}

async fn an_import_that_replaces_gives_a_generation_that_nobody_has_had(ground: &Ground) {
    // TOK-038
    let archive = exported(&filled(&embedded()).await).await;
    let here = ground.store().await;
    here.put(row("alice", 9), None).await.unwrap();
    here.put(Row { subject: Subject::Client, ..row("x", 8) }, None).await.unwrap();
    here.remove(&github(), &Subject::Client).await.unwrap();
    here.put_sealed("ca", Secret::new("another CA"), None).await.unwrap();
    let imported = here.import(&archive, true).await.unwrap();
    assert_eq!(imported, Imported { grants: 2, removed: 1, secrets: 1, same: 0 });
    assert_eq!(here.sealed("ca").await.unwrap(), Some(Secret::new("the CA")));
    let generation = async |subject: Subject| here.grant(&github(), &subject).await.unwrap().unwrap().generation;
    assert_eq!((generation(user("alice")).await, generation(Subject::Client).await), (10, 9));
    // Renewals of what was there come too late.
    let late = here.put(row("alice", 10), Some(9)).await.unwrap();
    assert_eq!(late, Put::Stale(Box::new(Row { generation: 10, ..row("alice", 1) })));
    assert_eq!(here.import(&archive, false).await.unwrap().same, 4, "it is still the same");
}

async fn a_plan_is_carried_out_whole_or_not_at_all(ground: &Ground) {
    let here = filled(ground).await;
    let before = here.engine.snapshot().await.unwrap();
    let record = |name: &str, generation| here.sealer.record(&row(name, generation)).unwrap();
    let names = Names { provider: github(), subject: user("bob") };
    let plan = || Plan {
        grants: vec![(record("bob", 1), None), (record("alice", 2), Some(1))],
        removed: vec![(names.clone(), 4)],
        own: vec![("new".into(), vec![1], None)],
    };
    let mut stale = [plan(), plan(), plan(), plan()];
    stale[0].grants[1].1 = None;
    stale[1].grants[1].1 = Some(7);
    stale[2].own.push(("ca".into(), vec![1], None));
    stale[3].own.push(("ca".into(), vec![1], Some(vec![2])));
    for stale in stale {
        assert!(!here.engine.carry_out(&stale).await.unwrap(), "{stale:?}");
        let after = here.engine.snapshot().await.unwrap();
        assert!(before.values() == after.values() && before.removed == after.removed, "{stale:?}");
    }
    assert!(here.engine.carry_out(&plan()).await.unwrap());
    assert_eq!(here.engine.snapshot().await.unwrap().removed[0], (names.clone(), 4));
    let lower = Plan { removed: vec![(names.clone(), 3)], ..Plan::default() };
    assert!(here.engine.carry_out(&lower).await.unwrap());
    assert_eq!(here.engine.snapshot().await.unwrap().removed[0], (names, 4), "the higher one is remembered");
}

/// Tests of what only a lease with an end can show.
mod ending {
    use super::*;

    async fn two() -> (Store, Store, tokio_postgres::Client) {
        let Ground::Shared(server) = Ground::shared().await else { unreachable!() };
        let ground = Ground::Shared(server.clone());
        let (client, connection) = server.each()[0].connect(tokio_postgres::NoTls).await.unwrap();
        tokio::spawn(connection);
        let stores = (ground.store().await, ground.store().await);
        stores.0.put(Row { intent: None, ..row("alice", 1) }, None).await.unwrap();
        (stores.0, stores.1, client)
    }

    async fn lease(store: &Store) -> Option<Lease> {
        store.lease(&github(), &user("alice")).await.unwrap()
    }

    /// The holder stands still for longer than its lease.
    async fn time_passes(client: &tokio_postgres::Client) {
        client.batch_execute("UPDATE sidebearer.leases SET expires_at = clock_timestamp()").await.unwrap();
    }

    fn intent() -> Intent {
        Intent { refresh_token_hash: [3; 32], at: at(2000) }
    }

    #[tokio::test]
    #[ignore = "needs a PostgreSQL server: tests/run has one"]
    async fn who_let_its_lease_end_sends_nothing_and_gives_no_other_one_s_back() {
        // TOK-031, C19
        let (one, other, client) = two().await;
        let late = lease(&one).await.unwrap();
        assert!(!late.is_inherited());
        assert!(lease(&other).await.is_none());
        time_passes(&client).await;
        let inherited = lease(&other).await.unwrap();
        assert!(inherited.is_inherited(), "its holder may be alive");
        assert_eq!(one.intend(&late, 1, intent()).await.unwrap_err().code(), "store_lease_lost");
        assert!(!one.prolong(&late).await.unwrap());
        drop(late);
        other.intend(&inherited, 1, intent()).await.unwrap();
        assert!(lease(&one).await.is_none(), "the late one gave back what it no longer had");
        assert_eq!(one.grant(&github(), &user("alice")).await.unwrap().unwrap().intent, Some(intent()));
    }

    #[tokio::test]
    #[ignore = "needs a PostgreSQL server: tests/run has one"]
    async fn a_lease_that_is_given_back_is_inherited_from_nobody_and_a_written_row_ends_it() {
        // C12, C19
        let (one, other, client) = two().await;
        time_passes(&client).await;
        drop(lease(&one).await.unwrap());
        let given = given_back(&other).await;
        assert!(!given.is_inherited());
        other.intend(&given, 1, intent()).await.unwrap();
        other.put(row("alice", 2), Some(1)).await.unwrap();
        assert!(!lease(&one).await.unwrap().is_inherited(), "it ended with the row, though its holder is still there");
    }

    #[tokio::test]
    #[ignore = "needs a PostgreSQL server: tests/run has one"]
    async fn an_inherited_lease_that_was_given_back_unused_is_inherited_again() {
        // TOK-031, C14
        let (one, other, client) = two().await;
        let owner = lease(&one).await.unwrap();
        one.intend(&owner, 1, intent()).await.unwrap();
        time_passes(&client).await;
        drop(lease(&other).await.unwrap());
        let next = given_back(&one).await;
        assert!(next.is_inherited(), "the late one may still be about to store an answer");
        let ours = Intent { at: at(3000), ..intent() };
        one.intend(&next, 1, ours.clone()).await.unwrap();
        let late = one.mark(&owner, 1, intent(), State::Connected).await;
        assert_eq!(late.unwrap_err().code(), "store_moved", "who wakes up late judges no attempt but its own");
        assert_eq!(one.grant(&github(), &user("alice")).await.unwrap().unwrap().intent, Some(ours));
        drop(next);
        assert!(!given_back(&other).await.is_inherited(), "what is left open is its own");
    }

    #[tokio::test]
    #[ignore = "needs a PostgreSQL server: tests/run has one"]
    async fn an_intent_prolongs_the_lease_until_an_answer_must_be_there() {
        // C19
        let (one, _, client) = two().await;
        let held = lease(&one).await.unwrap();
        let left = async || -> f64 {
            let sql = "SELECT extract(epoch FROM expires_at - clock_timestamp())::float8 FROM sidebearer.leases";
            client.query_one(sql, &[]).await.unwrap().get(0)
        };
        assert!((0.0..5.1).contains(&left().await));
        one.intend(&held, 1, intent()).await.unwrap();
        assert!((30.0..35.1).contains(&left().await));
    }
}

/// The lease of alice's grant, once its holder has given it back.
pub(super) async fn given_back(store: &Store) -> Lease {
    loop {
        match store.lease(&github(), &user("alice")).await.unwrap() {
            Some(lease) => return lease,
            None => tokio::time::sleep(Duration::from_millis(5)).await,
        }
    }
}

/// Until a watcher has begun to hear: before that, it looks.
async fn settled(changes: &mut Watch) {
    while tokio::time::timeout(Duration::from_millis(1100), changes.next()).await.is_ok() {}
}
