//! Starts a proxy, and measures how long it takes until it listens and until it has answered with the token.

use std::io;
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::json;
use tokio::net::TcpStream;

use crate::client::{Asked, Client};
use crate::dial::{Dialer, Target};
use crate::latency::Latencies;
use crate::pace::Errors;
use crate::report::{Measured, Report};

/// A peer that has not answered by then does not work.
const PATIENCE: Duration = Duration::from_secs(20);

/// Shorter than what is measured, long enough to leave the proxy its core.
const PAUSE: Duration = Duration::from_micros(500);

#[derive(clap::Args)]
pub struct Options {
    #[command(flatten)]
    target: Target,
    /// The program and its arguments
    #[arg(last = true, required = true)]
    command: Vec<String>,
}

pub async fn run(options: Options) -> io::Result<Report> {
    let target = Arc::new(options.target);
    let asked = Arc::new(Asked::usual(&target, &target.authority));
    let dialer = Dialer::new(Arc::clone(&target))?;
    let measured = Measured::none();
    let start = measured.start()?;
    let since = Instant::now();
    let mut proxy = Proxy::start(&options.command)?;
    until(&mut proxy, since, || TcpStream::connect(target.address)).await?;
    let ready = since.elapsed();
    until(&mut proxy, since, || first(&dialer, &asked)).await?;
    let mut latencies = Latencies::default();
    latencies.add(since.elapsed());
    let mut report = start.end(latencies, &Errors::default())?;
    report.add("ready_us", json!(ready.as_micros() as u64));
    report.add("first_200_us", json!(since.elapsed().as_micros() as u64));
    proxy.stop()?;
    Ok(report)
}

/// Tries again until it works: a proxy that listens may still refuse, or lack its token.
async fn until<T, F>(proxy: &mut Proxy, since: Instant, attempt: impl Fn() -> F) -> io::Result<T>
where
    F: Future<Output = io::Result<T>>,
{
    loop {
        match attempt().await {
            Ok(done) => return Ok(done),
            Err(error) if since.elapsed() > PATIENCE => return Err(error),
            Err(error) => proxy.check(&error)?,
        }
        tokio::time::sleep(PAUSE).await;
    }
}

async fn first(dialer: &Dialer, asked: &Arc<Asked>) -> io::Result<()> {
    for mut client in Client::open(dialer, asked, 1, 0).await? {
        client.get(0).await?;
    }
    Ok(())
}

/// The program, which is stopped when it is no longer needed.
struct Proxy(Child);

impl Proxy {
    fn start(command: &[String]) -> io::Result<Self> {
        Command::new(&command[0]).args(&command[1..]).stdin(Stdio::null()).stdout(Stdio::null()).spawn().map(Self)
    }

    fn check(&mut self, error: &io::Error) -> io::Result<()> {
        match self.0.try_wait()? {
            Some(status) => Err(io::Error::other(format!("it ended with {status}; before: {error}"))),
            None => Ok(()),
        }
    }

    /// SIGTERM, as a supervisor stops it, so that its children end with it.
    fn stop(mut self) -> io::Result<ExitStatus> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        self.0.wait()
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        let _ = self.0.kill();
    }
}
