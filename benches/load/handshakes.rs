//! A new connection for each request: CONNECT, TLS, the first answer, and the end.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use tokio::task::JoinSet;

use crate::client::{Asked, Client};
use crate::dial::{Dialer, Target};
use crate::latency::Latencies;
use crate::pace::{Errors, Pace};
use crate::report::{Measured, Report};

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    measured: Measured,
    #[arg(long, default_value_t = 200)]
    requests: u64,
    #[arg(long, default_value_t = 60.0)]
    seconds: f64,
    /// Connections that are made at once
    #[arg(long, default_value_t = 1)]
    at_once: usize,
    /// Requests that come first and are not counted
    #[arg(long, default_value_t = 20)]
    warm_up: u64,
    /// Each for a host of its own: `h0` in place of the authority's first label, counted from here
    #[arg(long)]
    distinct_from: Option<u64>,
}

pub async fn run(options: Options) -> io::Result<Report> {
    let target = Arc::new(options.target);
    let dialer = Dialer::new(Arc::clone(&target))?;
    let maker = Arc::new(Maker { dialer, target, distinct_from: options.distinct_from });
    let long = Duration::from_secs_f64(options.seconds);
    let errors = Arc::new(Errors::default());
    // The hosts that warm up lie behind those that are measured, so that these are new.
    make(&maker, options.at_once, options.requests, Pace::closed(options.warm_up, long), &errors).await;
    let start = options.measured.start()?;
    let latencies = make(&maker, options.at_once, 0, Pace::closed(options.requests, long), &errors).await;
    start.end(latencies, &errors)
}

struct Maker {
    dialer: Dialer,
    target: Arc<Target>,
    distinct_from: Option<u64>,
}

impl Maker {
    async fn request(&self, number: u64) -> io::Result<()> {
        let asked = Arc::new(Asked::usual(&self.target, &self.authority(number)));
        for mut client in Client::open(&self.dialer, &asked, 1, number).await? {
            client.get(number).await?;
        }
        Ok(())
    }

    fn authority(&self, number: u64) -> String {
        let authority = &self.target.authority;
        let domain = authority.split_once('.').map_or(authority.as_str(), |(_, domain)| domain);
        self.distinct_from.map_or_else(|| authority.clone(), |first| format!("h{}.{domain}", first + number))
    }
}

async fn make(maker: &Arc<Maker>, at_once: usize, first: u64, pace: Pace, errors: &Arc<Errors>) -> Latencies {
    let pace = Arc::new(pace);
    let mut tasks = JoinSet::new();
    for _ in 0..at_once {
        tasks.spawn(make_one_by_one(Arc::clone(maker), first, Arc::clone(&pace), Arc::clone(errors)));
    }
    let mut latencies = Latencies::default();
    while let Some(ended) = tasks.join_next().await {
        latencies.append(ended.expect("it does not panic"));
    }
    latencies
}

async fn make_one_by_one(maker: Arc<Maker>, first: u64, pace: Arc<Pace>, errors: Arc<Errors>) -> Latencies {
    let mut latencies = Latencies::default();
    while let Some(due) = pace.next().await {
        match maker.request(first + due.number).await {
            Ok(()) => latencies.add(due.since.elapsed()),
            Err(error) => errors.add(error),
        }
    }
    latencies
}
