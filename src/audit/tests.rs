//! What the trail says, and what becomes of it when its disk is full, slow, or its file is gone.

use std::fs;
use std::os::unix::fs::{MetadataExt, symlink};
use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::*;

fn facts(path: &str) -> Facts {
    Facts {
        at: SystemTime::UNIX_EPOCH + Duration::from_millis(1_767_323_045_678),
        request: 7,
        attempt: 1,
        agent: Some("researcher".into()),
        user: "alice".parse().unwrap(),
        provider: "github".parse().unwrap(),
        subject: Subject::Client,
        generation: 3,
        route: "routes[0] api.test".into(),
        method: Method::GET,
        host: Authority::parse("api.test:443", None).unwrap(),
        path: path.into(),
    }
}

fn open(path: &Path, required: bool) -> Audit {
    Audit::open(&Wanted { place: Place::File(path.into()), required }).unwrap()
}

async fn used(audit: &Audit, path: &str) {
    audit.begin(facts(path)).await.unwrap().answered(StatusCode::OK);
}

fn lines(path: &Path) -> Vec<Value> {
    fs::read_to_string(path).unwrap().lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

fn paths(path: &Path) -> Vec<String> {
    lines(path)
        .iter()
        .map(|line| format!("{} {}", line["event"].as_str().unwrap(), line["path"].as_str().unwrap()))
        .collect()
}

/// Waits for what the thread does.
async fn until(what: impl Fn() -> bool) {
    let soon = Instant::now() + Duration::from_secs(30);
    while !what() {
        assert!(Instant::now() < soon, "it did not happen in time");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// A trail whose disk is full, and which gets room again.
struct Full {
    folder: TempDir,
}

impl Full {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        symlink("/dev/full", folder.path().join("audit")).unwrap();
        Self { folder }
    }

    fn audit(&self) -> std::path::PathBuf {
        self.folder.path().join("audit")
    }

    fn gets_room(&self) {
        symlink(self.folder.path().join("room"), self.folder.path().join("new")).unwrap();
        fs::rename(self.folder.path().join("new"), self.audit()).unwrap();
    }
}

#[tokio::test]
async fn a_line_says_who_used_which_credential_where_and_what_came_of_it() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit");
    let audit = open(&file, false);
    used(&audit, "/user").await;
    audit.finish().await;
    assert_eq!(file.metadata().unwrap().mode() & 0o777, 0o600);
    let text = fs::read_to_string(&file).unwrap();
    let run = serde_json::from_str::<Value>(&text).unwrap()["run"].as_str().unwrap().to_owned();
    let took = text.split("\"took_ms\":").nth(1).unwrap().trim_end();
    assert_eq!(
        text,
        format!(r#"{{"time":"2026-01-02T03:04:05.678Z","run":"{run}","seq":1,"event":"use","request":7,"try":1,"#)
            + r#""agent":"researcher","user":"alice","provider":"github","credential":"client","generation":3,"#
            + r#""route":"routes[0] api.test","method":"GET","host":"api.test:443","path":"/user","sent":true,"#
            + &format!("\"status\":200,\"outcome\":\"answered\",\"took_ms\":{took}\n")
    );
    assert_eq!(run.len(), 16);
    assert_eq!(audit.lines(), Lines { written: 1, failed: 0, waiting: 0, up: true });
}

#[tokio::test]
async fn nothing_in_a_line_is_hidden_and_a_long_path_is_cut() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit");
    let audit = open(&file, false);
    used(&audit, "/a\n\"\\\u{7f}\u{85}\u{61c}\u{202e}\u{2028}\u{e0041}é").await;
    used(&audit, &format!("/{}é{}", "a".repeat(1022), "b".repeat(9000))).await;
    audit.finish().await;
    let text = fs::read_to_string(&file).unwrap();
    assert!(text.contains(r#""path":"/a\n\"\\\u007f\u0085\u061c\u202e\u2028\udb40\udc41é","#), "{text}");
    assert_eq!(lines(&file)[1]["path"], format!("/{}…", "a".repeat(1022)));
}

#[tokio::test]
async fn who_hangs_up_has_used_the_token_and_who_was_never_connected_has_not() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit");
    let audit = open(&file, false);
    drop(audit.begin(facts("/gone")).await.unwrap());
    audit.begin(facts("/closed")).await.unwrap().failed("connection_terminated", None, true);
    audit.begin(facts("/refused")).await.unwrap().failed("connection_refused", None, false);
    audit.finish().await;
    let told: Vec<_> =
        lines(&file).iter().map(|line| format!("{} {} {}", line["path"], line["outcome"], line["status"])).collect();
    assert_eq!(told, [r#""/gone" "agent_gone" null"#, r#""/closed" "connection_terminated" null"#]);
}

#[tokio::test]
async fn a_full_disk_stops_nobody_and_what_it_could_not_take_follows() {
    let disk = Full::new();
    let audit = open(&disk.audit(), false);
    for number in 0..300 {
        used(&audit, &format!("/{number}")).await;
    }
    // A disk that is full is told before a line is lost to it.
    until(|| audit.lines() == Lines { written: 0, failed: 0, waiting: 300, up: false }).await;
    disk.gets_room();
    until(|| audit.lines() == Lines { written: 300, failed: 0, waiting: 0, up: true }).await;
    audit.finish().await;
    let seqs: Vec<_> = lines(&disk.audit()).iter().map(|line| line["seq"].as_u64().unwrap()).collect();
    assert_eq!(seqs, (1..=300).collect::<Vec<_>>());
}

#[tokio::test]
async fn lines_beyond_what_can_wait_are_lost_and_counted_and_leave_a_gap() {
    let disk = Full::new();
    let audit = open(&disk.audit(), false);
    for number in 0..10_000 {
        used(&audit, &format!("/{number}")).await;
    }
    let failed = audit.lines().failed;
    assert!((1..=10_000 - 8192).contains(&failed), "{failed}");
    disk.gets_room();
    until(|| audit.lines().written == 10_000 - failed).await;
    used(&audit, "/last").await;
    audit.finish().await;
    let last = lines(&disk.audit()).pop().unwrap();
    assert_eq!((&last["path"], last["seq"].as_u64()), (&Value::from("/last"), Some(10_001)));
}

#[tokio::test]
async fn a_disk_that_stays_full_does_not_hold_up_the_end() {
    let disk = Full::new();
    let audit = open(&disk.audit(), false);
    used(&audit, "/a").await;
    used(&audit, "/b").await;
    audit.finish().await;
    assert_eq!(audit.lines(), Lines { written: 0, failed: 2, waiting: 0, up: false });
}

#[tokio::test]
async fn a_required_trail_has_a_use_before_it_begins_or_refuses_it() {
    let disk = Full::new();
    let audit = open(&disk.audit(), true);
    for _ in 0..3 {
        assert_eq!(audit.begin(facts("/refused")).await.err(), Some(Unavailable));
    }
    disk.gets_room();
    // Who comes next finds out by itself, once it is looked where the file is.
    while audit.begin(facts("/waits")).await.is_err() {
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    let mut use_ = audit.begin(facts("/begun")).await.unwrap();
    assert_eq!(paths(&disk.audit()).last().unwrap(), "intent /begun");
    assert_eq!(lines(&disk.audit()).last().unwrap().get("status"), None);
    use_.failed("connection_refused", None, false);
    drop(use_);
    audit.finish().await;
    let last = lines(&disk.audit()).pop().unwrap();
    let end = [&last["event"], &last["sent"], &last["outcome"], &last["path"]].map(Value::to_string).join(" ");
    assert_eq!(end, r#""use" false "connection_refused" "/begun""#);
    assert!(!paths(&disk.audit()).iter().any(|line| line.contains("/refused")));
}

#[tokio::test]
async fn a_file_that_was_moved_away_is_made_anew_when_told_and_soon_without() {
    let folder = tempfile::tempdir().unwrap();
    let (file, first, second) = (folder.path().join("audit"), folder.path().join("1"), folder.path().join("2"));
    let audit = open(&file, false);
    used(&audit, "/one").await;
    until(|| audit.lines().written == 1).await;
    fs::rename(&file, &first).unwrap();
    audit.reopen();
    used(&audit, "/two").await;
    until(|| audit.lines().written == 2).await;
    fs::rename(&file, &second).unwrap();
    tokio::time::sleep(Duration::from_millis(1100)).await;
    used(&audit, "/three").await;
    audit.finish().await;
    assert_eq!([&first, &second, &file].map(|file| paths(file)), [["use /one"], ["use /two"], ["use /three"]]);
}

#[tokio::test]
async fn a_line_that_was_cut_off_spoils_none_that_follows() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit");
    fs::write(&file, "{\"time\":\"2026-").unwrap();
    let audit = open(&file, false);
    used(&audit, "/whole").await;
    audit.finish().await;
    let text = fs::read_to_string(&file).unwrap();
    let (torn, whole) = text.split_once('\n').unwrap();
    assert_eq!(torn, "{\"time\":\"2026-");
    assert_eq!(serde_json::from_str::<Value>(whole).unwrap()["path"], "/whole");
}

#[tokio::test]
async fn two_that_write_one_file_do_not_mix_their_lines() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("audit");
    let both = [open(&file, false), open(&file, true)];
    let writes = both.iter().map(|audit| async move {
        for number in 0..200 {
            used(audit, &format!("/{number}/{}", "x".repeat(900))).await;
        }
        audit.finish().await;
    });
    futures_util::future::join_all(writes).await;
    let mut runs: Vec<_> = lines(&file).iter().map(|line| line["run"].to_string()).collect();
    assert_eq!(runs.len(), 600);
    runs.sort();
    runs.dedup();
    assert_eq!(runs.len(), 2);
}
