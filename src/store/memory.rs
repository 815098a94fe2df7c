//! The shared engine of tests: a server in memory, with handles for many processes and leases that end by its clock.
//!
//! It keeps the promises of the engine's page as the PostgreSQL engine does, times of leases included.

mod process;

use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use async_trait::async_trait;
use base64::Engine as _;
use base64::prelude::BASE64_STANDARD;
use tokio::runtime::Handle;
use tokio::sync::broadcast::{self, Receiver, Sender};
use tokio::time::Instant;

use super::engine::{
    Change, Changes, Count, Engine, FlowRecord, Gone, Held, Intended, IntentRecord, Names, Owner, Plan, Record,
    Resealed, Result, Slot, Snapshot, StateRecord, TakenRecord,
};
use super::key::Keyring;
use super::record::{KEY_CHECK, Sealer};
use super::{CHECKED, Most, Store, StoreError};
use crate::names::{ProviderName, Subject};
use crate::secret::Secret;

pub(crate) use process::{Broken, Fate, Process};

/// How long a lease lasts before there is an intent.
const LEASE_TO_INTEND: Duration = Duration::from_secs(5);
/// How long it lasts from the intent on.
const LEASE_TO_REDEEM: Duration = Duration::from_secs(35);
/// How long it lasts at least from when its holder shows that it goes on.
const LEASE_TO_SAVE: Duration = Duration::from_secs(20);
/// How long an answer is waited for.
const DEADLINE: Duration = Duration::from_secs(5);
const LOOK_FOR_SERVER: Duration = Duration::from_millis(500);
const AT: &str = "memory";
/// The handle of the test itself.
const OBSERVER: u64 = 0;

/// The server. A clone is the same one.
#[derive(Clone)]
pub(crate) struct Server {
    tables: Arc<Mutex<Tables>>,
    news: Sender<(u64, Change)>,
}

#[derive(Default)]
struct Tables {
    away: bool,
    handles: u64,
    key_check: Vec<u8>,
    sealed: BTreeMap<String, Vec<u8>>,
    grants: BTreeMap<Names, Record>,
    /// The last generation of what is no longer there.
    removed: BTreeMap<Names, u64>,
    leases: HashMap<Names, LeaseRow>,
    flows: BTreeMap<[u8; 32], (FlowRecord, i64)>,
    /// When each grant was last given another generation, or removed.
    moved: HashMap<Names, Instant>,
}

struct LeaseRow {
    owner: Owner,
    ends: Instant,
    /// Taken from one who let its time pass; until there is an intent of this one's own.
    inherited: bool,
}

impl Server {
    /// One with a store in it that has no rows.
    pub fn new() -> Self {
        let key_check = sealer().seal(KEY_CHECK, &Secret::new(CHECKED)).unwrap();
        let tables = Tables { key_check, ..Tables::default() };
        Self { tables: Arc::new(Mutex::new(tables)), news: broadcast::channel(64).0 }
    }

    /// Opens the store for a process.
    pub async fn open(&self, process: &Process) -> Store {
        self.open_with(sealer().keys, process).await.unwrap()
    }

    /// Opens the store for the test itself, which is never kept from it.
    pub async fn observe(&self) -> Store {
        let engine = Memory { server: self.clone(), process: Process::default(), me: OBSERVER };
        Store::over(Arc::new(engine), sealer().keys).await.unwrap()
    }

    /// Opens the store with keys of one's own.
    pub async fn open_with(&self, keys: Keyring, process: &Process) -> Result<Store> {
        let me = {
            let mut tables = self.lock();
            tables.handles += 1;
            tables.handles
        };
        let engine = Memory { server: self.clone(), process: process.clone(), me };
        Store::over(Arc::new(engine), keys).await
    }

    /// Whether it answers nobody from now on.
    pub fn away(&self, away: bool) {
        self.lock().away = away;
    }

    /// When a grant was last given another generation, or removed.
    pub fn moved(&self, provider: &ProviderName, subject: &Subject) -> Option<Instant> {
        self.lock().moved.get(&super::names(provider, subject)).copied()
    }

    fn lock(&self) -> MutexGuard<'_, Tables> {
        self.tables.lock().unwrap()
    }
}

fn sealer() -> Sealer {
    let keys = Keyring::from_secrets(&[Secret::new(BASE64_STANDARD.encode([1; 32]))]).unwrap();
    Sealer { keys, at: AT.into() }
}

/// A process's handle.
#[derive(Clone)]
struct Memory {
    server: Server,
    process: Process,
    me: u64,
}

impl Memory {
    /// A request and its answer. The request may be carried out when nobody waits for the answer any more.
    async fn call<T: Send + 'static>(&self, work: impl FnOnce(&mut Tables) -> T + Send + 'static) -> Result<T> {
        let (handle, asked) = (self.clone(), Instant::now());
        let answer = tokio::spawn(async move {
            handle.process.step().await.map_err(|Broken| away("nothing was sent"))?;
            // What stood still itself is sent when it goes on; what was held up on its way is taken for lost.
            if asked.elapsed() >= DEADLINE && !handle.process.stood_still_after(asked) {
                return Err(away("nothing arrived in time"));
            }
            if handle.is_away() {
                return Err(away("nobody is there"));
            }
            let done = work(&mut handle.server.lock());
            handle.process.step().await.map_err(|Broken| away("its answer was lost"))?;
            Ok(done)
        });
        self.process.waits(answer, DEADLINE).await.unwrap_or_else(|| Err(away("it takes too long")))
    }

    fn is_away(&self) -> bool {
        self.process.is_cut_off() || self.me != OBSERVER && self.server.lock().away
    }

    /// Tells the others, as part of what changes the tables.
    fn tells(&self, names: &Names) -> impl FnOnce() + Send + use<> {
        let (news, change) = (self.server.news.clone(), Change::Of(names.provider.clone(), names.subject.clone()));
        let me = self.me;
        // The only error is that nobody listens.
        move || drop(news.send((me, change)))
    }
}

fn away(why: &str) -> StoreError {
    StoreError::Away { at: AT.into(), why: why.into() }
}

#[async_trait]
impl Engine for Memory {
    fn at(&self) -> &str {
        AT
    }

    async fn key_check(&self) -> Result<Option<Vec<u8>>> {
        self.call(|tables| Some(tables.key_check.clone())).await
    }

    async fn grant(&self, names: &Names) -> Result<Option<Record>> {
        let names = names.clone();
        self.call(move |tables| tables.grants.get(&names).cloned()).await
    }

    async fn grants(&self) -> Result<Vec<(Names, Result<Record>)>> {
        self.call(|tables| tables.grants.iter().map(|(names, record)| (names.clone(), Ok(record.clone()))).collect())
            .await
    }

    async fn census(&self) -> Result<Vec<Count>> {
        self.call(|tables| {
            let mut counted = BTreeMap::new();
            for (names, record) in &tables.grants {
                let of = (names.provider.to_string(), record.target.clone(), record.state.clone());
                *counted.entry(of).or_insert(0) += 1;
            }
            let count = |((provider, target, state), grants)| Count { provider, target, state, grants };
            counted.into_iter().map(count).collect()
        })
        .await
    }

    async fn generations(&self, of: &[Names]) -> Result<HashMap<Names, u64>> {
        let of = of.to_vec();
        self.call(move |tables| {
            let found = of.into_iter().filter_map(|names| Some((tables.grants.get(&names)?.generation, names)));
            found.map(|(generation, names)| (names, generation)).collect()
        })
        .await
    }

    async fn put(&self, record: &Record, previous: Option<u64>) -> Result<bool> {
        let (record, tell) = (record.clone(), self.tells(&record.names));
        self.call(move |tables| {
            let free = tables.generation(&record.names) == previous;
            if free {
                // Whoever writes a row ends the lease on it; a first one had none.
                previous.map(|_| tables.leases.remove(&record.names));
                tables.write(record);
                tell();
            }
            free
        })
        .await
    }

    async fn replace(&self, record: &Record) -> Result<u64> {
        let (mut record, tell) = (record.clone(), self.tells(&record.names));
        self.call(move |tables| {
            let removed = tables.removed.remove(&record.names);
            record.generation = tables.generation(&record.names).max(removed).map_or(1, |last| last + 1);
            let generation = record.generation;
            tables.leases.remove(&record.names);
            tables.write(record);
            tell();
            generation
        })
        .await
    }

    async fn remove(&self, names: &Names) -> Result<Option<Gone>> {
        let (names, tell) = (names.clone(), self.tells(names));
        self.call(move |tables| {
            let gone = tables.grants.remove(&names)?;
            tables.leases.remove(&names);
            tables.moved.insert(names.clone(), Instant::now());
            tables.removed.insert(names, gone.generation);
            tell();
            Some(Gone { target: gone.target, refresh_token: gone.refresh_token, access_token: gone.access_token })
        })
        .await
    }

    async fn intend(&self, names: &Names, generation: u64, intent: &IntentRecord, owner: Owner) -> Result<Intended> {
        let (names, intent) = (names.clone(), intent.clone());
        self.call(move |tables| {
            let Some(lease) = tables.held(&names, owner) else { return Intended::LeaseLost };
            (lease.ends, lease.inherited) = (Instant::now() + LEASE_TO_REDEEM, false);
            match tables.at(&names, generation) {
                Some(record) => {
                    record.intent = Some(intent);
                    Intended::Done
                }
                None => Intended::Moved,
            }
        })
        .await
    }

    async fn mark(&self, names: &Names, generation: u64, intent: &IntentRecord, state: &StateRecord) -> Result<bool> {
        let (names, intent, state) = (names.clone(), intent.clone(), state.clone());
        self.call(move |tables| {
            let ours = tables.at(&names, generation).filter(|record| record.intent.as_ref() == Some(&intent));
            let Some(record) = ours else { return false };
            (record.state, record.intent) = (state, None);
            true
        })
        .await
    }

    async fn mark_all(&self, provider: &ProviderName, from: &str, to: &StateRecord) -> Result<()> {
        let (provider, from, to) = (provider.clone(), from.to_owned(), to.clone());
        self.call(move |tables| {
            let of_provider = tables.grants.values_mut().filter(|record| record.names.provider == provider);
            of_provider.filter(|record| record.state.state == from).for_each(|record| record.state = to.clone());
        })
        .await
    }

    async fn lease(&self, names: &Names, owner: Owner) -> Result<Option<Held>> {
        let (of, now) = (names.clone(), Instant::now);
        let taken = self.call(move |tables| {
            let there = tables.leases.get(&of);
            if there.is_some_and(|lease| lease.ends > now()) {
                return None;
            }
            let inherited = there.is_some();
            tables.leases.insert(of, LeaseRow { owner, ends: now() + LEASE_TO_INTEND, inherited });
            Some(inherited)
        });
        let guard = |inherited| {
            let guard = Guard { engine: self.clone(), names: names.clone(), owner, runtime: Handle::current() };
            Held { inherited, _guard: Box::new(guard) }
        };
        Ok(taken.await?.map(guard))
    }

    async fn prolong(&self, names: &Names, owner: Owner) -> Result<bool> {
        let names = names.clone();
        self.call(move |tables| {
            let lease = tables.held(&names, owner);
            lease.map(|lease| lease.ends = lease.ends.max(Instant::now() + LEASE_TO_SAVE)).is_some()
        })
        .await
    }

    async fn put_flow(&self, flow: &FlowRecord, most: Most, now: i64) -> Result<()> {
        let flow = flow.clone();
        self.call(move |tables| {
            tables.flows.retain(|_, (flow, _)| flow.expires_at > now);
            tables.make_room(most.of_one, |other| other.names == flow.names);
            tables.make_room(most.flows, |_| true);
            tables.flows.insert(flow.id, (flow, 0));
        })
        .await
    }

    async fn take_flow(&self, id: [u8; 32]) -> Result<Option<TakenRecord>> {
        self.call(move |tables| {
            let (flow, times) = tables.flows.get_mut(&id)?;
            *times += 1;
            Some(TakenRecord { content: flow.content.clone(), expires_at: flow.expires_at, times: *times })
        })
        .await
    }

    async fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        let name = name.to_owned();
        self.call(move |tables| tables.sealed.get(&name).cloned()).await
    }

    async fn put_sealed(&self, name: &str, value: &[u8], previous: Option<&[u8]>) -> Result<bool> {
        let (name, value, previous) = (name.to_owned(), value.to_owned(), previous.map(<[u8]>::to_owned));
        self.call(move |tables| {
            let free = tables.sealed.get(&name) == previous.as_ref();
            if free {
                tables.sealed.insert(name, value);
            }
            free
        })
        .await
    }

    async fn changes(&self) -> Box<dyn Changes> {
        Box::new(News { engine: self.clone(), told: self.server.news.subscribe() })
    }

    async fn snapshot(&self) -> Result<Snapshot> {
        self.call(|tables| Snapshot {
            key_check: Some(tables.key_check.clone()),
            grants: tables.grants.iter().map(|(names, record)| (names.clone(), Ok(record.clone()))).collect(),
            removed: tables.removed.iter().map(|(names, last)| (names.clone(), *last)).collect(),
            own: tables.sealed.iter().map(|(name, value)| (name.clone(), value.clone())).collect(),
            flows: tables.flows.iter().map(|(id, (flow, _))| (id.to_vec(), flow.content.clone())).collect(),
        })
        .await
    }

    async fn reseal(&self, batch: &[Resealed]) -> Result<usize> {
        let batch = batch.to_vec();
        self.call(move |tables| {
            let mut replaced = 0;
            for Resealed { slot, from, to } in batch {
                if let Some(there) = tables.sealed_at(&slot).filter(|there| **there == from) {
                    *there = to;
                    replaced += 1;
                }
            }
            replaced
        })
        .await
    }

    async fn carry_out(&self, plan: &Plan) -> Result<bool> {
        let plan = plan.clone();
        let tell: Vec<_> = plan.grants.iter().map(|(record, _)| self.tells(&record.names)).collect();
        self.call(move |tables| {
            let unchanged = |(record, previous): &(Record, _)| tables.generation(&record.names) == *previous;
            let untouched = |(name, _, previous): &(_, _, _)| tables.sealed.get(name) == Option::as_ref(previous);
            if !plan.grants.iter().all(unchanged) || !plan.own.iter().all(untouched) {
                return false;
            }
            for (record, previous) in plan.grants {
                previous.map(|_| tables.leases.remove(&record.names));
                tables.write(record);
            }
            tables.sealed.extend(plan.own.into_iter().map(|(name, value, _)| (name, value)));
            for (names, last) in plan.removed {
                let known = tables.removed.entry(names).or_default();
                *known = last.max(*known);
            }
            tell.into_iter().for_each(|tell| tell());
            true
        })
        .await
    }
}

impl Tables {
    fn generation(&self, names: &Names) -> Option<u64> {
        self.grants.get(names).map(|record| record.generation)
    }

    fn at(&mut self, names: &Names, generation: u64) -> Option<&mut Record> {
        self.grants.get_mut(names).filter(|record| record.generation == generation)
    }

    fn held(&mut self, names: &Names, owner: Owner) -> Option<&mut LeaseRow> {
        self.leases.get_mut(names).filter(|lease| lease.owner == owner && lease.ends > Instant::now())
    }

    fn sealed_at(&mut self, slot: &Slot) -> Option<&mut Vec<u8>> {
        match slot {
            Slot::KeyCheck => Some(&mut self.key_check),
            Slot::Own(name) => self.sealed.get_mut(name),
            Slot::RefreshToken(names) => self.grants.get_mut(names)?.refresh_token.as_mut(),
            Slot::AccessToken(names) => self.grants.get_mut(names)?.access_token.as_mut(),
            Slot::Flow(id) => {
                let flow = self.flows.iter_mut().find(|(key, _)| key[..] == id[..]);
                flow.map(|(_, (flow, _))| &mut flow.content)
            }
        }
    }

    /// Drops the oldest of these flows, so that there is room for one more.
    fn make_room(&mut self, most: usize, of: impl Fn(&FlowRecord) -> bool) {
        let mut there: Vec<_> = self.flows.values().filter(|(flow, _)| of(flow)).collect();
        there.sort_by_key(|(flow, _)| flow.expires_at);
        let many = (there.len() + 1).saturating_sub(most);
        let oldest: Vec<_> = there.into_iter().take(many).map(|(flow, _)| flow.id).collect();
        oldest.iter().for_each(|id| drop(self.flows.remove(id)));
    }

    fn write(&mut self, record: Record) {
        self.moved.insert(record.names.clone(), Instant::now());
        self.grants.insert(record.names.clone(), record);
    }
}

/// Gives a lease back.
struct Guard {
    engine: Memory,
    names: Names,
    owner: Owner,
    runtime: Handle,
}

impl Drop for Guard {
    fn drop(&mut self) {
        let (engine, names, owner) = (self.engine.clone(), self.names.clone(), self.owner);
        self.runtime.spawn(async move {
            let back = move |tables: &mut Tables| match tables.leases.get_mut(&names) {
                Some(lease) if lease.owner != owner => {}
                Some(lease) if lease.inherited => lease.ends = Instant::now(),
                _ => drop(tables.leases.remove(&names)),
            };
            // Where it fails, the lease ends by itself, only later.
            let _ = engine.call(back).await;
        });
    }
}

/// What the server tells a process. What it could not tell makes everything worth a look.
struct News {
    engine: Memory,
    told: Receiver<(u64, Change)>,
}

#[async_trait]
impl Changes for News {
    async fn next(&mut self) -> Change {
        loop {
            let told = self.told.recv().await;
            if told.as_ref().is_ok_and(|(from, _)| *from == self.engine.me) {
                continue;
            }
            let heard = self.engine.process.step().await.is_ok() && !self.engine.is_away();
            if let (true, Ok((_, change))) = (heard, told) {
                return change;
            }
            while self.engine.is_away() {
                tokio::time::sleep(LOOK_FOR_SERVER).await;
            }
            self.told = self.engine.server.news.subscribe();
            return Change::Anything;
        }
    }
}
