//! Whatever happens in whatever order: no refresh token is spent twice, and no expired token is handed out.

use proptest::prelude::*;

use super::server::Act;
use super::world::{Got, World, pass};
use crate::tokens::NoRenewal;

#[derive(Debug, Clone, Copy)]
enum Step {
    Request,
    Revoke,
    RejectOld,
    Pass(u32),
    Restart,
    Unreachable,
    Down,
    LoseAnswer,
    BreakStore,
    Reconnect,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        6 => Just(Step::Request),
        2 => Just(Step::Revoke),
        2 => Just(Step::RejectOld),
        4 => (1u32..5000).prop_map(Step::Pass),
        2 => Just(Step::Restart),
        1 => Just(Step::Unreachable),
        1 => Just(Step::Down),
        1 => Just(Step::LoseAnswer),
        1 => Just(Step::BreakStore),
        1 => Just(Step::Reconnect),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_order_of_events_spends_a_refresh_token_twice(steps in prop::collection::vec(step(), 1..40)) {
        // FUZZ-003
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().start_paused(true).build().unwrap();
        runtime.block_on(run(&steps));
    }
}

async fn run(steps: &[Step]) {
    let mut world = World::new().await;
    let key = world.connect("alice").await;
    let mut last = None;
    let (mut lost, mut broken) = (0, false);
    for step in steps {
        match step {
            Step::Request => {
                // Hands out no expired token: the world looks.
                let got = world.request(&key).await;
                if lost == 0
                    && let Got::Nothing(error) | Got::Unauthorized(Some(NoRenewal::Failed(error))) = got
                {
                    assert_eq!(error.code(), "token_unavailable", "{steps:?}");
                }
                last = world.tokens.bearer(&key).await.ok().or(last);
            }
            Step::Revoke => last.iter().for_each(|bearer| world.server.revoke(bearer)),
            Step::RejectOld => {
                if let Some(bearer) = &last
                    && let Ok(renewed) = world.tokens.renew(&key, bearer).await
                {
                    assert!(!world.server.is_expired(&renewed));
                }
            }
            Step::Pass(seconds) => pass(f64::from(*seconds)).await,
            // A process that ends while a token is in its memory only has lost it; that is C13's to wait for.
            Step::Restart if broken => {}
            Step::Restart => world.restart().await,
            Step::Unreachable => world.server.book().acts.push_back(Act::Refuse),
            Step::Down => world.server.book().acts.push_back(Act::Say(503, &[], "")),
            Step::LoseAnswer => {
                lost += 1;
                world.server.book().acts.push_back(Act::Lose);
            }
            Step::BreakStore if broken => {
                world.repair();
                pass(10.0).await;
                broken = false;
            }
            Step::BreakStore => {
                world.break_rows();
                broken = true;
            }
            Step::Reconnect if broken => {}
            Step::Reconnect => world.import(&key, world.server.grant("alice"), None).await,
        }
    }
    // After a lost answer there is no knowing, and one try (C14).
    assert!(world.server.book().reused <= lost, "{steps:?}");
}
