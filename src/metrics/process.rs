//! What the kernel says of this process.

use std::fs;

use rustix::process::{Resource, getrlimit};
use rustix::time::{ClockId, clock_gettime};

/// Figures of one moment; 0 where the kernel does not tell.
pub(super) struct Process {
    /// In bytes.
    pub memory: i64,
    pub open_files: i64,
    pub most_files: i64,
    /// In seconds.
    pub cpu: f64,
}

pub(super) fn look() -> Process {
    let cpu = clock_gettime(ClockId::ProcessCPUTime);
    Process {
        memory: memory().unwrap_or_default(),
        open_files: open_files().unwrap_or_default(),
        most_files: getrlimit(Resource::Nofile).current.map_or(i64::MAX, |most| most.try_into().unwrap_or(i64::MAX)),
        cpu: cpu.tv_sec as f64 + cpu.tv_nsec as f64 / 1e9,
    }
}

fn memory() -> Option<i64> {
    let status = fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    Some(line.trim().strip_suffix(" kB")?.parse::<i64>().ok()? * 1024)
}

fn open_files() -> Option<i64> {
    let files = fs::read_dir("/proc/self/fd").ok()?.count();
    // One of them is the folder that is read.
    i64::try_from(files).ok().map(|files| files - 1)
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use super::*;

    #[test]
    fn the_process_is_known_to_itself() {
        crate::process::prepare();
        let before = look();
        let _file = fs::File::open("/proc/self/status").unwrap();
        let now = look();
        assert!(now.memory > 1 << 20 && now.cpu > 0.0 && now.open_files < now.most_files, "{}", now.memory);
        assert!(before.open_files > 2 && now.open_files > 2);
    }
}
