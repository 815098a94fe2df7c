//! The arithmetic of the load generator, whose bench target has no test harness.

#[expect(dead_code, reason = "what only the generator itself needs")]
#[path = "../../benches/load/latency.rs"]
mod latency;
#[path = "../../benches/load/pace.rs"]
mod pace;
#[expect(dead_code, reason = "what only the generator itself needs")]
#[path = "../../benches/load/process.rs"]
mod process;

use std::thread;
use std::time::{Duration, Instant};

use self::latency::{Latencies, Sorted};
use self::pace::{Errors, Pace, schedule};
use self::process::{Stat, Usage, kib};

fn sorted(micros: impl Iterator<Item = u64>) -> Sorted {
    let mut latencies = Latencies::default();
    micros.for_each(|one| latencies.add(Duration::from_micros(one)));
    latencies.sorted()
}

#[test]
fn a_percentile_is_the_least_value_that_so_many_do_not_exceed() {
    let hundred = sorted((1..=100).rev());
    assert_eq!([500, 990, 999, 1000].map(|share| hundred.per_mille(share)), [50, 99, 100, 100]);
    assert_eq!([0, 500, 1000].map(|share| sorted([7].into_iter()).per_mille(share)), [7, 7, 7]);
    assert_eq!(sorted([].into_iter()).per_mille(500), 0);
}

#[test]
fn a_schedule_has_as_many_as_the_rate_says_and_does_not_drift() {
    let due: Vec<_> = schedule(300.0, Duration::from_secs(10)).collect();
    assert_eq!(due.len(), 3000);
    assert_eq!([due[0], due[1500], due[2997]], [0.0, 5.0, 9.99].map(Duration::from_secs_f64));
}

#[tokio::test]
async fn what_could_not_be_sent_when_it_was_due_is_late_from_then_on() {
    let start = Instant::now();
    let pace = Pace::open(1000.0, Duration::from_millis(5));
    // The one connection is busy for longer than the whole run.
    thread::sleep(Duration::from_millis(20));
    let mut late = Vec::new();
    while let Some(due) = pace.next().await {
        assert_eq!(due.number, late.len() as u64);
        late.push(start.elapsed() - due.since.duration_since(start));
    }
    assert_eq!(late.len(), 5);
    assert!(late.iter().all(|late| *late >= Duration::from_millis(15)), "{late:?}");
}

#[tokio::test]
async fn a_closed_loop_ends_after_so_many_requests() {
    let pace = Pace::closed(2, Duration::from_secs(60));
    assert_eq!([pace.next().await, pace.next().await].map(|due| due.unwrap().number), [0, 1]);
    assert!(pace.next().await.is_none());
}

#[test]
fn errors_are_counted_and_the_first_is_told() {
    let errors = Errors::default();
    assert_eq!(errors.told(), (0, None));
    errors.add("answered 401");
    errors.add("answered 502");
    assert_eq!(errors.told(), (2, Some("answered 401".into())));
}

#[test]
fn the_time_of_a_process_counts_its_ended_children_and_its_name_may_hold_anything() {
    let line = "42 (a) b (c) S 7 42 42 0 -1 4194560 900 0 0 0 123 45 6 7 20 0 3 0 100 1000 200 18446744073709551615";
    assert_eq!(Stat::read(line), Some(Stat { parent: 7, user: 129, system: 52 }));
    assert_eq!(Stat::read("42 (cut) S 7"), None);
}

#[test]
fn memory_is_read_by_its_name() {
    let status = "Name:\tsidebearer\nVmHWM:\t   12345 kB\nVmRSS:\t    9876 kB\n";
    assert_eq!((kib(status, "VmRSS:"), kib(status, "VmHWM:"), kib(status, "VmSwap:")), (9876, 12345, 0));
}

#[test]
fn the_usage_of_this_process_is_seen() {
    let usage = Usage::of(std::process::id()).unwrap();
    assert!(usage.rss_kib > 0 && usage.peak_rss_kib >= usage.rss_kib);
    assert!(Usage::of(u32::MAX).is_err());
}
