//! `doctor`, with runtimes made for it: what each does is known, and so is what must be said of it.

use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use reqwest::Certificate;
use rustix::fs::{CWD, FileType, Mode, mknodat};
use rustix::process::Signal;
use serde_json::Value;

use crate::world::program::{Ended, Home, Running, ended};
use crate::world::soon;

/// Which client of the fakes makes the call.
const KIND: &str = "DOCTOR_TEST_CLIENT";
const URL: &str = "DOCTOR_TEST_URL";

/// What the fakes run. No test by itself: it is this binary, which brings the TLS that a shell script has not.
#[tokio::test]
#[ignore = "the fakes of this module run it"]
async fn the_call_of_a_fake() {
    let (Ok(kind), Ok(url)) = (std::env::var(KIND), std::env::var(URL)) else { return };
    let _ = rustls::crypto::aws_lc_rs::default_provider().install_default();
    let roots = match kind.as_str() {
        "trusting" => std::fs::read(std::env::var("SSL_CERT_FILE").unwrap()).unwrap(),
        _ => Vec::new(),
    };
    // It looks at HTTPS_PROXY and NO_PROXY as curl does.
    let client = reqwest::Client::builder().tls_certs_only(Certificate::from_pem_bundle(&roots).unwrap());
    let _ = client.build().unwrap().get(url).send().await;
}

/// A folder for PATH, in a home without a configuration.
struct Machine {
    home: Home,
}

impl Machine {
    fn new() -> Self {
        let home = Home::with("");
        std::fs::remove_file(home.path("proxy.yaml")).unwrap();
        std::fs::create_dir(home.path("bin")).unwrap();
        Self { home }
    }

    /// A runtime that tells a version and makes its call like this.
    fn with(self, name: &str, call: &str) -> Self {
        let fake = format!("#!/bin/sh\n[ \"$1\" = --version ] && echo \"{name} 1.2.3\" && exit 0\n{call}\n");
        self.with_program(&format!("bin/{name}"), &fake)
    }

    /// One whose call is made by [`the_call_of_a_fake`].
    fn with_client(self, name: &str, kind: &str) -> Self {
        let this = std::env::current_exe().unwrap();
        let call = format!(
            "for last; do :; done\n{KIND}={kind} {URL}=$last exec {} --ignored --exact doctor::the_call_of_a_fake",
            this.display()
        );
        self.with(name, &call)
    }

    fn with_program(self, name: &str, text: &str) -> Self {
        std::fs::write(self.home.path(name), text).unwrap();
        std::fs::set_permissions(self.home.path(name), std::fs::Permissions::from_mode(0o755)).unwrap();
        self
    }

    fn command(&self, arguments: &[&str]) -> tokio::process::Command {
        let mut command = self.home.command(["doctor"].iter().chain(arguments));
        command.env("PATH", self.home.path("bin"));
        command
    }

    async fn doctor(&self, arguments: &[&str]) -> Ended {
        ended(self.command(arguments)).await
    }
}

#[tokio::test]
async fn each_runtime_is_told_with_what_helps() {
    let machine = Machine::new()
        .with_client("curl", "trusting")
        .with_client("wget", "distrusting")
        .with("git", "echo \"could not resolve\"; exit 128")
        .with_program("bin/gh", "#!/bin/sh\necho 'gh: cannot load libfoo.so' >&2; exit 127\n");
    let ended = machine.doctor(&[]).await;
    assert_eq!(
        ended.stdout,
        "curl 1.2.3  ok              HTTP/1.1
wget 1.2.3  no trust        it uses the proxy and does not trust the CA: received fatal alert: UnknownCA
    fix: wget takes its roots from ~/.wgetrc alone: add `ca_certificate = FILE` there, the file that SSL_CERT_FILE names; \
`sidebearer exec` does so by itself
git 1.2.3   goes direct     nothing of it came to the proxy
    fix: it does not look at HTTPS_PROXY; only a network rule keeps it from going direct
gh          does not start  gh: cannot load libfoo.so
    fix: run it by hand: it does not even tell its version
1 of 4 use the proxy and trust its CA
"
    );
    assert_eq!((ended.code, ended.stderr.as_str()), (1, ""));
}

#[tokio::test]
async fn a_script_reads_the_verdicts_as_json() {
    let machine =
        Machine::new().with_client("curl", "trusting").with_client("wget", "distrusting").with("git", "exit 1");
    let ended = machine.doctor(&["--json"]).await;
    let said: Value = serde_json::from_str(&ended.stdout).unwrap();
    let verdicts = said["runtimes"].as_array().unwrap().iter().map(|row| (&row["runtime"], &row["verdict"]));
    let verdicts: Vec<_> = verdicts.map(|(runtime, verdict)| format!("{runtime} {verdict}").replace('"', "")).collect();
    assert_eq!(verdicts, ["curl ok", "wget untrusted", "git direct"]);
    assert_eq!((ended.code, &said["ok"], &said["environment"]), (1, &false.into(), &serde_json::json!([])));

    let ended = Machine::new().with_client("curl", "trusting").doctor(&["--json"]).await;
    let said: Value = serde_json::from_str(&ended.stdout).unwrap();
    assert_eq!((ended.code, &said["ok"]), (0, &true.into()));
    let expected = serde_json::json!({
        "program": "curl", "runtime": "curl", "version": "1.2.3", "client": null, "client_version": null,
        "verdict": "ok", "detail": "HTTP/1.1", "fix": null,
    });
    assert_eq!(said["runtimes"][0], expected);
}

#[tokio::test]
async fn of_a_command_its_own_runtime_is_tried() {
    let node = "bin/node";
    let machine = Machine::new().with_client("node", "trusting").with("curl", "exit 1");
    let script = format!("#!{}\n", machine.home.path(node).display());
    let machine = machine.with_program("agent", &script);
    let ended = machine.doctor(&["--", "./agent", "--option"]).await;
    let node = machine.home.path(node).display().to_string();
    let expected = format!(
        "{node} 1.2.3 fetch  ok  HTTP/1.1\n{node} 1.2.3 https  ok  HTTP/1.1\n2 of 2 use the proxy and trust its CA\n"
    );
    assert_eq!((ended.code, ended.stdout), (0, expected));
}

#[tokio::test]
async fn a_program_of_its_own_is_not_guessed_at() {
    let machine = Machine::new().with_program("bin/agent", "\x7fELF");
    let ended = machine.doctor(&["--", "agent"]).await;
    let said = "agent  not tried  a program of its own: it cannot be tried from outside\nnothing could be tried\n";
    assert_eq!((ended.code, ended.stdout.as_str()), (1, said));
}

#[tokio::test]
async fn an_exception_for_a_routed_host_is_a_problem_though_every_runtime_is_well() {
    let machine = Machine { home: Home::with_provider() };
    std::fs::create_dir(machine.home.path("bin")).unwrap();
    let machine = machine.with_client("curl", "trusting");
    let mut command = machine.command(&[]);
    command.env("NO_PROXY", "internal.example,.test");
    let ended = ended(command).await;
    let expected = "curl 1.2.3  ok  HTTP/1.1
problem: NO_PROXY keeps calls to `api.test` from the proxy
    fix: take `.test` out of NO_PROXY and no_proxy
1 of 1 use the proxy and trust its CA
";
    assert_eq!((ended.code, ended.stdout.as_str()), (1, expected));
    assert_eq!(machine.doctor(&[]).await.code, 0);
}

#[tokio::test]
async fn as_it_is_the_environment_leads_nowhere_without_variables_and_to_the_sidecar_with_them() {
    let machine = Machine { home: Home::with_provider() };
    std::fs::create_dir(machine.home.path("bin")).unwrap();
    let machine = machine.with_client("curl", "trusting");
    let unset = machine.doctor(&["--as-is"]).await;
    let expected = "curl 1.2.3  goes direct  nothing of it came to the proxy
problem: HTTPS_PROXY is not set
    fix: eval \"$(sidebearer env)\"
problem: SSL_CERT_FILE is not set
    fix: eval \"$(sidebearer env)\"
0 of 1 use the proxy and trust its CA
";
    assert_eq!((unset.code, unset.stdout.as_str()), (1, expected));

    let mut sidecar = machine.home.start(["run"]);
    let line: Value = serde_json::from_str(&sidecar.logs("\"listening\"").await).unwrap();
    let with = |no_proxy: &str| {
        let mut command = machine.command(&["--as-is"]);
        command.env("HTTPS_PROXY", format!("http://{}", line["address"].as_str().unwrap()));
        command.env("SSL_CERT_FILE", line["ca"].as_str().unwrap()).env("NO_PROXY", no_proxy);
        ended(command)
    };
    let well = with("localhost").await;
    let expected = "curl 1.2.3  ok  HTTP/1.1\n1 of 1 use the proxy and trust its CA\n";
    assert_eq!((well.code, well.stdout.as_str()), (0, expected));
    let excepted = with("*").await;
    let expected = "curl 1.2.3  goes direct  nothing of it came to the proxy
problem: NO_PROXY is `*`, which keeps every call from the proxy
    fix: take `*` out of NO_PROXY and no_proxy
0 of 1 use the proxy and trust its CA
";
    assert_eq!((excepted.code, excepted.stdout.as_str()), (1, expected));
}

#[tokio::test]
async fn of_a_command_that_is_run_everything_is_told_that_came_to_the_proxy() {
    let machine = Machine { home: Home::with_provider() };
    std::fs::create_dir(machine.home.path("bin")).unwrap();
    let machine = machine.with_client("agent", "distrusting");
    let mut command = machine.command(&["--run", "--", "sh", "-c", "echo mine; agent https://api.test/; exit 5"]);
    command.env("PATH", format!("{}:/usr/bin:/bin", machine.home.path("bin").display()));
    let distrusting = ended(command).await;
    let expected = "the command ended with 5, and this came to the proxy:
api.test:443  no trust   1 of 1 tunnels: received fatal alert: UnknownCA
";
    assert_eq!((distrusting.code, distrusting.stdout.as_str()), (1, expected));
    assert!(distrusting.stderr.contains("mine\n"), "{}", distrusting.stderr);

    std::fs::remove_file(machine.home.path("proxy.yaml")).unwrap();
    let mut command = machine.command(&["--run", "--json", "--", "true"]);
    command.env("PATH", "/usr/bin:/bin");
    let nothing = ended(command).await;
    let said: Value = serde_json::from_str(&nothing.stdout).unwrap();
    assert_eq!((nothing.code, said), (1, serde_json::json!({ "ok": false, "exit_code": 0, "hosts": [] })));
}

#[tokio::test]
async fn a_wrong_option_and_a_configuration_that_is_not_there_are_told_apart() {
    let machine = Machine::new();
    for wrong in [&["--jsn"][..], &["--run"], &["--run", "--as-is", "--", "true"]] {
        assert_eq!(machine.doctor(wrong).await.code, 2, "{wrong:?}");
    }
    assert_eq!(machine.doctor(&["--config", "none.yaml"]).await.code, 64);
}

#[tokio::test]
async fn what_doctor_has_started_ends_with_it() {
    let machine = Machine::new();
    let (fifo, never) = (machine.home.path("fifo"), machine.home.path("never"));
    for path in [&fifo, &never] {
        mknodat(CWD, path, FileType::Fifo, Mode::RUSR | Mode::WUSR, 0).unwrap();
    }
    // It waits, and so does what it has started; as long as one of them lives, the pipe has a writer. Neither is stopped:
    // the kernel itself ends stopped processes that nobody looks after any more.
    let waits = format!(
        "#!/bin/sh\nexec 3>{}\n/bin/sh -c 'echo ready >&3; read line <{never}' &\nread line <{never}\n",
        fifo.display(),
        never = never.display()
    );
    let machine = machine.with_program("bin/curl", &waits);
    let mut doctor = Running::of(machine.command(&[]));
    let mut pipe = soon(opened(&fifo)).await;
    doctor.gets(Signal::INT);
    assert_eq!(doctor.ends().await, 130);
    // A thread that this test does not wait for, should it wait in vain.
    let (closed, rest) = tokio::sync::oneshot::channel();
    std::thread::spawn(move || closed.send(pipe.read_to_string(&mut String::new()).unwrap()));
    assert_eq!(soon(rest).await.unwrap(), 0);
}

/// A pipe whose writer is ready.
async fn opened(fifo: &Path) -> BufReader<std::fs::File> {
    let fifo = fifo.to_owned();
    let opening = tokio::task::spawn_blocking(move || {
        let mut pipe = BufReader::new(std::fs::File::open(fifo).unwrap());
        let mut line = String::new();
        pipe.read_line(&mut line).unwrap();
        assert_eq!(line, "ready\n");
        pipe
    });
    opening.await.unwrap()
}
