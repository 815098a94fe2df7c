//! `sidebearer connect` and `sidebearer disconnect`, in a terminal beside a sidecar that runs.

use serde_json::json;
use url::Url;

use crate::world::answer::answer;
use crate::world::browser::Browser;
use crate::world::program::{Running, ended};
use crate::world::provider::refused;
use crate::world::{Setup, World};

/// The command, waiting for a browser; the address at the provider, and a browser that will end at the command.
async fn waiting(world: &World, arguments: &[&str]) -> (Running, Url, Browser) {
    let mut command = Running::of(world.program(&[&["connect", "main", "--no-browser"], arguments].concat()));
    let asked: Url = command.logs("open ").await.strip_prefix("open ").unwrap().parse().unwrap();
    let redirect_uri = asked.query_pairs().find(|(name, _)| name == "redirect_uri").unwrap().1.into_owned();
    let redirect_uri: Url = redirect_uri.parse().unwrap();
    let at = redirect_uri.socket_addrs(|| None).unwrap()[0];
    assert!(at.ip().is_loopback());
    (command, asked, world.browser_at(at))
}

#[tokio::test]
async fn a_consent_in_a_terminal_frees_the_request_that_waits() {
    // OAU-010
    let world = Setup::consenting().provider("on_missing: {wait: 120s}").start().await;
    let consent = async {
        world.says_who_is_missing(1).await;
        let (mut command, asked, mut browser) = waiting(&world, &[]).await;
        let page = browser.comes_back(&world.issued.says_yes(&asked)).await;
        assert_eq!((page.reply.status, page.heading()), (200, "Main is connected".to_owned()));
        assert_eq!(page.reply.header("x-frame-options"), Some("DENY"));
        let said = command.says("connected").await;
        assert_eq!(said, ["connected `main` for `default`: read write; the token is good for 60 min"]);
        assert_eq!(command.ends().await, 0);
    };
    let (reply, ()) = tokio::join!(world.get("/me"), consent);
    assert_eq!((reply.status, world.token_calls()), (200, 1));
}

#[tokio::test]
async fn an_answer_to_something_else_is_shown_and_waited_past() {
    // OAU-001, OAU-010
    let world = Setup::consenting().start().await;
    let (mut command, asked, mut browser) = waiting(&world, &["--user", "ada", "--scope", "admin"]).await;
    let back = world.issued.says_yes(&asked);
    let mut forged = back.clone();
    forged.set_query(Some("code=x&state=x"));
    assert_eq!(browser.comes_back(&forged).await.code(), "state_unknown");
    // A consent that a browser began at the sidecar ends there and nowhere else.
    let asked_there = world.browser().goes_to_the_provider("/connect/main").await;
    let mut elsewhere = world.issued.says_yes(&asked_there);
    elsewhere.set_path("/callback");
    assert_eq!(browser.comes_back(&elsewhere).await.code(), "other_browser");
    drop(back);
    assert_eq!(command.ends().await, 1, "a mix-up ends it");
    assert_eq!((world.token_calls(), world.stored("ada").await), (0, None));
}

#[tokio::test]
async fn a_no_is_told_with_the_provider_s_own_words() {
    let world = Setup::consenting().start().await;
    let (mut command, asked, mut browser) = waiting(&world, &[]).await;
    browser.comes_back(&world.issued.says_no(&asked, "access_denied", "not today\u{1b}[2J")).await;
    let said = "error: not connected: the provider answered `access_denied`; it says: not today [2J";
    assert_eq!(command.logs("error:").await, said);
    let hint = "hint: nothing was changed; to connect after all, start again and say yes";
    assert_eq!((command.logs("hint:").await.as_str(), command.ends().await), (hint, 1));
}

#[tokio::test]
async fn another_device_will_do() {
    // TOK-048
    let world = Setup::consenting().start().await;
    let mut command = Running::of(world.program(&["connect", "main", "--device", "--user", "ada"]));
    assert_eq!(command.logs("open ").await, "open https://auth.test/activate");
    assert_eq!(command.logs("code ").await, "code ABCD-EFGH");
    // The first poll is too early.
    world.auth.has_seen(2).await;
    world.issued.approves_the_device();
    let said = command.says("connected").await;
    assert_eq!(said, ["connected `main` for `ada`: read write; the token is good for 60 min"]);
    assert_eq!((command.ends().await, world.stored("ada").await.is_some()), (0, true));
}

#[tokio::test]
async fn a_device_s_code_ends_when_the_provider_says_so_or_its_time_is_up() {
    // TOK-048
    let code = |lives: u32| {
        let code = json!({
            "device_code": "canary-device", "user_code": "ABCD-EFGH", "verification_uri": "https://auth.test/activate",
            "interval": 1, "expires_in": lives,
        });
        answer(200).saying(code.to_string())
    };
    for (answers, polls) in [(vec![code(600), refused(400, "expired_token")], 1), (vec![code(1)], 0)] {
        let world = Setup::consenting().start().await;
        world.provider_answers(answers);
        let went = ended(world.program(&["connect", "main", "--device"])).await;
        let said = "error: not connected: the code ended before it was entered\nhint: start again, and enter the new code in time\n";
        assert!(went.stderr.ends_with(said), "{}", went.stderr);
        assert_eq!((went.code, world.token_calls(), world.stored("default").await), (1, polls, None));
    }
}

#[tokio::test]
async fn a_disconnect_in_a_terminal_is_told_as_it_went() {
    let world = Setup::consenting().with_grants_of(&["default"]).start().await;
    let went = ended(world.program(&["disconnect", "main"])).await;
    let said = "disconnected `main` for `default`, and revoked at the provider\n";
    assert_eq!((went.code, went.stdout.as_str(), went.stderr.as_str()), (0, said, ""));
    assert_eq!(world.given_back(), [world.issued.refresh(1)]);
    let again = ended(world.program(&["disconnect", "main"])).await;
    let said = "error: `default` is not connected to `main`\nhint: `sidebearer status` says who is connected\n";
    assert_eq!((again.code, again.stderr.as_str()), (1, said));

    let world = Setup::consenting().with_grants_of(&["default"]).start().await;
    world.provider_answers([503]);
    let went = ended(world.program(&["disconnect", "main"])).await;
    let said = "error: `main` is forgotten here for `default`, but not revoked at the provider: its revocation endpoint \
                answered 503\nhint: take the access back at the provider\n";
    assert!(went.code == 1 && went.stderr.ends_with(said), "{went:?}");
    assert_eq!(world.stored("default").await, None);
}
