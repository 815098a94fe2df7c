//! Long bodies: how fast they come, and what a GiB costs.

use std::io;
use std::sync::Arc;
use std::time::Duration;

use serde_json::json;

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
    /// The length of each body, in MiB
    #[arg(long, default_value_t = 64)]
    mib: usize,
    /// How many of them, one after another
    #[arg(long, default_value_t = 16)]
    bodies: u64,
}

pub async fn run(options: Options) -> io::Result<Report> {
    let target = Arc::new(options.target);
    let asked = Arc::new(Asked::bytes(&target, &target.authority, options.mib << 20));
    let dialer = Dialer::new(target)?;
    let mut clients = Client::open(&dialer, &asked, 1, 0).await?;
    let start = options.measured.start()?;
    let errors = Errors::default();
    let mut latencies = Latencies::default();
    let pace = Pace::closed(options.bodies, Duration::from_secs(600));
    for client in &mut clients {
        while let Some(due) = pace.next().await {
            match client.get(due.number).await {
                Ok(()) => latencies.add(due.since.elapsed()),
                Err(error) => {
                    errors.add(error);
                    break;
                }
            }
        }
    }
    let gib = latencies.count() as f64 * options.mib as f64 / 1024.0;
    let mut report = start.end(latencies, &errors)?;
    report.add_volume(gib);
    report.add("mib_per_body", json!(options.mib));
    Ok(report)
}
