//! A program under callgrind, and what it counted.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::net::TcpStream;
use tokio::process::{Child, Command};

/// The sidecar under callgrind; it is killed when this goes.
pub struct Sidecar {
    pub address: String,
    /// What its agents trust.
    pub ca: PathBuf,
    folder: PathBuf,
    process: Child,
    dumps: usize,
}

impl Sidecar {
    /// Runs `sidebearer run` in a folder with a `proxy.yaml`.
    pub async fn start(folder: &Path) -> Self {
        let mut process = Command::new("valgrind")
            .args(["--tool=callgrind", "--vgdb-prefix=vgdb", "--callgrind-out-file=out", "--compress-pos=no"])
            .args(["--log-file=valgrind.log", env!("CARGO_BIN_EXE_sidebearer"), "run"])
            .current_dir(folder)
            .env_clear()
            .env("HOME", folder)
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            // Threads would take work from each other, never twice in the same way.
            .env("TOKIO_WORKER_THREADS", "1")
            // `rep movsb` would count as an instruction for every byte.
            .env(
                "GLIBC_TUNABLES",
                "glibc.cpu.x86_rep_movsb_threshold=1000000000:glibc.cpu.x86_rep_stosb_threshold=1000000000",
            )
            .stdin(Stdio::null())
            .stderr(Stdio::piped())
            .kill_on_drop(true)
            .spawn()
            .expect("valgrind runs; it comes with the Debian package of this name");
        let mut log = BufReader::new(process.stderr.take().unwrap()).lines();
        let mut said = String::new();
        let (address, ca) = loop {
            let line = log.next_line().await.unwrap();
            let line = line.unwrap_or_else(|| panic!("the sidecar ended, saying:\n{said}"));
            said.push_str(&format!("{line}\n"));
            let event: serde_json::Value = serde_json::from_str(&line).unwrap_or_default();
            if event["message"] == "listening" {
                let field = |name: &str| event[name].as_str().unwrap().to_owned();
                break (field("address"), folder.join(field("ca")));
            }
        };
        tokio::spawn(async move { while let Ok(Some(_)) = log.next_line().await {} });
        Self { address, ca, folder: folder.to_owned(), process, dumps: 0 }
    }

    /// What was counted since the last dump.
    pub async fn dump(&mut self) -> Dump {
        let id = self.process.id().expect("the sidecar runs").to_string();
        let asked = Command::new("vgdb")
            .args(["--vgdb-prefix=vgdb", &format!("--pid={id}"), "dump"])
            .current_dir(&self.folder)
            .output();
        tokio::pin!(asked);
        let asked = loop {
            tokio::select! {
                asked = &mut asked => break asked.unwrap(),
                // Where vgdb may not trace it, valgrind looks for a command only while the program does something.
                () = tokio::time::sleep(Duration::from_millis(200)) => drop(TcpStream::connect(&self.address).await),
            }
        };
        self.dumps += 1;
        let file = self.folder.join(format!("out.{}", self.dumps));
        let text = std::fs::read_to_string(&file);
        Dump::read(&text.unwrap_or_else(|error| panic!("{}: {error}; vgdb: {asked:?}", file.display())))
    }
}

/// Instructions and allocations.
#[derive(Debug, Clone, Copy)]
pub struct Cost {
    pub instructions: u64,
    pub allocations: f64,
}

impl Cost {
    pub fn less(self, other: Self) -> Self {
        let instructions = self.instructions - other.instructions;
        Self { instructions, allocations: (self.allocations - other.allocations).max(0.0) }
    }

    pub fn each(self, count: u64) -> Self {
        Self { instructions: self.instructions / count, allocations: self.allocations / count as f64 }
    }
}

/// What callgrind counted for each function.
#[derive(Default)]
pub struct Dump {
    functions: HashMap<String, Function>,
    /// From caller to callee.
    calls: HashMap<(String, String), Calls>,
}

#[derive(Default, Clone, Copy)]
struct Calls {
    count: u64,
    cost: u64,
}

#[derive(Default, Clone, Copy)]
struct Function {
    own: u64,
    called: u64,
}

const ALLOCATING: [&str; 5] = ["malloc", "calloc", "realloc", "posix_memalign", "aligned_alloc"];

impl Dump {
    /// Reads a file of callgrind's: blocks of `fn=`, lines of `place cost`, and `calls=` whose next line is the cost of
    /// the calls. A name is written once, and later its number alone.
    fn read(text: &str) -> Self {
        let (mut dump, mut names) = (Self::default(), HashMap::new());
        let (mut function, mut callee, mut called) = (String::new(), String::new(), None);
        for line in text.lines() {
            if let Some(name) = line.strip_prefix("fn=") {
                function = full(name, &mut names);
            } else if let Some(name) = line.strip_prefix("cfn=") {
                callee = full(name, &mut names);
            } else if let Some(calls) = line.strip_prefix("calls=") {
                called = Some(calls.split(' ').next().unwrap().parse::<u64>().unwrap());
            } else if line.starts_with(|first: char| first.is_ascii_digit()) {
                let cost: u64 = line.split(' ').nth(1).unwrap().parse().unwrap();
                let entry = dump.functions.entry(function.clone()).or_default();
                // None of the calls need have begun since the last dump.
                let Some(count) = called.take() else {
                    entry.own += cost;
                    continue;
                };
                entry.called += cost;
                let calls = dump.calls.entry((function.clone(), callee.clone())).or_default();
                calls.count += count;
                calls.cost += cost;
            }
        }
        dump
    }

    pub fn cost(&self) -> Cost {
        let allocations = self.calls.iter().filter(|((_, callee), _)| ALLOCATING.contains(&callee.as_str()));
        Cost {
            instructions: self.functions.values().map(|function| function.own).sum(),
            allocations: allocations.map(|(_, calls)| calls.count as f64).sum(),
        }
    }

    /// What was spent on each function beyond another dump, in itself and with what it calls.
    pub fn functions(&self, less: &Self) -> Vec<(&str, i64, i64)> {
        let functions = self.functions.iter().map(|(name, function)| {
            let before = less.functions.get(name).copied().unwrap_or_default();
            let own = function.own as i64 - before.own as i64;
            (name.as_str(), own, own + function.called as i64 - before.called as i64)
        });
        functions.collect()
    }

    /// Who calls functions with such a name beyond another dump: how often, and what it costs.
    pub fn callers<'a>(&'a self, less: &Self, callee: &[&str]) -> Vec<(&'a str, &'a str, i64, i64)> {
        let calls = self.calls.iter().filter(|((_, name), _)| callee.iter().any(|part| name.contains(part)));
        let calls = calls.map(|(pair, calls)| {
            let before = less.calls.get(pair).copied().unwrap_or_default();
            let (count, cost) = (calls.count as i64 - before.count as i64, calls.cost as i64 - before.cost as i64);
            (pair.0.as_str(), pair.1.as_str(), count, cost)
        });
        calls.collect()
    }
}

/// `(7) name` names number 7, `(7)` means it.
fn full(text: &str, names: &mut HashMap<String, String>) -> String {
    match text.split_once(' ') {
        Some((number, name)) => names.entry(number.to_owned()).or_insert_with(|| name.to_owned()).clone(),
        None => names.get(text).cloned().unwrap_or_else(|| text.to_owned()),
    }
}
