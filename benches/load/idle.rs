//! Connections that are open and do nothing: what each costs in memory.

use std::io;
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;

use crate::client::{Asked, Client};
use crate::dial::{Dialer, Target};
use crate::latency::Latencies;
use crate::pace::Errors;
use crate::process::Usage;
use crate::report::{Measured, Report};

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    #[command(flatten)]
    measured: Measured,
    #[arg(long, default_value_t = 2000)]
    connections: usize,
    /// Requests on each before it is left alone
    #[arg(long, default_value_t = 1)]
    requests_each: u64,
    /// How long they are held before memory is looked at
    #[arg(long, default_value_t = 3.0)]
    hold: f64,
}

pub async fn run(options: Options) -> io::Result<Report> {
    let target = Arc::new(options.target);
    let asked = Arc::new(Asked::usual(&target, &target.authority));
    let dialer = Dialer::new(target)?;
    let start = options.measured.start()?;
    let before = options.measured.usage()?;
    let errors = Errors::default();
    let mut latencies = Latencies::default();
    let mut held = Vec::new();
    for turn in 0..options.connections as u64 {
        let since = Instant::now();
        match open(&dialer, &asked, turn, options.requests_each).await {
            Ok(clients) => {
                held.extend(clients);
                latencies.add(since.elapsed());
            }
            // One that cannot be opened is enough to know: the others may take as long to fail.
            Err(error) => {
                errors.add(error);
                break;
            }
        }
    }
    tokio::time::sleep(Duration::from_secs_f64(options.hold)).await;
    let after = options.measured.usage()?;
    let mut report = start.end(latencies, &errors)?;
    report.add("connections", json!(held.len()));
    add_memory(&mut report, before, after, held.len());
    Ok(report)
}

async fn open(dialer: &Dialer, asked: &Arc<Asked>, turn: u64, requests: u64) -> io::Result<Vec<Client>> {
    let mut clients = Client::open(dialer, asked, 1, turn).await?;
    for client in &mut clients {
        for _ in 0..requests {
            client.get(turn).await?;
        }
    }
    Ok(clients)
}

fn add_memory(report: &mut Report, before: Option<Usage>, after: Option<Usage>, connections: usize) {
    let (Some(before), Some(after)) = (before, after) else { return };
    let grown = after.rss_kib as f64 - before.rss_kib as f64;
    report.add("rss_before_kib", json!(before.rss_kib));
    report.add("kib_per_connection", json!((grown / connections.max(1) as f64 * 10.0).round() / 10.0));
}
