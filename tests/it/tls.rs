//! TLS towards the agent and towards the API: what is refused, what is bounded, and what people are told.

use std::sync::Arc;

use rustls::ClientConnection;
use rustls::client::{EchConfig, EchGreaseConfig, EchMode};
use rustls::crypto::aws_lc_rs::hpke::{ALL_SUPPORTED_SUITES, DH_KEM_X25519_HKDF_SHA256_AES_128};
use rustls::crypto::hpke::HpkePublicKey;
use rustls::pki_types::EchConfigListBytes;

use crate::world::certificates::Proof;
use crate::world::log::lines_with;
use crate::world::{Setup, World};

/// In milliseconds.
const DAY: i64 = 24 * 60 * 60 * 1000;

#[tokio::test]
async fn a_leaf_is_renewed_while_the_sidecar_runs() {
    // TLS-005
    let world = World::start().await;
    // Half a leaf's life ago: an agent's clock is the machine's.
    world.clock.skew_wall(-16 * DAY);
    let presented = async || {
        let tls = world.tunnel("api.test:443").await.tls("api.test", &["http/1.1"]).await.unwrap();
        tls.certificate.unwrap()
    };
    let first = presented().await;
    assert_eq!(presented().await, first);
    world.clock.skew_wall(0);
    assert_ne!(presented().await, first);
    assert_eq!(world.get("/me").await.status, 200);
}

#[tokio::test]
async fn the_authoritys_key_is_in_no_file() {
    // TLS-004
    let mut world = Setup::new().keeping_its_authority().start().await;
    world.restarts().await;
    assert_eq!(world.get("/me").await.status, 200);
    let mut folders = vec![world.folder.path().to_owned()];
    let mut files = Vec::new();
    while let Some(folder) = folders.pop() {
        for path in std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path()) {
            if path.is_dir() { folders.push(path) } else { files.push(std::fs::read(path).unwrap()) }
        }
    }
    let has = |file: &[u8], text: &[u8]| file.windows(text.len()).any(|window| window == text);
    assert!(files.iter().any(|file| has(file, b"BEGIN CERTIFICATE")) && files.len() > 4, "they were looked at");
    assert!(!files.iter().any(|file| has(file, b"PRIVATE KEY")));
}

#[tokio::test]
async fn an_authority_that_ends_soon_is_made_anew_at_the_start_and_people_are_told() {
    // TLS-005
    let mut world = Setup::new().keeping_its_authority().start().await;
    let first = std::fs::read_to_string(&world.ca).unwrap();
    world.restarts().await;
    assert_eq!(std::fs::read_to_string(&world.ca).unwrap(), first);
    world.clock.skew_wall(340 * DAY);
    world.restarts().await;
    assert_ne!(std::fs::read_to_string(&world.ca).unwrap(), first);
    let told = "the local CA is made anew; running agents need the new `ca.pem`";
    assert_eq!(lines_with(told).len(), 1);
}

#[tokio::test]
async fn a_host_that_is_new_leaves_running_agents_their_trust_in_the_others() {
    let mut world = Setup::new().keeping_its_authority().start().await;
    let (first, agents) = (std::fs::read_to_string(&world.ca).unwrap(), Arc::new(world.client_config()));
    world.routes_also("new.test");
    world.restarts().await;
    let roots = std::fs::read_to_string(&world.ca).unwrap();
    assert!(roots.starts_with(&first) && roots.len() > first.len());
    let told = "new hosts have a root of their own in `ca.pem`; running agents need it for them";
    assert_eq!(lines_with(told).len(), 1);
    for (host, trusted) in [("api.test", true), ("new.test", false)] {
        let tunnel = world.tunnel(&format!("{host}:443")).await;
        assert_eq!(tunnel.tls_with(agents.clone(), host).await.is_ok(), trusted, "{host}");
    }
    world.restarts().await;
    assert_eq!(std::fs::read_to_string(&world.ca).unwrap(), roots);
}

#[tokio::test]
async fn nothing_older_than_tls_1_2_and_no_weak_cipher_is_spoken() {
    // TLS-011
    let world = World::start().await;
    for (version, ciphers, alert) in [
        (0x0301, &[0xc013, 0x002f][..], 70),
        (0x0302, &[0xc013, 0x002f], 70),
        // Without forward secrecy, CBC, RC4, 3DES, NULL, export.
        (0x0303, &[0x002f, 0x009c, 0xc013, 0xc027, 0x0005, 0x000a, 0x0002, 0x0003], 40),
    ] {
        let mut agent = world.tunnel("api.test:443").await;
        agent.says(hello(version, ciphers)).await;
        let record = agent.take(7).await;
        assert_eq!((record[0], record[6]), (21, alert), "{version:x}");
        agent.hears_to_the_end().await;
    }
    let mut agent = world.tunnel("api.test:443").await;
    agent.says(hello(0x0303, &[0xc02b])).await;
    assert_eq!(agent.take(1).await, [22], "a handshake of TLS 1.2 goes on");
}

#[tokio::test]
async fn no_request_is_taken_before_the_handshake_ends() {
    // TLS-011: what comes early can be sent again by whoever recorded it (RFC 8446 section 8).
    let world = World::start().await;
    let mut config = world.client_config();
    config.enable_early_data = true;
    let config = Arc::new(config);
    for resumed in [false, true] {
        let agent = world.tunnel("api.test:443").await;
        let mut tls = agent.tls_with(config.clone(), "api.test").await.unwrap();
        tls.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
        assert_eq!(tls.hears().await.status, 200);
        assert_eq!(tls.resumed, resumed);
        let mut next = ClientConnection::new(config.clone(), "api.test".try_into().unwrap()).unwrap();
        assert!(next.early_data().is_none(), "a ticket allows it");
    }
}

#[tokio::test]
async fn a_flood_of_key_updates_ends_its_connection_and_no_other() {
    // TLS-012
    let world = World::start().await;
    let mut other = world.api_connection().await;
    let config = Arc::new(world.client_config());
    let mut flood = world.tunnel("api.test:443").await.tls_asking_for_keys(config, "api.test", 10_000).await.unwrap();
    assert_eq!(flood.hears_to_the_end().await, "");
    assert_eq!(other.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await.hears().await.status, 200);
    assert_eq!(world.requests_told().len(), 1);
}

#[tokio::test]
async fn an_api_that_wants_a_client_certificate_is_a_bad_gateway() {
    // TLS-013
    for protocol in ["h2", "http/1.1"] {
        let world = Setup::new().api_speaks(&[protocol]).api_proves_itself(Proof::OfBothSides).start().await;
        for _ in 0..2 {
            let reply = world.get("/me").await;
            assert_eq!((reply.status, reply.code().as_str()), (502, "tls_protocol_error"), "{}", reply.text());
        }
        assert_eq!(world.api.seen().len(), 0);
    }
}

#[tokio::test]
async fn an_agent_that_trusts_other_roots_is_told_of_once_for_each_host() {
    // TLS-015
    let routes = "- host: pinned.api.test\n  provider: main\n- host: pinned-too.api.test\n  provider: main";
    let world = Setup::new().routes(routes).start().await;
    for host in ["pinned.api.test", "pinned.api.test", "pinned-too.api.test", "pinned.api.test"] {
        let agent = world.tunnel(&format!("{host}:443")).await.trusting_nobody();
        assert!(agent.tls(host, &["h2"]).await.is_err());
    }
    for host in ["pinned.api.test", "pinned-too.api.test"] {
        let place = format!("authority={host}:443 ");
        world.logs(&place, "DEBUG", if host == "pinned.api.test" { 2 } else { 0 }).await;
        let warned = world.logs(&place, "WARN", 1).await;
        assert_eq!(warned.len(), 1, "{warned:?}");
        assert!(warned[0].contains("an agent that does not trust the CA needs `ca.pem`: see `sidebearer env`"));
        assert!(warned[0].contains("UnknownCA"), "{}", warned[0]);
    }
}

#[tokio::test]
async fn an_encrypted_hello_counts_for_the_name_that_it_shows() {
    // TLS-019
    let world = World::start().await;
    let grease = EchMode::Grease(EchGreaseConfig::new(DH_KEM_X25519_HKDF_SHA256_AES_128, HpkePublicKey(KEY.into())));
    let agent = world.tunnel("api.test:443").await;
    let mut tls = agent.tls_with(world.client_config_with(grease), "api.test").await.unwrap();
    tls.says("GET /me HTTP/1.1\r\nHost: api.test\r\n\r\n").await;
    assert_eq!(tls.hears().await.status, 200);
    for (shown, hidden) in [("other.test", "api.test"), ("api.test", "other.test")] {
        let sealed = EchMode::Enable(EchConfig::new(ech_configs(shown), ALL_SUPPORTED_SUITES).unwrap());
        let agent = world.tunnel("api.test:443").await;
        let refused = agent.tls_with(world.client_config_with(sealed), hidden).await.err().unwrap().to_string();
        let reason = if shown == "api.test" { "EncryptedClientHello" } else { "AccessDenied" };
        assert!(refused.contains(reason), "{shown} over {hidden}: {refused}");
    }
    assert_eq!(world.api.seen().len(), 1);
}

/// A public key of X25519, whose private half nobody needs.
const KEY: [u8; 32] = [9; 32];

/// The published keys of a server that shows this name instead of those behind it (RFC 9849 section 4).
fn ech_configs(shown: &str) -> EchConfigListBytes<'static> {
    let suite = [[0, 1], [0, 1]].concat();
    let key = [&[7, 0, 0x20][..], &with_length(2, &KEY), &with_length(2, &suite)].concat();
    let contents = [&key[..], &[0], &with_length(1, shown.as_bytes()), &[0, 0]].concat();
    with_length(2, &[&[0xfe, 0x0d][..], &with_length(2, &contents)].concat()).into()
}

/// The ClientHello of a client that knows these ciphers, and no version after this one (RFC 5246 section 7.4.1.2).
fn hello(version: u16, ciphers: &[u16]) -> Vec<u8> {
    let name = with_length(2, &[&[0][..], &with_length(2, b"api.test")].concat());
    // SNI, the curves P-256 and X25519, uncompressed points, ECDSA with SHA-256 and with SHA-1.
    let extensions: &[(u16, &[u8])] =
        &[(0, &name), (10, &[0, 4, 0, 23, 0, 29]), (11, &[1, 0]), (13, &[0, 4, 4, 3, 2, 3])];
    let extensions: Vec<u8> =
        extensions.iter().flat_map(|(id, body)| [&id.to_be_bytes()[..], &with_length(2, body)].concat()).collect();
    let ciphers: Vec<u8> = ciphers.iter().flat_map(|cipher| cipher.to_be_bytes()).collect();
    let body =
        [&version.to_be_bytes()[..], &[7; 32], &[0], &with_length(2, &ciphers), &[1, 0], &with_length(2, &extensions)];
    let message = [&[1][..], &with_length(3, &body.concat())].concat();
    [&[22, 3, 1][..], &with_length(2, &message)].concat()
}

/// The bytes behind their length, in so many bytes.
fn with_length(size: usize, bytes: &[u8]) -> Vec<u8> {
    [&bytes.len().to_be_bytes()[8 - size..], bytes].concat()
}
