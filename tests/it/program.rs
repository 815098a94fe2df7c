//! The command line: what is printed where, exit codes, and signals.

use std::process::Stdio;
use std::sync::Arc;

use rustix::process::Signal;
use rustls::RootCertStore;
use tokio::net::{TcpListener, TcpStream};

use crate::world::agent::Heard;
use crate::world::log::CANARY;
use crate::world::program::{Home, Running, ended};
use crate::world::raw::Raw;
use crate::world::{nobody, soon};

/// A sidecar that runs, and its address.
async fn sidecar(home: &Home) -> (Running, String) {
    let mut sidecar = home.start(["run"]);
    let line: serde_json::Value = serde_json::from_str(&sidecar.logs("\"listening\"").await).unwrap();
    let address = line["address"].as_str().unwrap().to_owned();
    (sidecar, address)
}

/// A blind tunnel through it to a server that does nothing.
async fn tunnel(address: &str) -> Raw {
    let idle = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let at = idle.local_addr().unwrap();
    tokio::spawn(async move {
        let (mut stream, _) = idle.accept().await.unwrap();
        let _ = tokio::io::copy(&mut stream, &mut tokio::io::sink()).await;
    });
    let mut tunnel =
        Raw::new(TcpStream::connect(address).await.unwrap(), Arc::new(RootCertStore::empty()), Heard::default());
    tunnel.says(format!("CONNECT {at} HTTP/1.1\r\n\r\n")).await;
    assert_eq!(tunnel.hears().await.status, 200);
    tunnel
}

#[tokio::test]
async fn check_prints_every_mistake_and_exits_64() {
    let home = Home::with("listen: 0.0.0.0:3128\nroutes:\n  - host: api.test\n    provider: nope\n");
    let ended = home.run(["check"]).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (64, ""));
    assert_eq!(
        ended.stderr,
        "proxy.yaml:1:9: listen: other machines could reach this address
hint: they could use your accounts; write `127.0.0.1:3128`, or say with `agents` who may
proxy.yaml:4:15: routes[0].provider: no provider is named `nope`
hint: add it under `providers`
"
    );
    for command in [&["run"][..], &["status"], &["env"], &["exec", "--", "true"]] {
        assert_eq!(home.run(command).await.code, 64, "{command:?}");
    }
}

#[tokio::test]
async fn check_says_what_each_route_grants() {
    // CFG-010
    let ended = Home::with_provider().run(["check"]).await;
    assert_eq!(
        (ended.code, ended.stdout.as_str()),
        (0, "proxy.yaml: 1 providers, 1 routes, no mistakes\n  api.test:443  ->  main []\n")
    );
}

#[tokio::test]
async fn a_connection_that_nothing_redirected_is_closed_and_the_log_says_what_leads_there() {
    // CLR-004
    let text = std::fs::read_to_string(Home::with_provider().path("proxy.yaml")).unwrap();
    let home = Home::with(&format!("{text}transparent: ['127.0.0.1:0', '[::1]:0']\n"));
    let mut sidecar = home.start(["run"]);
    let line: serde_json::Value = serde_json::from_str(&sidecar.logs("\"listening\"").await).unwrap();
    for address in line["transparent"].as_str().unwrap().split(", ") {
        let connection = soon(TcpStream::connect(address)).await.unwrap();
        let mut agent = Raw::new(connection, Arc::new(RootCertStore::empty()), Heard::default());
        assert_eq!(agent.hears_to_the_end().await, "");
        let line = sidecar.logs("not redirected").await;
        assert!(line.contains(address) && line.contains("HTTPS_PROXY names an address of `listen`"), "{line}");
    }
}

#[tokio::test]
async fn a_file_that_is_not_there_and_a_word_that_is_no_command_are_told_apart() {
    let home = Home::with("");
    assert_eq!(home.run(["check", "--config", "none.yaml"]).await.code, 64);
    assert_eq!(home.run(["fly"]).await.code, 2);
}

#[tokio::test]
async fn exec_ends_as_its_command_does() {
    let home = Home::with_provider();
    std::fs::write(home.path("data"), "").unwrap();
    for (command, code) in [
        (&["true"][..], 0),
        (&["sh", "-c", "exit 7"], 7),
        (&["sh", "-c", "kill -TERM $$"], 143),
        (&["sh", "-c", "kill -KILL $$"], 137),
        (&["no-such-program"], 127),
        (&["./data"], 126),
    ] {
        let ended = home.run(["exec", "--"].iter().chain(command)).await;
        assert_eq!(ended.code, code, "{command:?}: {}", ended.stderr);
    }
    let ended = home.run(["exec", "--", "no-such-program"]).await;
    let said = "error: cannot run `no-such-program`: No such file or directory (os error 2)";
    assert!(ended.stderr.lines().any(|line| line == said), "{}", ended.stderr);
}

#[tokio::test]
async fn exec_passes_a_signal_on() {
    let home = Home::with_provider();
    let script = "trap 'kill $!; exit 9' TERM; tail -f /dev/null & echo ready; wait";
    let mut running = home.start(["exec", "--", "sh", "-c", script]);
    running.says("ready").await;
    running.gets(Signal::TERM);
    assert_eq!(running.ends().await, 9);
}

#[tokio::test]
async fn a_command_gets_the_variables_and_standard_input_and_output() {
    let home = Home::with_provider();
    let ended =
        home.run_reading(["exec", "--", "sh", "-c", "cat; echo $HTTPS_PROXY $https_proxy $NO_PROXY"], "in\n").await;
    let (first, second) = ended.stdout.split_once('\n').unwrap();
    assert_eq!((ended.code, first), (0, "in"));
    let words: Vec<_> = second.split_whitespace().collect();
    assert!(words[0].starts_with("http://127.0.0.1:") && words[0] == words[1], "{second}");
    assert_eq!(words[2], "localhost,127.0.0.1,::1");
}

#[tokio::test]
async fn a_command_does_not_get_the_secrets_of_the_configuration() {
    // LEK-005
    let home = Home::with_provider();
    let environment = home.run(["exec", "--", "env"]).await.stdout;
    assert!(environment.contains("HOME=") && !environment.contains("SECRET="), "{environment}");
}

#[tokio::test]
async fn a_command_delivers_the_store_s_key_where_the_store_is_opened() {
    let home = Home::with_provider();
    let config = std::fs::read_to_string(home.path("proxy.yaml")).unwrap();
    let config = format!("{config}store: {{ key_command: [sh, keys.sh, '${{SECRET}}'] }}\n");
    std::fs::write(home.path("proxy.yaml"), config).unwrap();
    let key = "AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=";
    std::fs::write(home.path("keys.sh"), format!("echo run >>runs; [ -n \"$1\" ] && echo {key}\n")).unwrap();
    assert_eq!(home.run(["check"]).await.code, 0);
    assert!(!home.path("runs").exists());
    let import = ["import", "main", "--refresh-token-file", "-"];
    assert_eq!(home.run_reading(import, &format!("{CANARY}imported\n")).await.code, 0);
    assert_eq!(home.run(["store", "verify"]).await.code, 0);
    assert_eq!(std::fs::read_to_string(home.path("runs")).unwrap(), "run\nrun\n");
    assert!(!home.path(".config").exists());
    let environment = home.run(["exec", "--", "env"]).await.stdout;
    assert!(environment.contains("HOME=") && !environment.contains("SECRET="), "{environment}");

    std::fs::write(home.path("keys.sh"), format!("echo {key}; echo no key service, \"$1\", {key} >&2; exit 4\n"))
        .unwrap();
    let ended = home.run(["status"]).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (1, ""));
    assert_eq!(
        ended.stderr,
        "error: `store.key_command`: `sh` failed, exit status: 4
  | no key service, ***, ***=
hint: run `sh` by hand with the same arguments, as the sidecar's user
"
    );
}

#[tokio::test]
async fn no_process_shows_a_secret_in_its_arguments() {
    // LEK-005
    let home = Home::with_provider();
    home.run_reading(["import", "main", "--refresh-token-file", "-"], &format!("{CANARY}imported\n")).await;
    let processes = home.run(["exec", "--", "ps", "-eo", "args"]).await;
    assert!(processes.stdout.contains("sidebearer exec -- ps"), "{}", processes.stdout);
}

#[tokio::test]
async fn an_imported_token_is_in_the_status_and_opens() {
    // TOK-029
    let home = Home::with_provider();
    let arguments = ["import", "main", "--user", "ada", "--refresh-token-file", "-"];
    let imported = home.run_reading(arguments, &format!("{CANARY}imported\n")).await;
    assert_eq!(
        (imported.code, imported.stdout.as_str()),
        (0, "stored the refresh token of `ada` for `main`; the next call uses it\n")
    );
    let status = home.run(["status", "--json"]).await;
    let status: serde_json::Value = serde_json::from_str(&status.stdout).unwrap();
    let ada = &status[0];
    assert_eq!((&ada["provider"], &ada["user"], &ada["state"]), (&"main".into(), &"ada".into(), &"connected".into()));
    assert_eq!((&ada["generation"], status.as_array().unwrap().len()), (&1.into(), 1));

    let verified = home.run(["store", "verify"]).await;
    let (key, counts) = verified.stdout.split_once(": ").unwrap();
    assert_eq!((verified.code, key.len()), (0, "key 0123456789abcdef".len()), "{}", verified.stdout);
    assert_eq!(counts, "2 values, seals\n2 values, 2 open, 0 do not\n", "the token, and what tells a wrong key");
    let stored: Vec<u8> = files(&home.path(".local")).iter().flat_map(|path| std::fs::read(path).unwrap()).collect();
    assert!(!stored.is_empty() && !String::from_utf8_lossy(&stored).contains(CANARY), "it is stored in clear");
}

#[tokio::test]
async fn a_key_is_replaced_while_nobody_notices() {
    let home = Home::with_provider();
    let config = std::fs::read_to_string(home.path("proxy.yaml")).unwrap();
    let [old, new] = ["AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=", "ICEiIyQlJicoKSorLC0uLzAxMjM0NTY3ODk6Ozw9Pj8="];
    let with = |keys: &[&str]| {
        let keys = keys.join(", ");
        std::fs::write(home.path("proxy.yaml"), format!("{config}store: {{ keys: [{keys}] }}\n")).unwrap();
    };
    with(&[old]);
    for user in ["ada", "bob"] {
        let import = ["import", "main", "--user", user, "--refresh-token-file", "-"];
        home.run_reading(import, &format!("{CANARY}imported\n")).await;
    }
    with(&[new, old]);
    let counts = async || {
        let verified: serde_json::Value =
            serde_json::from_str(&home.run(["store", "verify", "--json"]).await.stdout).unwrap();
        let keys = verified["keys"].as_array().unwrap().clone();
        keys.into_iter().map(|key| (key["values"].as_u64().unwrap(), key["seals"] == true)).collect::<Vec<_>>()
    };
    assert_eq!(counts().await, [(0, true), (3, false)]);
    let rekeyed = home.run(["store", "rekey"]).await;
    assert_eq!((rekeyed.code, rekeyed.stdout.as_str()), (0, "3 values sealed anew, 0 left\n"));
    assert_eq!(counts().await, [(3, true), (0, false)]);
    let verified = home.run(["store", "verify"]).await.stdout;
    assert!(verified.contains(": 0 values, opens, and is needed no more\n"), "{verified}");
    with(&[new]);
    assert_eq!(counts().await, [(3, true)]);
    let again = home.run(["store", "rekey", "--json"]).await;
    let again_says: serde_json::Value = serde_json::from_str(&again.stdout).unwrap();
    assert_eq!((again.code, again_says), (0, serde_json::json!({ "resealed": 0, "behind": 0, "left": [] })));
    assert_eq!(home.run(["status", "--json"]).await.stdout.matches("\"connected\"").count(), 2);
    with(&[old]);
    assert_eq!(home.run(["store", "verify"]).await.code, 1);
}

#[tokio::test]
async fn a_store_is_moved_in_a_file_that_is_of_no_use_without_the_key() {
    // LEK-011
    let (old, new) = (Home::with_provider(), Home::with_provider());
    for user in ["ada", "bob"] {
        let import = ["import", "main", "--user", user, "--refresh-token-file", "-"];
        old.run_reading(import, &format!("{CANARY}imported\n")).await;
    }
    let warning = "warning: the sidecars of the old store must have stopped before those of the new one start, or both \
                   redeem the same refresh tokens, and the grants are lost\n";
    let exported = old.run(["store", "export", "grants.jsonl"]).await;
    let said = "exported 2 grants, 0 secrets, 0 generations of removed grants\n";
    assert_eq!((exported.code, exported.stdout.as_str(), exported.stderr.as_str()), (0, said, warning));
    let file = std::fs::read_to_string(old.path("grants.jsonl")).unwrap();
    assert!(!file.contains(CANARY));
    let again = old.run(["store", "export", "grants.jsonl"]).await;
    let said = "error: grants.jsonl: there is such a file already\nhint: name a new file\n";
    assert_eq!((again.code, again.stderr.as_str()), (1, said));
    for arguments in [&["store", "export"][..], &["store", "export", "-"]] {
        let shown = old.run(arguments).await;
        assert_eq!((shown.code, shown.stdout.lines().count(), shown.stderr.as_str()), (0, 4, warning));
    }

    // Nothing is made where the key is missing, or another one.
    let refused = new.run_reading(["store", "import", "-"], &file).await;
    assert_eq!(refused.code, 1);
    assert!(refused.stderr.contains("there is no key file at"), "{}", refused.stderr);
    assert!(!new.path(".local").exists() && !new.path(".config").exists());
    std::fs::create_dir_all(new.path(".config/sidebearer")).unwrap();
    std::fs::copy(old.path(".config/sidebearer/key"), new.path(".config/sidebearer/key")).unwrap();
    let cut = new.run_reading(["store", "import", "-"], &file[..file.len() - 9]).await;
    let said = "error: -: it was cut off: its last line is missing\n\
                hint: copy it again from where it was exported, or export it again\n";
    assert_eq!((cut.code, cut.stderr.as_str()), (1, said));
    assert!(!new.path(".local").exists());

    for said in [
        "imported 2 grants, 0 secrets, 0 generations of removed grants; 0 there already\n",
        "imported 0 grants, 0 secrets, 0 generations of removed grants; 2 there already\n",
    ] {
        let imported = new.run_reading(["store", "import", "-"], &file).await;
        assert_eq!((imported.code, imported.stdout.as_str(), imported.stderr.as_str()), (0, said, warning));
    }
    assert_eq!(new.run(["status", "--json"]).await.stdout, old.run(["status", "--json"]).await.stdout);

    let import = ["import", "main", "--user", "ada", "--refresh-token-file", "-"];
    new.run_reading(import, &format!("{CANARY}another\n")).await;
    let refused = new.run_reading(["store", "import", "-"], &file).await;
    let said = "error: the grant of user `ada` at `main` is there already, and is another one\n\
                hint: with `--replace`, what is in the file takes its place\n";
    assert_eq!((refused.code, refused.stderr.as_str()), (1, said));
    assert_eq!(new.run_reading(["store", "import", "--replace", "-"], &file).await.code, 0);
}

#[tokio::test]
async fn what_does_not_open_is_named_by_verify_and_rekey() {
    // TOK-025
    let home = Home::with_provider();
    let import = ["import", "main", "--user", "ada", "--refresh-token-file", "-"];
    home.run_reading(import, &format!("{CANARY}imported\n")).await;
    let database = rusqlite::Connection::open(home.path(".local/share/sidebearer/sidebearer.db")).unwrap();
    database.execute_batch("UPDATE grants SET refresh_token = zeroblob(70)").unwrap();
    drop(database);
    let said = "error: `refresh_token` of user `ada` at `main` is damaged\nhint: connect this user again\n";
    for (command, result) in [("verify", "2 values, 1 open, 1 do not\n"), ("rekey", "0 values sealed anew, 1 left\n")] {
        let ended = home.run(["store", command]).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (1, said), "{command}");
        assert!(ended.stdout.ends_with(result), "{}", ended.stdout);
    }
    let told: serde_json::Value = serde_json::from_str(&home.run(["store", "verify", "--json"]).await.stdout).unwrap();
    let fault = &told["faults"][0];
    assert_eq!(
        (&fault["user"], &fault["value"], &fault["code"]),
        (&"ada".into(), &"refresh_token".into(), &"store_value_corrupt".into())
    );
}

#[tokio::test]
async fn without_its_key_the_store_does_not_open() {
    // LEK-011, TOK-025
    let home = Home::with_provider();
    let import = ["import", "main", "--refresh-token-file", "-"];
    home.run_reading(import, &format!("{CANARY}imported\n")).await;
    std::fs::remove_file(home.path(".config/sidebearer/key")).unwrap();
    let verified = home.run(["store", "verify"]).await;
    assert_eq!(verified.code, 1);
    assert!(verified.stderr.contains("there is no key file at"), "{}", verified.stderr);
}

#[tokio::test]
async fn what_import_cannot_use_it_refuses() {
    let home = Home::with_provider();
    for input in ["", "\n", "two\nlines\n", "caf\u{e9}\n"] {
        let ended = home.run_reading(["import", "main", "--refresh-token-file", "-"], input).await;
        assert_eq!(
            (ended.code, ended.stderr.as_str()),
            (
                1,
                "error: - does not hold a refresh token\nhint: it must hold the token alone: one line of printable ASCII\n"
            )
        );
    }
    let ended = home.run_reading(["import", "nope", "--refresh-token-file", "-"], "x").await;
    assert_eq!(
        (ended.code, ended.stderr.as_str()),
        (1, "error: no provider is named `nope`\nhint: providers are `main`\n")
    );
}

#[tokio::test]
async fn schema_and_completions_are_for_machines() {
    let home = Home::with("");
    let schema: serde_json::Value = serde_json::from_str(&home.run(["schema"]).await.stdout).unwrap();
    assert!(schema["properties"]["routes"].is_object(), "{schema}");
    for shell in ["bash", "zsh", "fish"] {
        let ended = home.run(["completions", shell]).await;
        assert!(ended.code == 0 && ended.stdout.contains("refresh-token-file"), "{shell}");
    }
}

#[tokio::test]
async fn a_shell_takes_the_variables_as_they_are() {
    let odd = "it's $HOME `and` \\more";
    let home = Home::with(&format!("ca:\n  path: \"{}\"\nroutes: []\n", odd.replace('\\', "\\\\")));
    let variables = home.run(["env"]).await;
    assert_eq!(variables.code, 0, "{}", variables.stderr);
    let mut shell = tokio::process::Command::new("sh");
    shell.args(["-c", &format!("{}\nprintf %s \"$SSL_CERT_FILE\"", variables.stdout)]).current_dir(home.folder.path());
    let expected = home.folder.path().join(odd).join("bundle.pem");
    assert_eq!(ended(shell).await.stdout, expected.to_str().unwrap());
    let json: serde_json::Value = serde_json::from_str(&home.run(["env", "--shell", "json"]).await.stdout).unwrap();
    assert_eq!(json["SSL_CERT_FILE"], expected.to_str().unwrap());
}

#[tokio::test]
async fn the_variables_of_an_agent_name_a_user_whom_it_acts_for() {
    // LST-013
    let home = Home::with(
        "agents:
  - {name: one, secret: 0123456789abcdef, users: [alice]}
  - {name: two, secret: fedcba9876543210, users: [bob, default]}
  - {name: all, secret: 0123456789abcdeg, users: ['*']}
routes: []
",
    );
    let told = async |words: &[&str]| {
        let ended = home.run(&[&["env", "--shell", "json"], words].concat()).await;
        let json: serde_json::Value = serde_json::from_str(&ended.stdout).unwrap_or_default();
        json["HTTPS_PROXY"].as_str().map_or(ended.stderr, str::to_owned)
    };
    for (words, expected) in [
        (&["--agent", "one"][..], "http://alice:0123456789abcdef@127.0.0.1:3128"),
        (&["--agent", "two"], "http://default:fedcba9876543210@127.0.0.1:3128"),
        (&["--agent", "two", "--user", "bob"], "http://bob:fedcba9876543210@127.0.0.1:3128"),
        (&["--agent", "all", "--user", "carol"], "http://carol:0123456789abcdeg@127.0.0.1:3128"),
    ] {
        assert_eq!(told(words).await, expected);
    }
    let said = told(&["--agent", "two", "--user", "alice"]).await;
    let expected =
        "error: the agent `two` does not act for `alice`\nhint: add `--user`: its users are `bob`, `default`\n";
    assert!(said.ends_with(expected), "{said}");
}

#[tokio::test]
async fn a_sidecar_that_is_told_to_stop_ends_with_its_last_connection() {
    // TOK-044
    let home = Home::with_provider();
    let (mut sidecar, address) = sidecar(&home).await;
    let mut tunnel = tunnel(&address).await;
    sidecar.gets(Signal::TERM);
    sidecar.logs("a second signal stops at once").await;
    tunnel.says_end().await;
    drop(tunnel);
    assert!(sidecar.logs("\"stopped\"").await.contains("\"clean\":true"));
    assert_eq!(sidecar.ends().await, 0);
}

#[tokio::test]
async fn a_second_signal_stops_it_at_once() {
    let home = Home::with_provider();
    let (mut sidecar, address) = sidecar(&home).await;
    let _tunnel = tunnel(&address).await;
    sidecar.gets(Signal::TERM);
    sidecar.logs("a second signal stops at once").await;
    sidecar.gets(Signal::INT);
    assert_eq!(sidecar.ends().await, 1);
}

#[tokio::test]
async fn what_is_still_open_when_the_time_to_drain_is_over_is_cut_and_its_exit_code_says_so() {
    let home = Home::with_provider();
    let config = std::fs::read_to_string(home.path("proxy.yaml")).unwrap();
    std::fs::write(home.path("proxy.yaml"), format!("drain: 200ms\n{config}")).unwrap();
    let (mut sidecar, address) = sidecar(&home).await;
    let mut tunnel = tunnel(&address).await;
    sidecar.gets(Signal::TERM);
    tunnel.hears_to_the_end().await;
    assert!(sidecar.logs("\"stopped\"").await.contains("\"clean\":false"));
    assert_eq!(sidecar.ends().await, 1);
}

#[tokio::test]
async fn a_sidecar_that_waits_for_its_store_is_told_to_stop_like_any_other() {
    // As a container's first process, it gets no signal that it does not listen for.
    let (_held, nobody) = nobody();
    let home = Home::with(&format!(
        "listen: 127.0.0.1:0\nadmin: off\nhealth: off\nstore:\n  url: postgres://ada@{nobody}/db?sslmode=disable\n  \
         keys: [AAECAwQFBgcICQoLDA0ODxAREhMUFRYXGBkaGxwdHh8=]\n"
    ));
    let mut sidecar = home.start(["run"]);
    sidecar.logs("the store is waited for").await;
    sidecar.gets(Signal::TERM);
    sidecar.logs("stopped before it had started").await;
    assert_eq!(sidecar.ends().await, 0);
}

#[tokio::test]
async fn a_sidecar_that_runs_out_of_descriptors_goes_on_when_there_are_some_again() {
    // LST-016
    let home = Home::with_provider();
    let mut sidecar = Running::of(limited(&home, "-n 64"));
    let line: serde_json::Value = serde_json::from_str(&sidecar.logs("\"listening\"").await).unwrap();
    let address = line["address"].as_str().unwrap().to_owned();
    let mut connections = Vec::new();
    for _ in 0..100 {
        connections.push(TcpStream::connect(&address).await.unwrap());
    }
    let said = sidecar.logs("cannot accept connections").await;
    assert!(said.contains("raise the limit of open files"), "{said}");
    drop(connections);
    sidecar.logs("connections are accepted again").await;
    tunnel(&address).await;
    sidecar.gets(Signal::TERM);
    assert_eq!(sidecar.ends().await, 0);
}

/// `run` under a limit of the shell's `ulimit`.
fn limited(home: &Home, limit: &str) -> tokio::process::Command {
    let mut shell = home.command([""; 0]);
    let program = shell.as_std().get_program().to_owned();
    let mut command = tokio::process::Command::new("sh");
    command.args(["-c", &format!("ulimit {limit}; exec \"$0\" run")]).arg(program);
    command.current_dir(home.folder.path()).env_clear();
    command.envs(shell.as_std_mut().get_envs().filter_map(|(name, value)| Some((name, value?))));
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    command
}

#[cfg(target_os = "linux")]
#[tokio::test]
async fn a_sidecar_takes_all_descriptors_and_leaves_no_core_and_its_command_is_as_without_it() {
    // LEK-005
    let home = Home::with_provider();
    let mut sidecar = Running::of(limited(&home, "-Sn 70"));
    sidecar.logs("\"listening\"").await;
    let limits = std::fs::read_to_string(format!("/proc/{}/limits", sidecar.id())).unwrap();
    let soft_and_hard = |name: &str| {
        let line = limits.lines().find(|line| line.starts_with(name)).unwrap();
        line[26..].split_whitespace().take(2).map(str::to_owned).collect::<Vec<_>>()
    };
    assert_eq!(soft_and_hard("Max core file size")[0], "0");
    let files = soft_and_hard("Max open files");
    assert!(files[0] == files[1] && files[0] != "70", "{files:?}");

    let asks = ["sh", "-c", "ulimit -Sn; ulimit -Sc"];
    let without = ended(plain(&asks)).await.stdout;
    let mut within = vec!["exec", "--"];
    within.extend(asks);
    assert_eq!(home.run(within).await.stdout, without);
}

fn plain(command: &[&str]) -> tokio::process::Command {
    let mut plain = tokio::process::Command::new(command[0]);
    plain.args(&command[1..]);
    plain
}

#[tokio::test]
async fn a_port_that_is_taken_is_told() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = taken.local_addr().unwrap();
    let ended = Home::with(&format!("listen: {address}\nroutes: []\n")).run(["run"]).await;
    let said = format!(
        "error: cannot listen on {address}: Address already in use (os error 98)\n\
         hint: another program, perhaps another sidecar, listens there: stop it, or change `listen`\n"
    );
    assert!(ended.code == 1 && ended.stderr.ends_with(&said), "{}", ended.stderr);
}

#[tokio::test]
async fn the_demo_gives_its_command_the_variables() {
    let home = Home::with("");
    let script = "echo $SIDEBEARER_DEMO_URL $HTTPS_PROXY; cat $SSL_CERT_FILE; exit 3";
    let ended = home.run(["demo", "--", "sh", "-c", script]).await;
    assert!(ended.stdout.starts_with("https://api.test/me http://127.0.0.1:"), "{}", ended.stdout);
    assert!(ended.code == 3 && ended.stdout.contains("BEGIN CERTIFICATE"), "{ended:?}");
}

#[tokio::test]
async fn the_demo_survives_a_401_and_no_proxy_of_the_environment_is_asked() {
    // LST-003
    let home = Home::with("");
    let mut command = home.command(["demo"]);
    for name in ["HTTPS_PROXY", "https_proxy", "ALL_PROXY", "HTTP_PROXY"] {
        command.env(name, "http://127.0.0.1:1");
    }
    let mut demo = Running::of(command);
    let story = demo.says("Ctrl-C ends it").await;
    let answers: Vec<_> = story.iter().filter(|line| line.contains("agent     GET")).collect();
    let statuses: Vec<_> = answers.iter().map(|line| line.split(" -> ").nth(1).unwrap().get(..3).unwrap()).collect();
    assert_eq!(statuses, ["401", "200", "200", "200", "403"]);
    assert!(story.iter().any(|line| line.contains("sent twice")), "{story:?}");
    soon(async { demo.gets(Signal::INT) }).await;
    assert_eq!(demo.ends().await, 0);
}

/// All files below a folder.
fn files(folder: &std::path::Path) -> Vec<std::path::PathBuf> {
    let entries = std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    entries.flat_map(|path| if path.is_dir() { files(&path) } else { vec![path] }).collect()
}

#[tokio::test]
async fn a_browsers_database_needs_nss_own_tool() {
    let home = Home::with_provider();
    let mut command = home.command(["exec", "--nss", "browser/.pki/nssdb", "--", "true"]);
    command.env("PATH", "");
    let ended = ended(command).await;
    let own = ended.stderr.lines().filter(|line| !line.starts_with('{')).collect::<Vec<_>>();
    assert_eq!(ended.code, 1);
    assert_eq!(
        own,
        [
            "error: cannot run `certutil`: No such file or directory (os error 2)",
            "hint: install it: Debian and Ubuntu have it in `libnss3-tools`, Fedora in `nss-tools`",
        ]
    );
}
