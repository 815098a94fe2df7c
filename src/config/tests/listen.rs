//! Where a sidecar may listen, for whom, and within which limits.

use super::*;

/// Each place, with whom it speaks for.
pub(super) fn shown(settings: &Settings) -> Vec<String> {
    all(&settings.listen)
}

fn all(listeners: &[(Place, Entrance)]) -> Vec<String> {
    let names = |entrance: &Entrance| {
        let agent = entrance.agent.as_ref().map(|agent| format!(" {}", agent.name)).unwrap_or_default();
        let user = entrance.user.as_ref().map(|user| format!(" for {user}")).unwrap_or_default();
        agent + &user
    };
    listeners.iter().map(|(place, entrance)| format!("{place}{}", names(entrance))).collect()
}

const AGENTS: &str = "\
agents:
  - {name: researcher, secret: 'of researcher 16', users: [alice, bob]}
  - {name: secretary, secret: 'of the secretary', users: [alice]}
";

#[test]
fn a_listener_is_a_place_and_may_say_who_comes_in() {
    let one = "listen: {address: '[::1]:1', user: alice}\n";
    assert_eq!(shown(&settings(one)), ["[::1]:1 for alice"]);
    let text = format!(
        "{AGENTS}listen:
  - 0.0.0.0:3128
  - 127.0.0.1:0
  - 127.0.0.1:0
  - unix:/run/a.sock
  - {{address: 'unix:~/b.sock', user: bob, mode: '660'}}
  - {{address: 127.0.0.1:2, agent: researcher, user: bob}}
  - {{address: 127.0.0.1:3, agent: secretary}}
"
    );
    let settings = settings(&text);
    let expected = [
        "0.0.0.0:3128",
        "127.0.0.1:0",
        "127.0.0.1:0",
        "unix:/run/a.sock",
        "unix:/home/ada/b.sock for bob",
        "127.0.0.1:2 researcher for bob",
        "127.0.0.1:3 secretary for alice",
    ];
    assert_eq!(shown(&settings), expected);
    let modes = settings.listen.iter().filter_map(|(place, _)| match place {
        Place::Unix { mode, .. } => Some(*mode),
        Place::Tcp(_) => None,
    });
    assert_eq!(modes.collect::<Vec<_>>(), [0o600, 0o660]);
}

#[test]
fn a_listener_that_lets_in_whom_it_should_not_is_refused_where_it_stands() {
    // LST-013, LST-014
    let text = format!(
        "{AGENTS}listen:
  - {{address: 0.0.0.0:1, user: alice}}
  - {{address: 127.0.0.1:2, agent: researcher}}
  - {{address: 127.0.0.1:3, agent: secretary, user: bob}}
  - {{address: 127.0.0.1:4, agent: secretery}}
  - {{address: 127.0.0.1:5, mode: '0600'}}
  - {{address: 'unix:/run/a.sock', mode: 'rw'}}
  - unix:run/a.sock
  - {{user: alice}}
  - 127.0.0.1:5
  - {{address: 127.0.0.1:6, usr: alice}}
  - 17
  - unix:/{}
",
        "x".repeat(107)
    );
    let expected = "\
proxy.yaml:5:15: listen[0].address: other machines could reach this address
hint: a listener with a `user` asks nobody who they are; let it listen on `127.0.0.1`
proxy.yaml:6:6: listen[1]: its agent acts for more than one user, and `user` is missing
hint: write for whom its callers act
proxy.yaml:7:52: listen[2].user: the agent `secretary` may not act for `bob`
hint: add the user to the agent's `users`
proxy.yaml:8:35: listen[3].agent: no agent is named `secretery`
hint: did you mean `secretary`?
proxy.yaml:9:34: listen[4].mode: only the file of a Unix socket has a mode
hint: leave it out
proxy.yaml:10:41: listen[5].mode: expected a file's mode in quotes, as in `\"0660\"`
proxy.yaml:11:5: listen[6]: the path of a socket begins with `/` or `~/`
proxy.yaml:12:6: listen[7]: `address` is missing
hint: write where it listens, as in `127.0.0.1:3138`
proxy.yaml:13:5: listen[8]: another listener is at this place
hint: give each its own port or path
proxy.yaml:14:28: listen[9].usr: unknown key
hint: did you mean `user`?
proxy.yaml:15:5: listen[10]: expected an address and a port, as in `127.0.0.1:3128`, or a socket, as in \
                    `unix:/run/sidebearer.sock`, or a mapping with an `address`, found a number
proxy.yaml:16:5: listen[11]: the path of a socket has at most 107 bytes
hint: choose a shorter folder, as `/run/sidebearer`";
    assert_eq!(mistakes(&text), expected);
    assert_eq!(
        mistakes("listen: []"),
        "proxy.yaml:1:1: listen: an empty list lets nobody in\nhint: leave out `listen` for `127.0.0.1:3128`"
    );
}

#[test]
fn redirected_connections_come_in_where_only_this_machine_leads_them_and_as_the_configuration_says() {
    // LST-013, LST-014, CLR-003
    assert!(settings("").transparent.is_empty());
    assert_eq!(all(&settings("transparent: []").transparent), [""; 0]);
    assert_eq!(all(&settings("transparent: 127.0.0.1:3131").transparent), ["127.0.0.1:3131"]);
    let text = format!(
        "{AGENTS}transparent: ['[::1]:1', {{address: 127.0.0.1:0, user: bob}}, {{address: 127.0.0.1:2, agent: secretary}}]"
    );
    let said = mistakes(&text);
    assert_eq!(
        said,
        "proxy.yaml:4:15: transparent[0]: a redirected connection cannot show whose it is, and `agent` is missing
hint: write which of `agents` comes in here, and for which `user`"
    );
    let settings = settings(&text.replace("'[::1]:1'", "{address: '[::1]:1', agent: researcher, user: alice}"));
    let expected = ["[::1]:1 researcher for alice", "127.0.0.1:0 for bob", "127.0.0.1:2 secretary for alice"];
    assert_eq!(all(&settings.transparent), expected);

    let text = "transparent:
  - 0.0.0.0:3131
  - '[::]:1'
  - {address: 192.0.2.1:2, user: ada}
  - '[::ffff:127.0.0.1]:3'
  - unix:/run/a.sock
  - 127.0.0.1:3128
  - 127.0.0.1:5
  - 127.0.0.1:5
  - {address: 127.0.0.1:6, agent: nobody}
listen: 127.0.0.1:3128
";
    let elsewhere = "connections are redirected to an address of this machine that no other reaches";
    let hint = "hint: write `127.0.0.1:3131`; and `[::1]:3131` beside it, for IPv6";
    let taken = "another listener is at this place\nhint: give each its own port or path";
    let expected = [
        format!("proxy.yaml:2:5: transparent[0]: {elsewhere}\n{hint}"),
        format!("proxy.yaml:3:5: transparent[1]: {elsewhere}\n{hint}"),
        format!("proxy.yaml:4:15: transparent[2].address: {elsewhere}\n{hint}"),
        format!("proxy.yaml:5:5: transparent[3]: {elsewhere}\n{hint}"),
        format!("proxy.yaml:6:5: transparent[4]: no connection is redirected to a Unix socket\n{hint}"),
        format!("proxy.yaml:7:5: transparent[5]: {taken}"),
        format!("proxy.yaml:9:5: transparent[7]: {taken}"),
        "proxy.yaml:10:35: transparent[8].agent: no agent is named `nobody`\n\
         hint: there are none: add it under `agents`, or leave this out"
            .to_owned(),
    ];
    assert_eq!(mistakes(text), expected.join("\n"));
}

#[test]
fn each_limit_is_set_by_its_name_and_none_can_make_a_sidecar_useless() {
    let text =
        "limits: {head_timeout: 1s, idle_timeout: 2s, body_timeout: 3s, write_timeout: 4s, handshake_timeout: 5s,
  connect_timeout: 6s, upstream_handshake_timeout: 7s, max_head: 8KiB, max_headers: 9, max_connections: 10}";
    let seconds = Duration::from_secs;
    let expected = Limits {
        head_timeout: seconds(1),
        idle_timeout: seconds(2),
        body_timeout: seconds(3),
        write_timeout: seconds(4),
        handshake_timeout: seconds(5),
        connect_timeout: seconds(6),
        upstream_handshake_timeout: seconds(7),
        max_head: 8 << 10,
        max_headers: 9,
        max_connections: 10,
    };
    assert_eq!(settings(text).limits, expected);
    let text = "limits: {head_timeout: 0s, max_head: 4KiB, max_headers: 10001, max_connections: 0}";
    let expected = "\
proxy.yaml:1:24: limits.head_timeout: nothing is done in no time
hint: write a longer one, as `10s`
proxy.yaml:1:38: limits.max_head: a head has at least 8KiB and at most 16MiB
hint: write `256KiB`
proxy.yaml:1:57: limits.max_headers: this is more than 10000
hint: write a smaller number
proxy.yaml:1:81: limits.max_connections: expected a whole number from 1 on";
    assert_eq!(mistakes(text), expected);
}
