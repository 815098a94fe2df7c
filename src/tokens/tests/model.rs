//! Whatever happens in whatever order, to any number of sidecars over one store: no refresh token is spent twice, no
//! expired token is handed out, and whoever has a grant gets a token.
//!
//! Left out: a consent that is written by a statement which arrives when its sidecar has long given it up and tried again.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use proptest::prelude::*;
use proptest::test_runner::RngSeed;
use tokio::time::{Instant, timeout};
use url::form_urlencoded;

use super::fleet::{Fleet, Sidecar, Witness, proof};
use super::server::{Act, token};
use super::world::{pass, provider};
use crate::clock::Now;
use crate::oauth::grant::TokenRequest;
use crate::oauth::{Grant, Provider};
use crate::store::memory::{Fate, Process};
use crate::store::{SEND_WITHIN, State};
use crate::tokens::{Bearer, GrantError, NoRenewal, TokenError};
use crate::upstream::{CallError, Reply};

/// How many cases are run where `PROPTEST_CASES` does not say.
const CASES: u32 = 150;
const USERS: [&str; 2] = ["alice", "bob"];
const SIDECARS: usize = 4;
/// More token requests than any case has a use for.
const STORM: usize = 1000;
/// From the moment in which an intent is asked for: its lease ends, and an answer is waited for.
const OTHERS_WAIT: Duration = Duration::from_secs(35 + 25);
/// How soon a sidecar that can work again has stored what it has.
const STORES_WITHIN: Duration = Duration::from_secs(12);
/// What lives for so long at the provider is used: a sidecar counts from its request, 20 s before the answer at most.
const SURELY_LIVES: Duration = Duration::from_secs(20 + 6);
/// The wall clocks are up to a day apart, and no token of a case may seem to live again for that.
const LONGEST: Duration = Duration::from_secs(20 * 3600);

#[derive(Debug, Clone)]
struct Case {
    /// Of latencies and jitter.
    seed: u32,
    sidecars: usize,
    /// Whether the last sidecar asks for other scopes.
    scopes_differ: bool,
    /// Whether the provider takes a replaced refresh token again.
    grace: bool,
    /// Of access tokens, in seconds.
    lifetime: u64,
    steps: Vec<Step>,
}

#[derive(Debug, Clone, Copy)]
enum Step {
    /// At a sidecar, for a user. Nobody waits for it.
    Request(usize, usize),
    /// The upstream takes the token no more that was last handed out for a user.
    Revoke(usize),
    /// A late 401 at a sidecar, to the token that was last handed out for a user.
    RejectOld(usize, usize),
    /// Milliseconds.
    Pass(u64),
    Meets(usize, u64, Fate),
    Die(usize),
    Stop(usize, u64),
    Restart(usize),
    CutOff(usize, bool),
    Away(bool),
    /// What the provider does at the next request.
    Provider(Trouble),
    /// From now on, it takes so many seconds.
    Slow(u64),
    /// A sidecar's wall clock is so many days ahead.
    Clock(usize, i64),
    Consent(usize, usize),
    Disconnect(usize, usize),
    /// Nothing is wrong any more, and everybody is served.
    Peace,
}

#[derive(Debug, Clone, Copy)]
enum Trouble {
    Unreachable,
    Down,
    LosesAnswer,
}

fn step() -> impl Strategy<Value = Step> {
    let (sidecar, user) = (0..SIDECARS, user());
    let at = (sidecar.clone(), user.clone());
    let trouble = prop_oneof![Just(Trouble::Unreachable), Just(Trouble::Down), Just(Trouble::LosesAnswer)];
    prop_oneof![
        10 => at.clone().prop_map(|(sidecar, user)| Step::Request(sidecar, user)),
        3 => user.prop_map(Step::Revoke),
        2 => at.clone().prop_map(|(sidecar, user)| Step::RejectOld(sidecar, user)),
        4 => (0u64..50).prop_map(Step::Pass),
        6 => (0u64..60_000).prop_map(Step::Pass),
        2 => (60_000u64..5_000_000).prop_map(Step::Pass),
        4 => (sidecar.clone(), 0u64..14, fate()).prop_map(|(sidecar, ahead, fate)| Step::Meets(sidecar, ahead, fate)),
        1 => sidecar.clone().prop_map(Step::Die),
        2 => (sidecar.clone(), 1u64..90).prop_map(|(sidecar, seconds)| Step::Stop(sidecar, seconds)),
        3 => sidecar.clone().prop_map(Step::Restart),
        2 => (sidecar.clone(), any::<bool>()).prop_map(|(sidecar, cut_off)| Step::CutOff(sidecar, cut_off)),
        2 => any::<bool>().prop_map(Step::Away),
        3 => trouble.prop_map(Step::Provider),
        1 => (0u64..30).prop_map(Step::Slow),
        1 => (sidecar, -1i64..=1).prop_map(|(sidecar, days)| Step::Clock(sidecar, days)),
        1 => at.clone().prop_map(|(sidecar, user)| Step::Consent(sidecar, user)),
        1 => at.prop_map(|(sidecar, user)| Step::Disconnect(sidecar, user)),
        1 => Just(Step::Peace),
    ]
}

/// Most of it is about one user, or too little would come together.
fn user() -> impl Strategy<Value = usize> + Clone {
    prop_oneof![3 => Just(0), 1 => 0..USERS.len()]
}

fn fate() -> impl Strategy<Value = Fate> {
    let seconds = |fewest: u64, most: u64| (fewest..=most).prop_map(Duration::from_secs);
    prop_oneof![
        Just(Fate::Die),
        seconds(1, 70).prop_map(Fate::Stop),
        Just(Fate::Break),
        seconds(1, 30).prop_map(Fate::Delay)
    ]
}

/// One step; or, since chance seldom brings it about, something that happens in a renewal, and others who are asked then.
fn steps() -> impl Strategy<Value = Vec<Step>> {
    let renewal = ((0..SIDECARS, 0..SIDECARS, user()), 0u64..14, fate(), 0u64..60_000);
    let renewal = renewal.prop_flat_map(|((one, other, user), ahead, fate, time)| {
        // Each of them may be left out, where it has nothing to do with a failure.
        let steps = [
            Step::Pass(25_000),
            Step::Meets(one, ahead, fate),
            Step::Request(one, user),
            Step::Pass(time),
            Step::Request(other, user),
        ];
        steps
            .map(|step| prop::option::weighted(0.95, Just(step)))
            .prop_map(|steps| steps.into_iter().flatten().collect())
    });
    prop_oneof![9 => step().prop_map(|step| vec![step]), 1 => renewal]
}

fn case() -> impl Strategy<Value = Case> {
    let lifetime = prop_oneof![Just(20u64), Just(300), Just(3600)];
    let steps = prop::collection::vec(steps(), 1..50).prop_map(|steps| steps.concat());
    (any::<u32>(), 1..=SIDECARS, any::<bool>(), any::<bool>(), lifetime, steps).prop_map(
        |(seed, sidecars, scopes_differ, grace, lifetime, steps)| Case {
            seed,
            sidecars,
            scopes_differ,
            grace,
            lifetime,
            steps,
        },
    )
}

/// How many cases are asked for: more than a change is usually tried with.
fn many() -> Option<u32> {
    std::env::var("PROPTEST_CASES").ok()?.parse().ok()
}

proptest! {
    #![proptest_config(ProptestConfig {
        cases: many().unwrap_or(CASES),
        // A change is judged by the same cases each time; many cases look for new ones.
        rng_seed: if many().is_some() { RngSeed::Random } else { RngSeed::Fixed(7) },
        max_shrink_iters: 2_000,
        failure_persistence: None,
        ..ProptestConfig::default()
    })]

    #[test]
    fn no_order_of_events_loses_a_grant_or_spends_a_refresh_token_twice(case in case()) {
        // FUZZ-003, TOK-024, TOK-029, TOK-030, TOK-031, TOK-032, TOK-034, TOK-038
        let wrong = run(&case);
        prop_assert!(wrong.is_empty(), "{}", wrong.join("\n"));
    }
}

/// What went wrong, in order.
fn run(case: &Case) -> Vec<String> {
    super::JITTER.set(Some(case.seed));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let mut model = Model::new(case).await;
        for step in case.steps.iter().copied().chain([Step::Peace]) {
            model.take(step).await;
            if !model.log.wrong().is_empty() {
                break;
            }
        }
        model.log.wrong().clone()
    })
}

struct Model {
    fleet: Fleet,
    log: Arc<Log>,
    others: Arc<Provider>,
    sidecars: Vec<Sidecar>,
    started: Instant,
    seed: u32,
    scopes_differ: bool,
    away: bool,
    expected: [Expected; USERS.len()],
    /// What was last handed out for each user.
    last: Arc<Mutex<HashMap<usize, Bearer>>>,
    /// What each sidecar has in its memory, at least.
    held: Arc<Mutex<HashMap<(usize, usize), Bearer>>>,
}

/// What is known of a user's grant.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Expected {
    Connected,
    Disconnected,
    /// A consent or a disconnect broke off, and may still go on.
    Unsure,
}

/// All token requests, and what is wrong with them.
struct Log {
    fleet: Fleet,
    attempts: Mutex<Vec<Attempt>>,
    wrong: Mutex<Vec<String>>,
}

/// A refresh token on its way.
struct Attempt {
    refresh_token: String,
    process: Process,
    sidecar: usize,
    /// When the intent was asked for, or a little before.
    intended: Instant,
    came: Came,
}

/// What came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Came {
    NothingYet,
    Tokens,
    /// The grant is dead already.
    Refusal,
    /// The provider did nothing.
    Failure,
    /// Nobody knows.
    Loss,
}

/// Sees what one sidecar sends.
struct Eye {
    log: Arc<Log>,
    process: Process,
    sidecar: usize,
}

impl Witness for Eye {
    fn sent<'a>(&'a self, request: &'a TokenRequest, by: Option<Now>) -> BoxFuture<'a, usize> {
        async move {
            let mut fields = form_urlencoded::parse(request.body.expose().as_bytes());
            let sent = fields.find_map(|(name, value)| (name == "refresh_token").then(|| value.into_owned()));
            let attempt = Attempt {
                refresh_token: sent.unwrap_or_default(),
                process: self.process.clone(),
                sidecar: self.sidecar,
                intended: by.map_or_else(Instant::now, |by| by.instant - SEND_WITHIN),
                came: Came::NothingYet,
            };
            if !attempt.refresh_token.is_empty() {
                self.log.judge(&attempt).await;
            }
            let mut attempts = self.log.attempts.lock().unwrap();
            attempts.push(attempt);
            attempts.len() - 1
        }
        .boxed()
    }

    fn ended(&self, number: usize, answer: &Result<Reply, CallError>) {
        self.log.attempts.lock().unwrap()[number].came = match answer {
            Ok(reply) if reply.status.is_success() => Came::Tokens,
            Ok(reply) if reply.status.is_client_error() => Came::Refusal,
            Ok(_) | Err(CallError::Connect(_)) => Came::Failure,
            Err(_) => Came::Loss,
        };
    }
}

impl Log {
    fn wrong(&self) -> MutexGuard<'_, Vec<String>> {
        self.wrong.lock().unwrap()
    }

    fn accuse(&self, what: String) {
        let at = Instant::now() - self.fleet.started;
        self.wrong().push(format!("at {:.3} s: {what}", at.as_secs_f64()));
    }

    /// Whether a refresh token may be sent now.
    async fn judge(&self, attempt: &Attempt) {
        let Attempt { refresh_token: sent, process, sidecar, .. } = attempt;
        let key = self.fleet.key(&self.fleet.server.user_of(sent));
        let stored = self.fleet.row(&key).await.and_then(|row| row.refresh_token);
        if stored.is_none_or(|stored| stored.expose() != sent) {
            let moved = self.fleet.shared.moved(&key.provider, &key.subject);
            if moved.is_none_or(|moved| moved < attempt.intended) {
                self.accuse(format!("sidecar {sidecar} sends {sent}, and the row had moved on before its intent"));
            }
        }
        let now = Instant::now();
        let wrong =
            self.attempts.lock().unwrap().iter().filter(|before| before.refresh_token == *sent).find_map(|before| {
                let other = before.sidecar;
                match before.came {
                    Came::Refusal | Came::Failure | Came::Loss => None,
                    _ if before.process.is_dead() => None,
                    came if before.process.is(process) => {
                        Some(format!("sidecar {sidecar} sends {sent} again, of which has come: {came:?}"))
                    }
                    _ if now < before.intended + OTHERS_WAIT => Some(format!(
                        "sidecar {sidecar} sends {sent} while sidecar {other} has the time to store its answer"
                    )),
                    _ if before.process.hindered().is_none_or(|until| until + STORES_WITHIN < now) => Some(format!(
                        "sidecar {sidecar} sends {sent}, and nothing kept sidecar {other} from storing its answer"
                    )),
                    _ => None,
                }
            });
        wrong.into_iter().for_each(|wrong| self.accuse(wrong));
        if self.attempts.lock().unwrap().len() > STORM {
            self.accuse("a storm of token requests".into());
            process.die();
        }
    }
}

impl Model {
    async fn new(case: &Case) -> Self {
        let fleet = Fleet::new().await;
        {
            let mut book = fleet.server.book();
            (book.grace, book.expires_in) = (case.grace, case.lifetime.into());
        }
        let mut others = provider("acme", Grant::AuthorizationCode);
        others.target.scopes = vec!["other".into()];
        let log = Arc::new(Log { fleet: fleet.clone(), attempts: Mutex::default(), wrong: Mutex::default() });
        let mut model = Self {
            fleet,
            log,
            others: Arc::new(others),
            sidecars: Vec::new(),
            started: Instant::now(),
            seed: case.seed,
            scopes_differ: case.scopes_differ,
            away: false,
            expected: [Expected::Connected; USERS.len()],
            last: Arc::default(),
            held: Arc::default(),
        };
        for sidecar in 0..case.sidecars {
            let clock = model.fleet.clock.elsewhere();
            let started = model.start(sidecar, case.sidecars, clock).await;
            model.sidecars.push(started);
        }
        for user in USERS {
            model.fleet.connect(&model.fleet.key(user)).await;
        }
        model
    }

    async fn start(&mut self, sidecar: usize, of: usize, clock: crate::clock::Clock) -> Sidecar {
        self.seed = self.seed.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        let process = Process::with_latency(self.seed);
        let provider =
            if self.scopes_differ && sidecar + 1 == of { self.others.clone() } else { self.fleet.provider.clone() };
        let eye = Arc::new(Eye { log: self.log.clone(), process: process.clone(), sidecar });
        self.fleet.sidecar_of(&provider, process, clock, eye).await
    }

    async fn take(&mut self, step: Step) {
        let count = self.sidecars.len();
        let at = |sidecar: usize| sidecar % count;
        match step {
            Step::Request(sidecar, user) => drop(tokio::spawn(self.request(at(sidecar), user))),
            Step::Revoke(user) => {
                let last = self.last.lock().unwrap();
                last.get(&user).into_iter().for_each(|bearer| self.fleet.server.revoke(bearer));
            }
            Step::RejectOld(sidecar, user) => {
                let last = self.last.lock().unwrap().get(&user).cloned();
                let sidecar = self.sidecars[at(sidecar)].clone();
                let Some(bearer) = last.filter(|_| sidecar.process.is_running()) else { return };
                tokio::spawn(async move { sidecar.tokens.renew(&sidecar.key(USERS[user]), &bearer).await });
            }
            Step::Pass(_) if self.started.elapsed() > LONGEST => {}
            Step::Pass(milliseconds) => tokio::time::sleep(Duration::from_millis(milliseconds)).await,
            Step::Meets(sidecar, ahead, fate) => self.sidecars[at(sidecar)].process.meets(ahead, fate),
            Step::Die(sidecar) => self.sidecars[at(sidecar)].process.die(),
            Step::Stop(sidecar, seconds) => self.sidecars[at(sidecar)].process.stop(Duration::from_secs(seconds)),
            Step::Restart(sidecar) => self.restart(at(sidecar)).await,
            Step::CutOff(sidecar, cut_off) => self.sidecars[at(sidecar)].process.cut_off(cut_off),
            Step::Away(away) => self.away(away),
            Step::Provider(trouble) => self.fleet.server.book().acts.push_back(match trouble {
                Trouble::Unreachable => Act::Refuse,
                Trouble::Down => Act::Say(503, &[], ""),
                Trouble::LosesAnswer => Act::Lose,
            }),
            Step::Slow(seconds) => self.fleet.server.book().delay = Duration::from_secs(seconds),
            Step::Clock(sidecar, days) => {
                self.sidecars[at(sidecar)].clock.skew_wall(days * 24 * 3600 * 1000);
                self.held.lock().unwrap().retain(|(holder, _), _| *holder != at(sidecar));
            }
            Step::Consent(sidecar, user) => self.consent(at(sidecar), user).await,
            Step::Disconnect(sidecar, user) => self.disconnect(at(sidecar), user).await,
            Step::Peace => self.peace().await,
        }
    }

    /// A request as the proxy makes it: at most two tries. Whether it was served.
    fn request(
        &self,
        sidecar: usize,
        user: usize,
    ) -> impl Future<Output = Result<(), Option<NoRenewal>>> + Send + use<> {
        let (log, last, held) = (self.log.clone(), self.last.clone(), self.held.clone());
        let (server, number) = (self.fleet.server.clone(), sidecar);
        let sidecar = self.sidecars[sidecar].clone();
        async move {
            let key = sidecar.key(USERS[user]);
            sidecar.process.runs().await;
            let at_hand = held.lock().unwrap().get(&(number, user)).cloned();
            let at_hand = at_hand.filter(|bearer| server.lives_for(bearer, SURELY_LIVES));
            let handed_out = |bearer: &Bearer| {
                if server.is_expired(bearer) {
                    log.accuse(format!("sidecar {number} hands out {}, which has expired", token(bearer)));
                }
                if server.owner(bearer) != USERS[user] {
                    log.accuse(format!("sidecar {number} hands out {} for {}", token(bearer), USERS[user]));
                }
                last.lock().unwrap().insert(user, bearer.clone());
                held.lock().unwrap().insert((number, user), bearer.clone());
                let taken = server.accepts(bearer);
                if taken {
                    sidecar.tokens.accepted(&key, bearer);
                }
                taken
            };
            sidecar.tokens.inner.sweep();
            let first = sidecar.tokens.bearer(&key).await;
            if sidecar.process.is_dead() {
                return Err(None);
            }
            if let Err(error) = &first {
                // Of another grant, it is right to have forgotten it.
                let stored = log.fleet.row(&key).await.and_then(|row| row.refresh_token);
                let good = at_hand.filter(|bearer| stored.is_some_and(|stored| server.is_of(bearer, stored.expose())));
                if good.is_some() || error.to_string().contains("defect") {
                    let good = good.as_ref().map(token);
                    log.accuse(format!("sidecar {number} says {error} to {}, and has {good:?}", USERS[user]));
                }
            }
            let first = first.map_err(|error| Some(NoRenewal::Failed(error)))?;
            if handed_out(&first) {
                return Ok(());
            }
            let second = sidecar.tokens.renew(&key, &first).await;
            if sidecar.process.is_dead() {
                return Err(None);
            }
            if handed_out(&second.map_err(Some)?) { Ok(()) } else { Err(None) }
        }
    }

    fn away(&mut self, away: bool) {
        self.away = away;
        self.fleet.shared.away(away);
        self.sidecars.iter().for_each(|sidecar| sidecar.process.was_kept_from_its_store());
    }

    /// `kill -9`, and a new process.
    async fn restart(&mut self, sidecar: usize) {
        self.sidecars[sidecar].process.die();
        self.held.lock().unwrap().retain(|(holder, _), _| *holder != sidecar);
        // It does not come up without its store.
        if !self.away {
            let clock = self.sidecars[sidecar].clock.clone();
            self.sidecars[sidecar] = self.start(sidecar, self.sidecars.len(), clock).await;
        }
    }

    async fn consent(&mut self, sidecar: usize, user: usize) {
        let Sidecar { process, tokens, .. } = self.sidecars[sidecar].clone();
        if !process.is_running() {
            return;
        }
        let (provider, name) = (self.fleet.provider.name.clone(), USERS[user].parse().unwrap());
        let granted =
            timeout(Duration::from_secs(60), tokens.grant(&provider, &name, proof(USERS[user]), Vec::new())).await;
        let expected = match granted {
            Ok(Ok(_)) => Expected::Connected,
            Ok(Err(GrantError::Provider(_) | GrantError::Nowhere(_))) => return,
            Ok(Err(GrantError::Store(_))) | Err(_) => Expected::Unsure,
        };
        self.expects(user, expected);
    }

    async fn disconnect(&mut self, sidecar: usize, user: usize) {
        let Sidecar { process, tokens, .. } = self.sidecars[sidecar].clone();
        if !process.is_running() {
            return;
        }
        let key = self.fleet.key(USERS[user]);
        let gone = timeout(Duration::from_secs(60), tokens.disconnect(&key.provider, &key.subject)).await;
        self.expects(user, if let Ok(Ok(_)) = gone { Expected::Disconnected } else { Expected::Unsure });
    }

    fn expects(&mut self, user: usize, expected: Expected) {
        self.held.lock().unwrap().retain(|(_, whose), _| *whose != user);
        if self.expected[user] != Expected::Unsure {
            self.expected[user] = expected;
        }
    }

    /// Everything is mended, and every rest and lease has its time. Then whoever has a grant is served, everywhere.
    async fn peace(&mut self) {
        self.away(false);
        {
            let mut book = self.fleet.server.book();
            book.acts.clear();
            book.delay = Duration::ZERO;
        }
        self.mend().await;
        // What was happening at that moment has happened now.
        pass(1.0).await;
        self.mend().await;
        pass(400.0).await;
        let before = self.fleet.server.calls();
        pass(300.0).await;
        if self.fleet.server.calls() - before > 4 * self.sidecars.len() {
            self.log.accuse(format!("nobody asks, and there are {} calls", self.fleet.server.calls() - before));
        }
        for user in 0..USERS.len() {
            for sidecar in 0..self.sidecars.len() {
                self.is_served(sidecar, user).await;
            }
        }
    }

    async fn mend(&mut self) {
        for sidecar in 0..self.sidecars.len() {
            let process = &self.sidecars[sidecar].process;
            process.is_spared();
            process.cut_off(false);
            process.go_on();
            if process.is_dead() {
                self.restart(sidecar).await;
            }
        }
    }

    async fn is_served(&self, sidecar: usize, user: usize) {
        let row = self.fleet.row(&self.fleet.key(USERS[user])).await;
        let honoured = row.as_ref().and_then(|row| row.refresh_token.as_ref());
        let honoured = honoured.is_some_and(|refresh_token| self.fleet.server.honours(refresh_token.expose()));
        let request = || timeout(Duration::from_secs(60), tokio::spawn(self.request(sidecar, user)));
        let mut got = request().await;
        if let Ok(Ok(Err(None))) = got {
            // The token at hand and the stored one were both revoked, and a request is made twice only (C9). Another renewal
            // is not forced at once (C5).
            pass(301.0).await;
            got = request().await;
        }
        let Ok(Ok(got)) = got else {
            return self.log.accuse(format!("a request of {} at sidecar {sidecar} does not end: {got:?}", USERS[user]));
        };
        let right = match (self.expected[user], &row) {
            (Expected::Disconnected, Some(_)) | (Expected::Connected, None) => false,
            (_, None) => matches!(&got, Err(Some(NoRenewal::Failed(TokenError::NotConnected { .. })))),
            (_, Some(row)) if honoured => got.is_ok() && !matches!(row.state, State::Reauthorize { .. }),
            // Lost: what it says is for the user.
            (_, Some(_)) => match &got {
                Ok(()) => true,
                Err(Some(NoRenewal::Failed(error))) => error.code() == "reauthorize",
                Err(_) => false,
            },
        };
        if !right {
            let row = row.map(|row| (row.generation, row.state, row.intent.is_some()));
            self.log.accuse(format!(
                "sidecar {sidecar} and {}, {:?}, row {row:?}, honoured: {honoured}: {got:?}",
                USERS[user], self.expected[user]
            ));
        }
    }
}
