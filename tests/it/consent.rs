//! A user's consent: from the link, by way of the provider, to a grant that their agent uses; and who cannot have one.

use futures_util::future::join_all;
use sidebearer::links::Invitation;
use url::Url;

use crate::world::answer::{Gate, answer, usual};
use crate::world::browser::{Browser, Page};
use crate::world::log::lines_with;
use crate::world::provider::{challenge_of, refused};
use crate::world::{Setup, World};

const NOT_CONNECTED: &str = "Main is not connected";

fn failed(code: &str) -> (u16, String, String) {
    (400, NOT_CONNECTED.into(), code.into())
}

fn field(url: &Url, name: &str) -> String {
    url.query_pairs().find(|(key, _)| key == name).map(|(_, value)| value.into_owned()).unwrap_or_default()
}

/// The address with one field of another value, or without it.
fn with(url: &Url, name: &str, value: Option<&str>) -> Url {
    let mut changed = url.clone();
    let others: Vec<_> = url.query_pairs().into_owned().filter(|(key, _)| key != name).collect();
    changed.query_pairs_mut().clear().extend_pairs(others).extend_pairs(value.map(|value| (name, value)));
    changed
}

/// A browser at the provider, and the address there.
async fn at_the_provider(world: &World) -> (Browser, Url) {
    let mut browser = world.browser();
    let asked = browser.goes_to_the_provider("/connect/main").await;
    (browser, asked)
}

/// A browser whose user has said yes, and the address that it is sent back to.
async fn after_a_yes(world: &World) -> (Browser, Url) {
    let (browser, asked) = at_the_provider(world).await;
    let back = world.issued.says_yes(&asked);
    (browser, back)
}

/// Nothing came of it: no code was sent, and nothing is stored.
async fn nothing_came_of_it(world: &World) {
    assert_eq!(world.token_calls(), 0, "the code was sent");
    assert_eq!(world.stored("default").await, None);
}

#[tokio::test]
async fn a_consent_ends_in_a_grant_that_the_agent_uses_at_once() {
    let world = Setup::consenting().start().await;
    assert_eq!(world.get("/me").await.code(), "not_connected");
    let mut browser = world.browser();
    let page = browser.opens("/connect/main").await;
    assert_eq!((page.reply.status, page.heading()), (200, "Connect Main".to_owned()));
    let asked = browser.sends(&page.action(), &page.form()).await.leads_to();
    assert_eq!(asked.as_str().split('?').next(), Some("https://auth.test/authorize"));
    assert_eq!((field(&asked, "scope"), field(&asked, "client_id")), ("read write".into(), "agent".into()));
    assert_eq!(field(&asked, "redirect_uri"), format!("http://{}/callback/main", world.admin));

    let ended = browser.comes_back(&world.issued.says_yes(&asked)).await;
    assert_eq!((ended.reply.status, ended.heading()), (200, "Main is connected".to_owned()));
    for said in ["<code>read</code>", "<code>write</code>", "good for 60 min", "<bdi>default</bdi>"] {
        assert!(ended.reply.text().contains(said), "{said}: {}", ended.reply.text());
    }
    assert_eq!(world.get("/me").await.text(), "welcome\n");
    assert_eq!((world.api.tokens(), world.token_calls()), (vec![world.issued.access(1)], 1));
}

#[tokio::test]
async fn a_grant_is_there_after_a_restart() {
    let mut world = Setup::consenting().start().await;
    world.connects("default").await;
    world.restarts().await;
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.token_calls(), 1);
}

#[tokio::test]
async fn each_user_has_a_grant_of_their_own() {
    let world = Setup::consenting().acting_for("alice").start().await;
    world.connects("bob").await;
    assert_eq!(world.get("/me").await.code(), "not_connected");
    world.connects("alice").await;
    assert_eq!(world.get("/me").await.status, 200);
    assert_eq!(world.api.tokens(), [world.issued.access(2)]);
}

#[tokio::test]
async fn an_answer_to_nothing_that_began_here_is_refused() {
    // OAU-001
    let world = Setup::consenting().start().await;
    let (mut browser, back) = after_a_yes(&world).await;
    let state = field(&back, "state");
    let upper = state.to_uppercase();
    for wrong in [None, Some(""), Some("x"), Some(&state[1..]), Some(&upper), Some(&format!("{state} "))] {
        let ended = browser.comes_back(&with(&back, "state", wrong)).await;
        assert_eq!(ended.failure(), failed("state_unknown"), "{wrong:?}");
    }
    // Said twice, it says nothing: two readers would see two answers.
    let twice = format!("{back}&state={state}");
    assert_eq!(browser.comes_back(&twice.parse().unwrap()).await.failure(), failed("state_unknown"));
    nothing_came_of_it(&world).await;
    assert_eq!(browser.comes_back(&back).await.heading(), "Main is connected");
}

#[tokio::test]
async fn a_consent_takes_ten_minutes_and_no_longer() {
    // OAU-001, OAU-019
    let world = Setup::consenting().start().await;
    let (mut in_time, still_good) = after_a_yes(&world).await;
    let (mut too_late, ended) = after_a_yes(&world).await;
    world.clock.skew_wall(601_000);
    assert_eq!(too_late.comes_back(&ended).await.failure(), failed("state_expired"));
    nothing_came_of_it(&world).await;
    world.clock.skew_wall(570_000);
    assert_eq!(in_time.comes_back(&still_good).await.heading(), "Main is connected");
}

#[tokio::test]
async fn a_user_who_begins_any_number_of_consents_ends_nobody_else_s() {
    // OAU-019
    let world = Setup::consenting().start().await;
    let (mut alice, alices) = after_a_yes(&world).await;
    let mut bob = world.browser();
    let mut bobs = Vec::new();
    for _ in 0..21 {
        let asked = bob.goes_to_the_provider("/connect/main?user=bob").await;
        bobs.push(world.issued.says_yes(&asked));
    }
    assert_eq!(bob.comes_back(&bobs[0]).await.failure(), failed("state_unknown"), "the 21st made room for itself");
    assert_eq!(bob.comes_back(&bobs[1]).await.heading(), "Main is connected");
    assert_eq!(alice.comes_back(&alices).await.heading(), "Main is connected");
}

#[tokio::test]
async fn an_answer_at_another_provider_s_address_is_a_mix_up() {
    // OAU-001, OAU-004, RFC 9700 section 4.4
    let world = Setup::consenting().and_another_provider().start().await;
    let (mut browser, back) = after_a_yes(&world).await;
    let mut elsewhere = back.clone();
    elsewhere.set_path("/callback/other");
    let ended = browser.comes_back(&elsewhere).await;
    assert_eq!(ended.failure(), (400, "Other is not connected".into(), "issuer_mismatch".into()));
    assert_eq!(browser.comes_back(&back).await.failure(), failed("state_used"), "it was good once");
    nothing_came_of_it(&world).await;
}

#[tokio::test]
async fn a_provider_that_comes_back_elsewhere_is_not_mixed_up_with_another_one() {
    // OAU-004, RFC 9700 section 4.4: what tells two providers apart is the redirect URI, not the name in it.
    let world = Setup::consenting().start().await;
    let (mut browser, back) = after_a_yes(&world).await;
    let mut elsewhere = back.clone();
    elsewhere.set_path("/callback");
    assert_eq!(browser.comes_back(&elsewhere).await.code(), "issuer_mismatch");
    nothing_came_of_it(&world).await;

    let world = Setup::consenting().provider("  redirect_uri: http://127.0.0.1:1/callback").start().await;
    let (mut browser, back) = after_a_yes(&world).await;
    assert_eq!(back.path(), "/callback");
    let mut elsewhere = back.clone();
    elsewhere.set_path("/callback/main");
    assert_eq!(browser.comes_back(&elsewhere).await.failure(), failed("issuer_mismatch"));
    nothing_came_of_it(&world).await;
    let (mut browser, back) = after_a_yes(&world).await;
    assert_eq!(browser.comes_back(&back).await.heading(), "Main is connected");
}

#[tokio::test]
async fn a_code_in_another_browser_connects_nobody() {
    // OAU-002: an attacker has a victim finish what the attacker began, or the other way round.
    let world = Setup::consenting().start().await;
    let mut neighbour = world.browser();
    neighbour.opens("/connect/main").await;
    assert!(neighbour.cookies.contains_key("sidebearer_browser"));
    let mut forger = world.browser();
    forger.cookies.insert("sidebearer_browser".into(), "A".repeat(43));
    for mut other in [world.browser(), neighbour, forger] {
        let (mut own, back) = after_a_yes(&world).await;
        assert_eq!(other.comes_back(&back).await.failure(), failed("other_browser"));
        assert_eq!(own.comes_back(&back).await.failure(), failed("state_used"), "whoever has seen it ends it");
    }
    nothing_came_of_it(&world).await;
}

#[tokio::test]
async fn a_form_that_this_browser_did_not_get_here_begins_nothing() {
    // OAU-002
    let world = Setup::consenting().start().await;
    let mut browser = world.browser();
    let form = browser.opens("/connect/main").await.form();
    let without_csrf: Vec<_> = form.iter().filter(|(name, _)| name != "csrf").cloned().collect();
    let mut guessed = without_csrf.clone();
    guessed.push(("csrf".into(), "A".repeat(43)));
    let (mut another_tab, mut stranger) = (browser.clone(), world.browser());
    let mut neighbour = world.browser();
    neighbour.opens("/connect/main").await;
    for (who, form) in
        [(&mut browser, &without_csrf), (&mut another_tab, &guessed), (&mut stranger, &form), (&mut neighbour, &form)]
    {
        let page = who.sends("/connect/main", form).await;
        assert_eq!((page.reply.status, page.heading()), (403, "Start again".to_owned()));
    }
    assert_eq!(browser.sends("/connect/main", &form).await.reply.status, 303);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn of_eight_answers_at_once_one_redeems_the_code() {
    // OAU-001, OAU-006
    let world = Setup::consenting().start().await;
    let (browser, back) = after_a_yes(&world).await;
    let ended = join_all((0..8).map(|_| {
        let (mut tab, back) = (browser.clone(), back.clone());
        tokio::spawn(async move { tab.comes_back(&back).await })
    }));
    let ended: Vec<Page> = ended.await.into_iter().map(Result::unwrap).collect();
    assert_eq!(world.token_calls(), 1);
    assert_eq!(ended.iter().filter(|page| page.heading() == "Main is connected").count(), 1);
    for page in ended {
        let others = ["Main is connected", "Main is already connected"].contains(&page.heading().as_str());
        assert!(others || page.failure() == failed("state_used"), "{:?}", page.failure());
    }
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn a_second_visit_by_the_same_browser_is_told_that_all_is_well() {
    // OAU-006
    let world = Setup::consenting().start().await;
    let (mut browser, back) = after_a_yes(&world).await;
    browser.comes_back(&back).await;
    let again = browser.comes_back(&back).await;
    assert_eq!((again.reply.status, again.heading()), (200, "Main is already connected".to_owned()));
    assert_eq!(world.browser().comes_back(&back).await.failure(), failed("other_browser"));
    assert_eq!(world.token_calls(), 1);
    // It is not said of a connection that has ended since.
    world.asks("DELETE", "/v1/connections/main/default", &[], "").await;
    assert_eq!(browser.comes_back(&back).await.failure(), failed("state_used"));
}

#[tokio::test]
async fn a_second_click_waits_for_what_the_first_one_brings() {
    // OAU-006: the browser gives the first one up, and shows the answer to the second.
    let world = Setup::consenting().start().await;
    for (answer, heading) in [(usual(), "Main is already connected"), (refused(400, "invalid_grant"), NOT_CONNECTED)] {
        world.asks("DELETE", "/v1/connections/main/default", &[], "").await;
        let (mut browser, back) = after_a_yes(&world).await;
        let (gate, seen) = (Gate::shut(), world.auth.seen().len());
        world.provider_answers([answer.once(&gate)]);
        let first = browser.begins_to_open(back.as_str()).await;
        world.auth.has_seen(seen + 1).await;
        drop(first);
        let mut second = browser.begins_to_open(back.as_str()).await;
        second.hears_nothing_yet().await;
        gate.open();
        assert_eq!(Page { reply: second.hears().await }.heading(), heading);
        assert_eq!(browser.comes_back(&back).await.heading(), heading);
        assert_eq!(world.auth.seen().len(), seen + 1, "the code was sent twice");
    }
}

#[tokio::test]
async fn a_second_click_finds_what_the_first_one_began_at_whatever_moment_it_comes() {
    // OAU-006: the first one is given up while the store is still asked for its flow, and a little later.
    let world = Setup::consenting().start().await;
    let consent = world.desk().await.consent;
    for (user, moments) in [("ada", 1), ("bob", 2), ("cid", 3), ("dan", 4)] {
        let invitation = Invitation { user: user.into(), ..Invitation::default() };
        let plan = consent.plan("main", &invitation).await.unwrap();
        let started = consent.start(&plan, "http://127.0.0.1:1/callback", None).await.unwrap();
        let back = world.issued.says_yes(&started.url);
        let mut first = Box::pin(consent.finish(back.path(), back.query().unwrap(), None));
        for _ in 0..moments {
            assert!(futures_util::poll!(&mut first).is_pending(), "the whole consent took {moments} moments");
            tokio::task::yield_now().await;
        }
        drop(first);
        let second = consent.finish(back.path(), back.query().unwrap(), None).await;
        assert_eq!(second.map(|finished| finished.user.to_string()).map_err(|e| e.to_string()), Ok(user.to_owned()));
        assert!(world.stored(user).await.is_some());
    }
    assert_eq!(world.token_calls(), 4, "a code was sent twice, or not at all");
}

#[tokio::test]
async fn an_answer_of_another_server_is_refused_before_the_code_is_sent() {
    // OAU-004, RFC 9207 section 2.4
    for issuer in ["https://auth.test", "https://auth.test/tenant"] {
        let world = Setup::consenting_as_discovered(issuer).start().await;
        let others = ["https://evil.test", "https://auth.test/Tenant", "https://auth.test/other", "null", issuer];
        let written = [
            issuer.replace("auth", "AUTH"),
            issuer.replace(".test", ".test:443"),
            issuer.replace("https", "http"),
            issuer.replace("https", "HTTPS"),
            format!("{issuer}/"),
            format!("{issuer}//"),
            format!("{issuer}?"),
            format!(" {issuer}"),
        ];
        for iss in others.iter().filter(|other| **other != issuer).map(|other| (*other).to_owned()).chain(written) {
            let (mut browser, back) = after_a_yes(&world).await;
            let ended = browser.comes_back(&with(&back, "iss", Some(&iss))).await;
            assert_eq!(ended.failure(), failed("issuer_mismatch"), "{issuer}: {iss}");
        }
        let (mut browser, back) = after_a_yes(&world).await;
        let twice = format!("{back}&iss={issuer}&iss={issuer}");
        assert_eq!(browser.comes_back(&twice.parse().unwrap()).await.failure(), failed("state_unknown"));
        nothing_came_of_it(&world).await;
        assert_eq!(browser.comes_back(&with(&back, "iss", Some(issuer))).await.heading(), "Main is connected");
    }
}

#[tokio::test]
async fn a_server_that_names_itself_always_is_not_believed_without_its_name() {
    // OAU-004
    let world = Setup::consenting_as_discovered("https://auth.test").start().await;
    for missing in [None, Some("")] {
        let (mut browser, back) = after_a_yes(&world).await;
        assert_eq!(browser.comes_back(&with(&back, "iss", missing)).await.failure(), failed("issuer_missing"));
    }
    let (mut browser, asked) = at_the_provider(&world).await;
    let back = world.issued.says_no(&asked, "access_denied", "");
    assert_eq!(browser.comes_back(&back).await.failure(), failed("issuer_missing"), "nor when it says no");
    nothing_came_of_it(&world).await;
}

#[tokio::test]
async fn what_another_server_says_is_not_shown() {
    // OAU-004: the text of a mix-up may lead the user on.
    let world = Setup::consenting().start().await;
    let (mut browser, asked) = at_the_provider(&world).await;
    let back = world.issued.says_no(&asked, "call_us", "Your account is locked: call 555 0100");
    let ended = browser.comes_back(&with(&back, "iss", Some("https://evil.test"))).await;
    assert_eq!(ended.failure(), failed("issuer_mismatch"));
    assert!(!ended.reply.text().contains("555") && !ended.reply.text().contains("call_us"), "{}", ended.reply.text());
}

#[tokio::test]
async fn what_a_provider_says_can_neither_script_a_page_nor_break_a_line() {
    // OAU-003, LEK-002
    let world = Setup::consenting().start().await;
    let hostile =
        "<script>alert(1)</script>\"'><img src=x onerror=alert(1)> \u{1b}[2J\r\nWARN forged-4711\u{2028}\u{202e}\u{7}";
    for (error, description) in [(hostile, "no"), ("marker-4712", hostile), ("access_denied", hostile)] {
        let (mut browser, asked) = at_the_provider(&world).await;
        let ended = browser.comes_back(&world.issued.says_no(&asked, error, description)).await;
        assert_eq!((ended.reply.status, ended.heading()), (400, NOT_CONNECTED.to_owned()));
        let text = ended.reply.text();
        assert!(!text.contains("<script>alert") && !text.contains("<img"), "{text}");
        assert!(text.contains("&#60;script&#62;alert(1)&#60;/script&#62;"), "{text}");
        let steers = |c: char| (c.is_control() && c != '\n') || matches!(c, '\u{2028}' | '\u{202e}');
        assert!(!text.contains(steers), "{text:?}");
        assert!(ended.reply.header("content-security-policy").unwrap().starts_with("default-src 'none'"));
    }
    for line in lines_with("forged-4711").iter().chain(&lines_with("marker-4712")) {
        assert!(!line.trim_end_matches('\n').contains(|c: char| c.is_control() || c == '\u{2028}'), "{line:?}");
    }
    assert!(!lines_with("marker-4712").is_empty());
    nothing_came_of_it(&world).await;
}

#[tokio::test]
async fn a_name_that_anybody_sends_can_neither_break_a_line_nor_fill_the_log() {
    // LEK-002: these pages ask for no token.
    let world = Setup::consenting().start().await;
    let hostile = "forged-4713%0A2026-11-25T00:00:00Z%20%20INFO%20connected%1b[2J%E2%80%A8%E2%80%AE";
    let long = format!("forged-4713{}", "x".repeat(10_000));
    for link in [
        format!("/connect?provider={hostile}"),
        format!("/connect/{hostile}"),
        format!("/callback/{hostile}?state=x"),
        format!("/connect?provider={long}"),
    ] {
        world.browser().opens(&link).await;
    }
    let lines = lines_with("forged-4713");
    assert!(lines.len() >= 3, "{lines:?}");
    for line in lines {
        let line = line.trim_end_matches('\n');
        let steers = |c: char| c.is_control() || matches!(c, '\u{2028}' | '\u{202e}');
        assert!(!line.contains(steers) && line.len() < 500, "{line:?}");
    }
}

#[tokio::test]
async fn a_user_who_says_no_is_told_that_nothing_was_changed() {
    // OAU-019
    let return_to = "return_to: [https://app.test/settings/]";
    let world = Setup::consenting().top(return_to).start().await;
    let mut browser = world.browser();
    let link = "/connect/main?return_to=https://app.test/settings/x";
    let asked = browser.goes_to_the_provider(link).await;
    let ended = browser.comes_back(&world.issued.says_no(&asked, "access_denied", "The user said no.")).await;
    assert_eq!(ended.failure(), failed("access_denied"));
    let todo =
        "The provider answered access_denied: nothing was changed; to connect after all, start again and say yes.";
    let text = ended.reply.text();
    assert!(text.contains(&format!("<p class=\"lead\">{todo}</p>")), "{text}");
    assert!(text.contains("<blockquote><bdi>The user said no.</bdi></blockquote>"), "{text}");
    let back = "https://app.test/settings/x?integration=failed&#38;error=access_denied";
    assert!(text.contains(&format!("href=\"{back}\"")), "{text}");
    nothing_came_of_it(&world).await;
}

#[tokio::test]
async fn whoever_redeems_a_code_shows_that_they_asked_for_it() {
    // OAU-007
    let world = Setup::consenting().start().await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let (mut browser, asked) = at_the_provider(&world).await;
        browser.comes_back(&world.issued.says_yes(&asked)).await;
        let form = world.token_requests().pop().unwrap();
        assert_eq!(form["grant_type"], "authorization_code");
        assert_eq!(form["redirect_uri"], field(&asked, "redirect_uri"));
        assert_eq!(challenge_of(&form["code_verifier"]), field(&asked, "code_challenge"));
        assert_eq!(field(&asked, "code_challenge_method"), "S256");
        assert!(!asked.as_str().contains(&form["code_verifier"]), "the browser has seen it");
        seen.extend([form["code_verifier"].clone(), field(&asked, "state"), field(&asked, "code_challenge")]);
    }
    let mut distinct = seen.clone();
    distinct.sort();
    distinct.dedup();
    assert_eq!(distinct.len(), seen.len());
}

#[tokio::test]
async fn nothing_of_a_consent_is_logged() {
    // LEK-001
    let world = Setup::consenting().start().await;
    let (mut browser, asked) = at_the_provider(&world).await;
    let back = world.issued.says_yes(&asked);
    let csrf = browser.opens("/connect/main").await.form().remove(0).1;
    browser.comes_back(&back).await;
    browser.comes_back(&back).await;
    world.browser().comes_back(&back).await;
    let verifier = world.token_requests()[0]["code_verifier"].clone();
    let cookie = browser.cookies["sidebearer_browser"].clone();
    // The code, the tokens and the client's secret are looked for at the end of every world.
    for secret in [field(&asked, "state"), field(&asked, "code_challenge"), verifier, cookie, csrf] {
        assert!(secret.len() >= 43, "{secret}");
        assert!(lines_with(&secret).is_empty(), "{:?}", lines_with(&secret));
    }
}

#[tokio::test]
async fn addresses_come_from_the_configuration_whatever_the_host_says() {
    // OAU-008, LST-004
    let world = Setup::consenting().start().await;
    let own = format!("http://{}", world.admin);
    let redirect_uri = format!("{own}/callback/main");
    let mut browser = world.browser();
    let form = browser.opens("/connect/main").await.form();
    for name in ["localhost", "[::1]"] {
        browser.host = format!("{name}:{}", world.admin.port());
        let moved = browser.opens("/connect/main?user=ada").await;
        assert_eq!(moved.reply.status, 307, "the cookie is for one name");
        assert_eq!(moved.leads_to().as_str(), format!("{own}/connect/main?user=ada"));
        let asked = browser.sends("/connect/main", &form).await.leads_to();
        assert_eq!(field(&asked, "redirect_uri"), redirect_uri);
        let body = r#"{"provider": "main"}"#;
        let json = ("content-type", "application/json");
        let started = world.asks("POST", "/v1/connections", &[("host", &browser.host), json], body).await;
        assert_eq!(started.json()["connect_url"], format!("{own}/connect/main?user="));
    }
    for host in ["evil.test", &format!("evil.test:{}", world.admin.port()), "127.0.0.1", "127.0.0.1:1", ""] {
        browser.host = host.to_owned();
        for page in [browser.opens("/connect/main").await, browser.sends("/connect/main", &form).await] {
            assert_eq!((page.reply.status, page.reply.header("location")), (403, None), "{host}");
        }
    }
    let fields = [("x-forwarded-host", "evil.test"), ("forwarded", "host=evil.test;proto=https")];
    assert!(!world.asks("GET", "/connect/main", &fields, "").await.text().contains("evil"));
}

#[tokio::test]
async fn behind_a_public_name_all_addresses_have_it() {
    // OAU-008
    let public = "public_url: https://connect.test\nadmin_token: ${ADMIN_TOKEN}";
    let world = Setup::consenting().top(public).start().await;
    let link = world.get("/me").await.json()["connect_url"].as_str().unwrap().to_owned();
    assert!(link.starts_with("https://connect.test/connect/main?ticket="), "{link}");
    let mut browser = world.browser();
    assert_eq!(browser.opens(&link).await.leads_to().as_str(), link);
    (browser.host, browser.scheme) = ("connect.test".into(), "https");
    let asked = browser.goes_to_the_provider(&link).await;
    assert_eq!(field(&asked, "redirect_uri"), "https://connect.test/callback/main");
    assert_eq!(browser.comes_back(&world.issued.says_yes(&asked)).await.heading(), "Main is connected");
    assert_eq!(world.token_requests()[0]["redirect_uri"], "https://connect.test/callback/main");
}

#[tokio::test]
async fn afterwards_a_browser_goes_back_to_a_page_of_the_list_and_nowhere_else() {
    let lists = "return_to: [https://app.test/settings/, https://app.test/done]";
    let world = Setup::consenting().top(lists).start().await;
    let link = |page: &str| {
        let query = url::form_urlencoded::Serializer::new(String::new()).append_pair("return_to", page).finish();
        format!("/connect/main?{query}")
    };
    for page in [
        "https://app.test/settings/",
        "https://app.test/settings/github?tab=2",
        "https://app.test:443/settings/",
        "https://app.test/done",
        "https://app.test/done?x=1",
    ] {
        assert_eq!(world.browser().opens(&link(page)).await.reply.status, 200, "{page}");
    }
    for page in [
        "https://app.test/",
        "https://app.test/settings",
        "https://app.test/settingsx",
        "https://app.test/done/",
        "https://app.test/done.html",
        "https://app.test/settings/../admin",
        "https://app.test/settings/%2e%2e/admin",
        "https://app.test/settings/..\\admin",
        "https://app.test/settings/x/../../admin",
        "http://app.test/settings/",
        "https://app.test:8443/settings/",
        "https://app.test.evil/settings/",
        "https://evil.test/settings/",
        "https://evil.test/https://app.test/settings/",
        "https://sub.app.test/settings/",
        "https://app.test@evil.test/settings/",
        "https://evil@app.test/settings/",
        "https://:pw@app.test/settings/",
        "https://app.test/settings/#part",
        "//app.test/settings/",
        "/settings/",
        "javascript:alert(1)//https://app.test/settings/",
        "data:text/html,x",
    ] {
        let refused = world.browser().opens(&link(page)).await;
        assert_eq!(refused.failure(), failed("return_to_not_allowed"), "{page}");
    }
    // Nor when a form asks for it that was changed on the way.
    let mut browser = world.browser();
    let mut form = browser.opens(&link("https://app.test/done")).await.form();
    form.iter_mut().filter(|(name, _)| name == "return_to").for_each(|(_, page)| *page = "https://evil.test/".into());
    assert_eq!(browser.sends("/connect/main", &form).await.failure(), failed("return_to_not_allowed"));

    let asked = browser.goes_to_the_provider(&link("https://app.test/settings/github?tab=2")).await;
    let ended = browser.comes_back(&world.issued.says_yes(&asked)).await;
    assert_eq!(ended.reply.status, 303);
    let back = "https://app.test/settings/github?tab=2&integration=connected&provider=main";
    assert_eq!(ended.leads_to().as_str(), back);
    // Also at the second click, whose answer is the one that the browser shows.
    let again = browser.comes_back(&world.issued.says_yes(&asked)).await;
    assert_eq!((again.reply.status, again.leads_to().as_str()), (303, back));
}

#[tokio::test]
async fn a_code_that_brings_no_token_leaves_nothing_behind() {
    let world = Setup::consenting().start().await;
    for nothing in [
        refused(400, "invalid_grant"),
        refused(401, "invalid_client"),
        answer(500).saying("{}"),
        answer(200).saying("<html>canary-login</html>"),
        answer(200).saying(""),
        answer(200).saying(r#"{"access_token": "canary-x", "token_type": "mac"}"#),
        answer(302).with("location", "https://evil.test/token"),
    ] {
        let (mut browser, back) = after_a_yes(&world).await;
        world.provider_answers([nothing]);
        assert_eq!(browser.comes_back(&back).await.failure(), failed("exchange_failed"));
        assert_eq!(browser.comes_back(&back).await.failure(), failed("state_used"));
        assert_eq!(world.stored("default").await, None);
    }
    assert_eq!(world.token_calls(), 7, "a code is sent once");
    assert_eq!(world.evil.met(), (0, 0));
    assert_eq!(world.get("/me").await.code(), "not_connected");
    world.connects("default").await;
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn a_code_that_brings_no_token_leaves_the_grant_that_is_there_alone() {
    let world = Setup::consenting().start().await;
    world.connects("default").await;
    let before = world.stored("default").await;
    let (mut browser, back) = after_a_yes(&world).await;
    world.provider_answers([refused(400, "invalid_grant")]);
    assert_eq!(browser.comes_back(&back).await.failure(), failed("exchange_failed"));
    assert_eq!(world.stored("default").await, before);
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn a_browser_that_hangs_up_while_the_code_is_redeemed_loses_nothing() {
    // TOK-040, C11
    let world = Setup::consenting().start().await;
    let (browser, back) = after_a_yes(&world).await;
    let gate = Gate::shut();
    world.provider_answers([usual().once(&gate)]);
    let connection = browser.begins_to_open(back.as_str()).await;
    world.auth.has_seen(1).await;
    drop(connection);
    // Whoever answers this has been told of the hang-up, which came before.
    world.asks("GET", "/style.css", &[], "").await;
    gate.open();
    world.obtained_tokens(1).await;
    assert!(world.stored("default").await.is_some());
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn any_process_on_the_store_can_finish_what_another_began() {
    let mut world = Setup::consenting().start().await;
    let (mut browser, back) = after_a_yes(&world).await;
    world.restarts().await;
    let mut elsewhere = world.browser();
    elsewhere.cookies = std::mem::take(&mut browser.cookies);
    // The redirect URI is that of the request, which the provider compares.
    assert_eq!(elsewhere.comes_back(&back).await.heading(), "Main is connected");
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn who_cannot_be_connected_is_told_why() {
    let world = Setup::consenting().start().await;
    let mut browser = world.browser();
    for (link, status, heading, code) in [
        ("/connect/nope", 404, "The account is not connected", "unknown_provider"),
        ("/connect/main?user=%01", 400, NOT_CONNECTED, "bad_user"),
        ("/connect/main?scope=a%22b", 400, NOT_CONNECTED, "bad_scope"),
        ("/connect?provider=..%2Fx", 404, "The account is not connected", "unknown_provider"),
        ("/connect?provider=nope", 404, "The account is not connected", "unknown_provider"),
        ("/connect?provider=", 404, "The account is not connected", "unknown_provider"),
    ] {
        let page = browser.opens(link).await;
        assert_eq!(page.failure(), (status, heading.into(), code.into()), "{link}");
    }
    let world = World::start().await;
    assert_eq!(world.browser().opens("/connect/main").await.code(), "unknown_provider", "nobody consents there");
}

#[tokio::test]
async fn another_server_or_client_is_not_asked_for_what_was_granted_to_the_one_before() {
    // TOK-045: it may not know those scopes, and refuse each try.
    for change in
        [("token_endpoint: https://auth.test", "token_endpoint: https://other.test"), ("client_id: ", "client_id: x")]
    {
        let mut world = Setup::consenting().start().await;
        let mut browser = world.browser();
        let asked = browser.goes_to_the_provider("/connect/main?scope=admin").await;
        browser.comes_back(&world.issued.says_yes(&asked)).await;
        let planned = async |world: &World| {
            let plan = world.desk().await.consent.plan("main", &Invitation::default()).await.unwrap();
            (plan.scopes.join(" "), plan.further.join(" "), plan.again)
        };
        assert_eq!(planned(&world).await, ("admin read write".into(), "admin".into(), true));
        world.reloads(&[change]).await;
        assert_eq!(planned(&world).await, ("read write".into(), String::new(), false));
    }
}

#[tokio::test]
async fn a_code_goes_to_no_server_that_was_configured_since() {
    // OAU-008, TOK-045
    for change in
        [("token_endpoint: https://auth.test", "token_endpoint: https://other.test"), ("client_id: ", "client_id: x")]
    {
        let mut world = Setup::consenting().start().await;
        let (mut browser, back) = after_a_yes(&world).await;
        world.reloads(&[change]).await;
        assert_eq!(browser.comes_back(&back).await.failure(), failed("provider_changed"));
        nothing_came_of_it(&world).await;
    }
}
