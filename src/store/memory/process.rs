//! A process of a test, as its store and its network see it: it may die, stand still or lose a message at each step.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use tokio::sync::Notify;
use tokio::task::JoinHandle;
use tokio::time::Instant;

/// A process. A clone is the same one.
#[derive(Clone, Default)]
pub(crate) struct Process {
    state: Arc<Mutex<State>>,
    goes_on: Arc<Notify>,
}

/// What happens to a process when it has sent or received so many messages more.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    /// `kill -9`.
    Die,
    /// `SIGSTOP`, and `SIGCONT` so much later.
    Stop(Duration),
    /// The message does not get through: a request is not sent, or its answer is lost.
    Break,
    /// The message takes so long.
    Delay(Duration),
}

/// A message did not get through.
#[derive(Debug)]
pub(crate) struct Broken;

#[derive(Default)]
struct State {
    dead: bool,
    stopped_until: Option<Instant>,
    cut_off: bool,
    steps: u64,
    fates: BTreeMap<u64, Fate>,
    /// Where messages take different times: what the next one is made of.
    latency: Option<u32>,
    hindered: Option<Instant>,
}

impl Process {
    /// One whose messages take up to 8 ms, in an order that `seed` decides.
    pub fn with_latency(seed: u32) -> Self {
        let state = State { latency: Some(seed | 1), ..State::default() };
        Self { state: Arc::new(Mutex::new(state)), goes_on: Arc::default() }
    }

    /// Plans what happens at the step that comes `ahead` steps after the next.
    pub fn meets(&self, ahead: u64, fate: Fate) {
        let mut state = self.lock();
        let step = state.steps + 1 + ahead;
        state.fates.insert(step, fate);
    }

    /// What was planned, and has not come, will not.
    pub fn is_spared(&self) {
        self.lock().fates.clear();
    }

    /// It takes no further step, and gives nothing back.
    pub fn die(&self) {
        self.lock().dead = true;
    }

    pub fn is_dead(&self) -> bool {
        self.lock().dead
    }

    /// Whether it can do anything now.
    pub fn is_running(&self) -> bool {
        let state = self.lock();
        !state.dead && state.stopped_until.is_none_or(|until| until <= Instant::now())
    }

    /// Whether it is that one.
    pub fn is(&self, other: &Process) -> bool {
        Arc::ptr_eq(&self.state, &other.state)
    }

    /// It takes no step for so long.
    pub fn stop(&self, time: Duration) {
        let mut state = self.lock();
        let until = Instant::now() + time;
        state.stopped_until = state.stopped_until.max(Some(until));
        state.is_hindered_until(until);
    }

    pub fn stood_still_after(&self, moment: Instant) -> bool {
        self.lock().stopped_until.is_some_and(|until| until > moment)
    }

    /// It goes on at once.
    pub fn go_on(&self) {
        let mut state = self.lock();
        state.stopped_until = state.stopped_until.map(|until| until.min(Instant::now()));
        state.hindered = state.hindered.min(Some(Instant::now()));
        self.goes_on.notify_waiters();
    }

    /// Whether the store's server is out of its reach from now on.
    pub fn cut_off(&self, cut_off: bool) {
        let mut state = self.lock();
        if state.cut_off {
            state.is_hindered_until(Instant::now());
        }
        state.cut_off = cut_off;
    }

    /// The store's server has gone, or has come back.
    pub fn was_kept_from_its_store(&self) {
        self.lock().is_hindered_until(Instant::now());
    }

    pub fn is_cut_off(&self) -> bool {
        self.lock().cut_off
    }

    /// Until when something last kept it from its work; the present, if something does.
    pub fn hindered(&self) -> Option<Instant> {
        let state = self.lock();
        if state.cut_off { Some(Instant::now()) } else { state.hindered }
    }

    /// Sends or receives a message.
    pub async fn step(&self) -> Result<(), Broken> {
        let (fate, latency) = self.lock().next();
        tokio::time::sleep(latency).await;
        match fate {
            Some(Fate::Die) => self.die(),
            Some(Fate::Stop(time)) => self.stop(time),
            Some(Fate::Delay(time)) => {
                self.lock().is_hindered_until(Instant::now() + time);
                tokio::time::sleep(time).await;
            }
            Some(Fate::Break) => self.lock().is_hindered_until(Instant::now()),
            None => {}
        }
        self.runs().await;
        if fate == Some(Fate::Break) { Err(Broken) } else { Ok(()) }
    }

    /// Waits until it is not standing still; for ever, when it is dead.
    pub async fn runs(&self) {
        loop {
            let mut goes_on = std::pin::pin!(self.goes_on.notified());
            goes_on.as_mut().enable();
            let (dead, until) = {
                let state = self.lock();
                (state.dead, state.stopped_until.filter(|until| *until > Instant::now()))
            };
            match until {
                _ if dead => std::future::pending().await,
                Some(until) => drop(tokio::time::timeout_at(until, goes_on).await),
                None => return,
            }
        }
    }

    /// Waits for an answer, up to `deadline`. Who stands still notices neither the answer nor the time.
    pub async fn waits<T>(&self, mut answer: JoinHandle<T>, deadline: Duration) -> Option<T> {
        if let Ok(answer) = tokio::time::timeout(deadline, &mut answer).await {
            return answer.ok();
        }
        self.runs().await;
        tokio::time::timeout(MOMENT, answer).await.ok()?.ok()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }
}

impl State {
    fn is_hindered_until(&mut self, until: Instant) {
        self.hindered = self.hindered.max(Some(until));
    }

    fn next(&mut self) -> (Option<Fate>, Duration) {
        self.steps += 1;
        let latency = self.latency.as_mut().map_or(0, |seed| {
            // Xorshift: any order will do, if it is the same again.
            *seed ^= *seed << 13;
            *seed ^= *seed >> 17;
            *seed ^= *seed << 5;
            *seed % 8
        });
        (self.fates.remove(&self.steps), Duration::from_millis(latency.into()))
    }
}

/// What was held up together goes on together.
const MOMENT: Duration = Duration::from_millis(1);
