//! What the process keeps from everybody else on the machine, and what it asks of it.

use std::sync::OnceLock;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The limits that are changed here: how they were before, and how they are now.
static LIMITS: OnceLock<[Limit; 2]> = OnceLock::new();

struct Limit {
    resource: Resource,
    before: Rlimit,
    ours: Rlimit,
}

/// Keeps other processes of the same user out of this one's memory and environment, has no crash write it to a disk,
/// and takes as many descriptors as the machine gives. Only the first call does something.
pub fn prepare() {
    LIMITS.get_or_init(|| {
        // Where the system refuses, a sidecar that works is worth more than none.
        #[cfg(target_os = "linux")]
        let _ = rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable);
        let (core, files) = (getrlimit(Resource::Core), getrlimit(Resource::Nofile));
        let limits = [
            Limit { resource: Resource::Core, before: core, ours: Rlimit { current: Some(0), ..core } },
            // Every tunnel takes two, and four more while much goes through it.
            Limit { resource: Resource::Nofile, before: files, ours: Rlimit { current: files.maximum, ..files } },
        ];
        set(&limits, |limit| limit.ours);
        limits
    });
}

/// Starts a command that is to have the limits that it would have without us.
pub fn as_before<T>(start: impl FnOnce() -> T) -> T {
    let Some(limits) = LIMITS.get() else { return start() };
    set(limits, |limit| limit.before);
    let started = start();
    set(limits, |limit| limit.ours);
    started
}

fn set(limits: &[Limit], which: fn(&Limit) -> Rlimit) {
    for limit in limits {
        if let Err(error) = setrlimit(limit.resource, which(limit)) {
            // It works with fewer, too.
            tracing::warn!(resource = ?limit.resource, %error, "a limit of this process stays as it was");
        }
    }
}

#[cfg(all(test, target_os = "linux"))]
mod tests {
    use rustix::process::{DumpableBehavior, dumpable_behavior};

    use super::*;

    #[test]
    fn nobody_looks_into_a_process_that_is_prepared() {
        // LEK-005
        prepare();
        assert_eq!(dumpable_behavior(), Ok(DumpableBehavior::NotDumpable));
        assert_eq!(getrlimit(Resource::Core).current, Some(0));
        let files = getrlimit(Resource::Nofile);
        assert_eq!(files.current, files.maximum);
        let before = LIMITS.get().unwrap().each_ref().map(|limit| limit.before.current);
        let seen = as_before(|| [Resource::Core, Resource::Nofile].map(|resource| getrlimit(resource).current));
        assert_eq!(seen, before);
        assert_eq!(getrlimit(Resource::Core).current, Some(0));
    }
}
