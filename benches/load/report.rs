//! The line of JSON that a measurement ends with.

use std::io;
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};

use crate::latency::Latencies;
use crate::pace::Errors;
use crate::process::Usage;

/// The process whose cost is taken.
#[derive(clap::Args)]
pub struct Measured {
    /// The proxy's process: its time and memory are taken, and those of its descendants
    #[arg(long)]
    pid: Option<u32>,
}

impl Measured {
    /// No process.
    pub fn none() -> Self {
        Self { pid: None }
    }

    /// What it has used until now.
    pub fn usage(&self) -> io::Result<Option<Usage>> {
        self.pid.map(Usage::of).transpose()
    }

    pub fn start(&self) -> io::Result<Start<'_>> {
        Ok(Start { measured: self, before: self.usage()?, at: Instant::now() })
    }
}

/// A measurement under way.
pub struct Start<'a> {
    measured: &'a Measured,
    before: Option<Usage>,
    at: Instant,
}

impl Start<'_> {
    /// Ends it: what was done, what went wrong, and what that cost.
    pub fn end(self, latencies: Latencies, errors: &Errors) -> io::Result<Report> {
        let took = self.at.elapsed();
        let requests = latencies.count();
        let (errors, first_error) = errors.told();
        let mut report = Report { members: Map::new(), right: errors == 0 };
        report.add("requests", json!(requests));
        report.add("errors", json!(errors));
        report.add("first_error", json!(first_error));
        report.add("seconds", json!(rounded(took.as_secs_f64())));
        report.add("requests_per_second", json!(rounded(requests as f64 / took.as_secs_f64())));
        report.add_latencies(latencies);
        if let (Some(before), Some(after)) = (self.before, self.measured.usage()?) {
            report.add_cost(before, after, took, requests);
        }
        Ok(report)
    }
}

/// What is printed, and whether every answer was right.
pub struct Report {
    members: Map<String, Value>,
    right: bool,
}

impl Report {
    pub fn add(&mut self, name: &str, value: Value) {
        self.members.insert(name.into(), value);
    }

    /// How fast so much was read, and what each GiB cost.
    pub fn add_volume(&mut self, gib: f64) {
        let member = |name| self.members.get(name).and_then(Value::as_f64);
        let speed = member("seconds").map(|seconds| gib * 1024.0 / seconds);
        let cost = member("cpu_user_s").zip(member("cpu_system_s")).map(|(user, system)| (user + system) / gib);
        self.add("gib", json!(gib));
        self.add("mib_per_second", json!(speed.map(rounded)));
        self.add("cpu_s_per_gib", json!(cost.map(rounded)));
    }

    fn add_latencies(&mut self, latencies: Latencies) {
        let sorted = latencies.sorted();
        for (name, share) in [("p50_us", 500), ("p99_us", 990), ("p999_us", 999), ("max_us", 1000)] {
            self.add(name, json!(sorted.per_mille(share)));
        }
    }

    fn add_cost(&mut self, before: Usage, after: Usage, took: Duration, requests: usize) {
        let user = after.user_seconds - before.user_seconds;
        let system = after.system_seconds - before.system_seconds;
        self.add("cpu_user_s", json!(rounded(user)));
        self.add("cpu_system_s", json!(rounded(system)));
        self.add("cpu_ms_per_1000", json!(rounded((user + system) * 1e6 / requests.max(1) as f64)));
        self.add("cpu_busy", json!(rounded((user + system) / took.as_secs_f64())));
        self.add("rss_kib", json!(after.rss_kib));
        self.add("rss_peak_kib", json!(after.peak_rss_kib));
    }

    /// Prints it, and says whether every answer was right.
    pub fn print(self) -> io::Result<bool> {
        if !self.right {
            let first = self.members["first_error"].as_str().unwrap_or_default();
            eprintln!("load: WRONG ANSWERS: {} of them, the first: {first}", self.members["errors"]);
        }
        println!("{}", Value::Object(self.members));
        Ok(self.right)
    }
}

fn rounded(value: f64) -> f64 {
    (value * 1000.0).round() / 1000.0
}
