//! Requests on kept connections: as fast as answers come, or at a fixed rate.

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
    #[arg(long, default_value_t = 16)]
    connections: usize,
    /// HTTP/2 requests at once on each connection
    #[arg(long, default_value_t = 1)]
    streams: usize,
    /// Ends after so many requests, if not before by `--seconds`
    #[arg(long, default_value_t = u64::MAX)]
    requests: u64,
    #[arg(long, default_value_t = 5.0)]
    seconds: f64,
    /// Requests a second, whatever the answers do; without it, each connection sends when it was answered
    #[arg(long)]
    rate: Option<f64>,
    /// Requests that come first and are not counted, all connections together
    #[arg(long, default_value_t = 1000)]
    warm_up: u64,
}

pub async fn run(options: Options) -> io::Result<Report> {
    let Options { target, measured, connections, streams, requests, seconds, rate, warm_up } = options;
    let target = Arc::new(target);
    let asked = Arc::new(Asked::usual(&target, &target.authority));
    let dialer = Dialer::new(Arc::clone(&target))?;
    let mut clients = Vec::new();
    for turn in 0..connections as u64 {
        clients.extend(Client::open(&dialer, &asked, streams, turn).await?);
    }
    let long = Duration::from_secs_f64(seconds);
    // As many warm up as will be measured, and at the same rate: what is cold or lazy at the end of it stays so.
    let before = match rate {
        Some(rate) => Pace::open(rate, Duration::from_secs_f64(warm_up.min(rate as u64) as f64 / rate)),
        None => Pace::closed(warm_up, long),
    };
    let errors = Arc::new(Errors::default());
    let (clients, _) = send(clients, before, &errors).await;
    let start = measured.start()?;
    let pace = match rate {
        Some(rate) => Pace::open(rate, long),
        None => Pace::closed(requests, long),
    };
    let (clients, latencies) = send(clients, pace, &errors).await;
    let mut report = start.end(latencies, &errors)?;
    report.add("connections", connections.into());
    drop(clients);
    Ok(report)
}

/// Has all of them send until the pace ends. One that met an error sends no more.
async fn send(clients: Vec<Client>, pace: Pace, errors: &Arc<Errors>) -> (Vec<Client>, Latencies) {
    let pace = Arc::new(pace);
    let mut tasks = JoinSet::new();
    for client in clients {
        tasks.spawn(send_one_by_one(client, Arc::clone(&pace), Arc::clone(errors)));
    }
    let mut whole = Vec::new();
    let mut latencies = Latencies::default();
    while let Some(ended) = tasks.join_next().await {
        let (client, its) = ended.expect("it does not panic");
        whole.extend(client);
        latencies.append(its);
    }
    (whole, latencies)
}

async fn send_one_by_one(mut client: Client, pace: Arc<Pace>, errors: Arc<Errors>) -> (Option<Client>, Latencies) {
    let mut latencies = Latencies::default();
    while let Some(due) = pace.next().await {
        match client.get(due.number).await {
            Ok(()) => latencies.add(due.since.elapsed()),
            Err(error) => {
                errors.add(error);
                return (None, latencies);
            }
        }
    }
    (Some(client), latencies)
}
