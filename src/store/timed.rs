//! An engine whose every operation is timed, and counted where it fails.

use std::collections::HashMap;
use std::sync::Arc;

use async_trait::async_trait;
use tokio::time::Instant;

use super::Most;
use super::engine::{
    Changes, Count, Engine, FlowRecord, Gone, Held, Intended, IntentRecord, Names, Owner, Plan, Record, Resealed,
    Result, Snapshot, StateRecord, TakenRecord,
};
use crate::metrics::Metrics;
use crate::names::ProviderName;

pub(super) struct Timed {
    pub(super) engine: Arc<dyn Engine>,
    pub(super) metrics: Metrics,
}

impl Timed {
    async fn timed<T>(&self, operation: &'static str, what: impl Future<Output = Result<T>>) -> Result<T> {
        let began = Instant::now();
        let done = what.await;
        self.metrics.store(operation, began.elapsed(), done.is_err());
        done
    }
}

#[async_trait]
impl Engine for Timed {
    fn at(&self) -> &str {
        self.engine.at()
    }

    async fn key_check(&self) -> Result<Option<Vec<u8>>> {
        self.timed("key_check", self.engine.key_check()).await
    }

    async fn grant(&self, names: &Names) -> Result<Option<Record>> {
        self.timed("grant", self.engine.grant(names)).await
    }

    async fn grants(&self) -> Result<Vec<(Names, Result<Record>)>> {
        self.timed("grants", self.engine.grants()).await
    }

    async fn census(&self) -> Result<Vec<Count>> {
        self.timed("census", self.engine.census()).await
    }

    async fn generations(&self, of: &[Names]) -> Result<HashMap<Names, u64>> {
        self.timed("generations", self.engine.generations(of)).await
    }

    async fn put(&self, record: &Record, previous: Option<u64>) -> Result<bool> {
        self.timed("put", self.engine.put(record, previous)).await
    }

    async fn replace(&self, record: &Record) -> Result<u64> {
        self.timed("replace", self.engine.replace(record)).await
    }

    async fn remove(&self, names: &Names) -> Result<Option<Gone>> {
        self.timed("remove", self.engine.remove(names)).await
    }

    async fn intend(&self, names: &Names, generation: u64, intent: &IntentRecord, owner: Owner) -> Result<Intended> {
        self.timed("intend", self.engine.intend(names, generation, intent, owner)).await
    }

    async fn mark(&self, names: &Names, generation: u64, intent: &IntentRecord, state: &StateRecord) -> Result<bool> {
        self.timed("mark", self.engine.mark(names, generation, intent, state)).await
    }

    async fn mark_all(&self, provider: &ProviderName, from: &str, to: &StateRecord) -> Result<()> {
        self.timed("mark_all", self.engine.mark_all(provider, from, to)).await
    }

    async fn lease(&self, names: &Names, owner: Owner) -> Result<Option<Held>> {
        self.timed("lease", self.engine.lease(names, owner)).await
    }

    async fn prolong(&self, names: &Names, owner: Owner) -> Result<bool> {
        self.timed("prolong", self.engine.prolong(names, owner)).await
    }

    async fn put_flow(&self, flow: &FlowRecord, most: Most, now: i64) -> Result<()> {
        self.timed("put_flow", self.engine.put_flow(flow, most, now)).await
    }

    async fn take_flow(&self, id: [u8; 32]) -> Result<Option<TakenRecord>> {
        self.timed("take_flow", self.engine.take_flow(id)).await
    }

    async fn sealed(&self, name: &str) -> Result<Option<Vec<u8>>> {
        self.timed("sealed", self.engine.sealed(name)).await
    }

    async fn put_sealed(&self, name: &str, value: &[u8], previous: Option<&[u8]>) -> Result<bool> {
        self.timed("put_sealed", self.engine.put_sealed(name, value, previous)).await
    }

    async fn changes(&self) -> Box<dyn Changes> {
        self.engine.changes().await
    }

    async fn snapshot(&self) -> Result<Snapshot> {
        self.timed("snapshot", self.engine.snapshot()).await
    }

    async fn reseal(&self, batch: &[Resealed]) -> Result<usize> {
        self.timed("reseal", self.engine.reseal(batch)).await
    }

    async fn carry_out(&self, plan: &Plan) -> Result<bool> {
        self.timed("carry_out", self.engine.carry_out(plan)).await
    }
}
