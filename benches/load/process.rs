//! What a process and its descendants have used, from /proc.

use std::collections::HashMap;
use std::fs;
use std::io;

/// The kernel counts in hundredths of a second here (`getconf CLK_TCK`), on every architecture that Linux runs on today.
const TICKS_PER_SECOND: f64 = 100.0;

/// A process tree's time and memory.
#[derive(Clone, Copy, Default)]
pub struct Usage {
    pub user_seconds: f64,
    pub system_seconds: f64,
    pub rss_kib: u64,
    pub peak_rss_kib: u64,
}

impl Usage {
    /// Of a process and all that descend from it: of squid and nginx it is the children that work.
    pub fn of(root: u32) -> io::Result<Self> {
        let processes = processes()?;
        if !processes.contains_key(&root) {
            return Err(io::Error::other(format!("no process {root}: the proxy is gone")));
        }
        let mut sum = Self::default();
        let mut open = vec![root];
        while let Some(pid) = open.pop() {
            open.extend(processes.iter().filter(|(_, stat)| stat.parent == pid).map(|(pid, _)| pid));
            sum.add(&processes[&pid], &fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default());
        }
        Ok(sum)
    }

    fn add(&mut self, stat: &Stat, status: &str) {
        self.user_seconds += stat.user as f64 / TICKS_PER_SECOND;
        self.system_seconds += stat.system as f64 / TICKS_PER_SECOND;
        self.rss_kib += kib(status, "VmRSS:");
        self.peak_rss_kib += kib(status, "VmHWM:");
    }
}

/// Has sleeps of this process end when they should: the usual 50 µs of slack would be added to every latency.
pub fn wake_on_time() {
    // Where this is not possible, it is added to the latencies of all contenders alike.
    let _ = fs::write("/proc/self/timerslack_ns", "1");
}

fn processes() -> io::Result<HashMap<u32, Stat>> {
    let named = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<u32>().ok());
    // One may end while the others are read.
    Ok(named
        .filter_map(|pid| Some((pid, Stat::read(&fs::read_to_string(format!("/proc/{pid}/stat")).ok()?)?)))
        .collect())
}

/// What of /proc/PID/stat counts here (proc(5)).
#[derive(Debug, PartialEq)]
pub struct Stat {
    pub parent: u32,
    pub user: u64,
    pub system: u64,
}

impl Stat {
    pub fn read(line: &str) -> Option<Self> {
        // The program's name is in parentheses, and may hold spaces and parentheses itself.
        let fields: Vec<&str> = line.rsplit_once(')')?.1.split_ascii_whitespace().collect();
        let ticks = |number: usize| fields.get(number - 3)?.parse::<u64>().ok();
        // Field 4; then 14 and 15, with 16 and 17 for children that have ended.
        Some(Self {
            parent: fields.get(1)?.parse().ok()?,
            user: ticks(14)? + ticks(16)?,
            system: ticks(15)? + ticks(17)?,
        })
    }
}

/// The value of a line of /proc/PID/status; 0 without it.
pub fn kib(status: &str, name: &str) -> u64 {
    let value = status.lines().find_map(|line| line.strip_prefix(name));
    value.and_then(|value| value.split_ascii_whitespace().next()?.parse().ok()).unwrap_or(0)
}
