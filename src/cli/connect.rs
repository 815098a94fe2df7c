//! `sidebearer connect`: a user consents in their browser, or on another device, and the grant is stored.

use std::io::{self, IsTerminal};
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use askama::Template;
use axum::Router;
use axum::extract::State;
use axum::http::{HeaderValue, StatusCode, Uri, header};
use axum::response::{Html, IntoResponse, Response};
use axum::routing::get;
use indicatif::ProgressBar;
use tokio::sync::mpsc;
use url::Url;

use super::CliError;
use crate::app::{self, Desk};
use crate::config::Settings;
use crate::connections::spoken;
use crate::consent::pages::Outcome;
use crate::consent::{Consent, ConsentError, Finished, Plan};
use crate::drain::Drain;
use crate::limits::Limits;
use crate::links::Invitation;
use crate::listen::{Listener, Place};
use crate::names::{ProviderName, UserName};
use crate::oauth::{Grant, Provider};
use crate::web;

/// How long the user may take in the browser.
const PATIENCE: Duration = Duration::from_secs(300);

/// Who connects what, and how.
#[derive(clap::Args)]
pub(super) struct Options {
    /// A provider of proxy.yaml.
    provider: ProviderName,
    /// Who connects.
    #[arg(long, default_value_t, value_name = "NAME")]
    user: UserName,
    /// A scope to ask for besides the configured ones; may be given again.
    #[arg(long = "scope", value_name = "SCOPE")]
    scopes: Vec<String>,
    /// Consent on another device, with a code.
    #[arg(long)]
    device: bool,
    /// Print the link and open no browser.
    #[arg(long)]
    no_browser: bool,
}

/// Connects, and says what was granted.
pub(super) async fn connect(settings: &Settings, options: &Options) -> Result<u8, CliError> {
    consents(super::provider(settings, &options.provider)?)?;
    let Desk { consent, drain, .. } = app::desk(settings).await?;
    let invitation = Invitation { user: options.user.to_string(), scopes: options.scopes.clone(), return_to: None };
    let plan = consent.plan(options.provider.as_str(), &invitation).await.map_err(failed)?;
    let finished = match options.device {
        true => on_another_device(&consent, &plan).await,
        false => in_a_browser(&consent, &plan, !options.no_browser, &drain).await,
    };
    // A grant that is being stored must become durable, and the last page must reach its browser.
    drain.finish(settings.drain).await;
    let finished = finished?;
    let granted = finished.granted.as_ref();
    let scopes = granted.map(|granted| granted.scopes.join(" ")).filter(|scopes| !scopes.is_empty());
    let lives = granted.and_then(|granted| granted.lifetime).map(spoken);
    let lives = lives.map_or("the token has no known end".to_owned(), |lives| format!("the token is good for {lives}"));
    let scopes = scopes.map(|scopes| format!("{scopes}; ")).unwrap_or_default();
    anstream::println!("connected `{}` for `{}`: {scopes}{lives}", finished.provider.name, finished.user);
    Ok(0)
}

fn consents(provider: &Provider) -> Result<(), CliError> {
    let name = &provider.name;
    match provider.grant {
        Grant::AuthorizationCode => Ok(()),
        Grant::ClientCredentials => Err(CliError::failed(
            format!("`{name}` uses client credentials: there is nobody to connect"),
            format!("write `authorization_code: {{}}` under `providers.{name}` to have users consent"),
        )),
        Grant::RefreshToken => Err(CliError::failed(
            format!("`{name}` is given its refresh tokens by `sidebearer import`"),
            format!("write `authorization_code: {{}}` under `providers.{name}` to have users consent"),
        )),
    }
}

/// With a loopback redirect (RFC 8252 section 7.3): on any port, or the one that the provider insists on.
async fn in_a_browser(consent: &Consent, plan: &Plan, open_it: bool, drain: &Drain) -> Result<Finished, CliError> {
    let (listener, redirect_uri) = listen(plan).await?;
    let started = consent.start(plan, &redirect_uri, None).await.map_err(failed)?;
    let (ended, mut outcome) = mpsc::channel(1);
    let path = Url::parse(&redirect_uri).map(|uri| uri.path().to_owned()).unwrap_or_default();
    let desk = Callback { consent: consent.clone(), title: plan.provider.title.clone(), ended };
    let router = Router::new()
        .route(&path, get(callback))
        .route(
            "/style.css",
            get(|| async { ([(header::CONTENT_TYPE, "text/css")], include_str!("../pages/style.css")) }),
        )
        .with_state(desk.clone());
    tokio::spawn(web::serve(listener, router, drain.clone(), Limits::default().head_timeout));

    let opened = open_it && open::that_detached(started.url.as_str()).is_ok();
    anstream::eprintln!("open {}", started.url);
    if !opened {
        anstream::eprintln!("If that browser is on another machine, paste the address at which it ends here.");
    }
    let waiting = spinner(&format!("waiting for `{}` to connect {}: {}", plan.user, plan.provider.title, plan.words()));
    let finished = tokio::select! {
        finished = outcome.recv() => finished.unwrap_or(Err(ConsentError::StateUnknown)),
        finished = pasted(&desk) => finished,
        () = tokio::time::sleep(PATIENCE) => {
            waiting.finish_and_clear();
            let what = format!("nobody has consented within {}", spoken(PATIENCE));
            return Err(CliError::failed(what, "run it again; with `--device`, another device will do"));
        }
        _ = tokio::signal::ctrl_c() => {
            waiting.finish_and_clear();
            return Err(CliError::failed("stopped before anybody consented", "run it again"));
        }
    };
    waiting.finish_and_clear();
    finished.map_err(failed)
}

/// A listener for the redirect, and its URI.
async fn listen(plan: &Plan) -> Result<(Listener, String), CliError> {
    let wanted = plan.provider.consent.redirect_uri.as_ref();
    let port = match wanted {
        None => 0,
        Some(uri) if uri.scheme() == "http" => uri.port_or_known_default().unwrap_or(80),
        Some(uri) => {
            let what = format!("the provider sends the browser to {uri}, which is not this command");
            return Err(CliError::failed(what, "connect from the dashboard of the sidecar that answers there"));
        }
    };
    let cannot = |error: io::Error| {
        let hint = match wanted {
            Some(_) => "end what listens there: if it is a sidecar, connect from its dashboard",
            None => "it needs a free port on 127.0.0.1",
        };
        CliError::failed(format!("cannot listen on 127.0.0.1:{port}: {error}"), hint)
    };
    let place = Place::Tcp(SocketAddr::from((Ipv4Addr::LOCALHOST, port)));
    let listener = Listener::bind(&place).await.map_err(cannot)?;
    let redirect_uri = wanted.map_or_else(|| format!("http://{}/callback", listener.place()), Url::to_string);
    Ok((listener, redirect_uri))
}

/// What the browser comes back to.
#[derive(Clone)]
struct Callback {
    consent: Consent,
    title: String,
    ended: mpsc::Sender<Result<Finished, ConsentError>>,
}

/// Shows how it ended, and ends the command. An answer to nothing of ours is shown and waited past: any page can send one.
async fn callback(State(desk): State<Callback>, at: Uri) -> Response {
    let finished = desk.consent.finish(at.path(), at.query().unwrap_or_default(), None).await;
    let page = match &finished {
        Ok(finished) => Outcome::of(finished),
        Err(error) => Outcome::failed(&desk.title, error),
    };
    let status = if finished.is_ok() { StatusCode::OK } else { StatusCode::BAD_REQUEST };
    let mut response = (status, Html(page.render().unwrap_or_default())).into_response();
    web::secure(response.headers_mut());
    response.headers_mut().insert(header::CONNECTION, HeaderValue::from_static("close"));
    if !matches!(finished, Err(ConsentError::StateUnknown)) {
        let _ = desk.ended.try_send(finished);
    }
    response
}

/// The address that a browser on another machine ended at, pasted; never without a line that is one.
async fn pasted(desk: &Callback) -> Result<Finished, ConsentError> {
    let (read, mut lines) = mpsc::channel(1);
    // In a thread of its own: nothing can end a read of standard input, and the command must not wait for it.
    std::thread::spawn(move || {
        for line in io::stdin().lines().map_while(Result::ok) {
            if read.blocking_send(line).is_err() {
                return;
            }
        }
    });
    while let Some(line) = lines.recv().await {
        let Ok(at) = Url::parse(line.trim()) else { continue };
        let Some(query) = at.query() else { continue };
        match desk.consent.finish(at.path(), query, None).await {
            Err(ConsentError::StateUnknown) => anstream::eprintln!("that is not the address of this consent"),
            finished => return finished,
        }
    }
    std::future::pending().await
}

async fn on_another_device(consent: &Consent, plan: &Plan) -> Result<Finished, CliError> {
    let authorization = consent.device(plan).await.map_err(|error| match error {
        ConsentError::Nowhere(why) => CliError::failed(why, "connect without `--device`"),
        other => failed(other),
    })?;
    let whole = authorization.verification_uri_complete.as_ref();
    if io::stderr().is_terminal()
        && let Ok(code) = qrcode::QrCode::new(whole.unwrap_or(&authorization.verification_uri).as_str())
    {
        anstream::eprintln!("{}", code.render::<qrcode::render::unicode::Dense1x2>().quiet_zone(true).build());
    }
    anstream::eprintln!("open {}", authorization.verification_uri);
    anstream::eprintln!("code {}", authorization.user_code);
    let lives = spoken(authorization.expires_in);
    let waiting = spinner(&format!(
        "waiting for `{}` to connect {}; the code is good for {lives}",
        plan.user, plan.provider.title
    ));
    let finished = tokio::select! {
        finished = consent.await_device(plan, &authorization) => finished,
        _ = tokio::signal::ctrl_c() => {
            waiting.finish_and_clear();
            return Err(CliError::failed("stopped before anybody consented", "run it again"));
        }
    };
    waiting.finish_and_clear();
    finished.map_err(failed)
}

/// Something that moves while nothing else does; nothing where nobody looks.
fn spinner(message: &str) -> ProgressBar {
    let bar = ProgressBar::new_spinner();
    bar.set_message(message.to_owned());
    bar.enable_steady_tick(Duration::from_millis(120));
    bar
}

fn failed(error: ConsentError) -> CliError {
    let said = match &error {
        ConsentError::Refused { description: Some(said), .. } => format!("; it says: {said}"),
        _ => String::new(),
    };
    CliError::failed(format!("not connected: {error}{said}"), error.hint())
}
