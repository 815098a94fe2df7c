//! `cost.txt`: the numbers that are compared with.

use std::collections::BTreeMap;
use std::fmt::Write;
use std::process::Command;

use super::callgrind::Cost;

const FILE: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/benches/cost.txt");
/// Of the instructions. Ten runs of one build on a busy machine differ by 0.7 % at most, two builds of one source by 3.6 %.
const TOLERANCE: f64 = 0.05;
/// A tunnel's exchange is so short that one wake-up more in some of them shows.
const WAKE_UPS: u64 = 300;
/// Of the allocations, in pieces: a count of whole ones, and what is seldom.
const ALLOCATIONS: f64 = 0.5;

pub struct Kept {
    compiler: String,
    costs: BTreeMap<String, Cost>,
}

impl Kept {
    pub fn read() -> Self {
        let text = std::fs::read_to_string(FILE).unwrap_or_default();
        let compiler = text.lines().find_map(|line| line.strip_prefix("# by ")).unwrap_or_default().to_owned();
        let lines = text.lines().filter(|line| !line.starts_with('#'));
        let costs = lines.map(|line| {
            let [name, instructions, allocations] = line.split_whitespace().collect::<Vec<_>>()[..] else {
                panic!("{FILE}: {line:?} is no line of it")
            };
            let cost = Cost { instructions: instructions.parse().unwrap(), allocations: allocations.parse().unwrap() };
            (name.to_owned(), cost)
        });
        Self { compiler, costs: costs.collect() }
    }

    pub fn write<'a>(costs: impl Iterator<Item = (&'a str, Cost)>) {
        let mut text = format!(
            "# A request's cost in the sidecar: shape, instructions, allocations. `cargo bench --bench cost` compares,
# `cargo bench --bench cost -- --write` writes.
# by {}\n",
            compiler()
        );
        for (name, Cost { instructions, allocations }) in costs {
            writeln!(text, "{name:<12} {instructions:>8} {allocations:>6.1}").unwrap();
        }
        std::fs::write(FILE, text).unwrap();
    }

    /// Whether this compiler wrote the numbers. Another one makes other instructions: a difference then says nothing.
    pub fn is_of_this_compiler(&self) -> bool {
        let compiler = compiler();
        if self.compiler != compiler {
            eprintln!("benches/cost.txt was written with {}, and this is {compiler}: it is only told", self.compiler);
        }
        self.compiler == compiler
    }

    /// In what a cost is not the kept one, and whether that is a mistake.
    pub fn differs(&self, name: &str, cost: Cost) -> Option<(String, bool)> {
        let Some(kept) = self.costs.get(name) else {
            return Some((format!("benches/cost.txt: {name}: no number is kept"), true));
        };
        let (before, after) = (kept.instructions, cost.instructions);
        let change = after as f64 / before as f64 - 1.0;
        let more = cost.allocations - kept.allocations;
        let what = if change.abs() > TOLERANCE && after.abs_diff(before) > WAKE_UPS {
            format!("{after} instructions a request where {before} were kept, {:+.1} %", change * 100.0)
        } else if more.abs() > ALLOCATIONS {
            format!("{:.1} allocations a request where {:.1} were kept", cost.allocations, kept.allocations)
        } else {
            return None;
        };
        let costs_more = change > TOLERANCE || more > ALLOCATIONS;
        let says = if costs_more { "it costs more" } else { "the cost fell" };
        Some((format!("benches/cost.txt: {name}: {says}: {what}"), costs_more))
    }
}

/// The compiler that built this, and the machine's kind.
fn compiler() -> String {
    let said = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into())).arg("-V").output().unwrap();
    format!("{} on {}", String::from_utf8_lossy(&said.stdout).trim(), std::env::consts::ARCH)
}
