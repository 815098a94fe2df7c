//! The pages of a consent: what is asked for, and how it ended.

use askama::Template;
use axum::Router;
use axum::extract::{Extension, Form, Path, Query, State};
use axum::http::header::{CONTENT_SECURITY_POLICY, LOCATION};
use axum::http::{HeaderMap, HeaderValue, StatusCode, Uri};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use serde::Deserialize;
use url::Url;

use super::{Consent, ConsentError, Finished, Plan, returned};
use crate::connections::spoken;
use crate::links::Invitation;
use crate::web::{self, Authorized, Browser, CONTENT_POLICY};

/// What was to be connected, where that is not known.
const SOME_ACCOUNT: &str = "The account";

/// The pages of a consent.
pub(super) fn router(consent: Consent) -> Router {
    Router::new()
        .route("/connect", get(chosen))
        .route("/connect/{provider}", get(ask).post(begin))
        .route("/callback", get(end_anywhere))
        .route("/callback/{provider}", get(end))
        .with_state(consent)
}

/// The page that says what will be asked for.
#[derive(Template)]
#[template(path = "connect.html", config = "src/pages/askama.toml")]
struct Connect<'a> {
    title: &'a str,
    provider: &'a str,
    user: &'a str,
    scopes: &'a [String],
    host: String,
    csrf: String,
    ticket: Option<&'a str>,
    scope: String,
    return_to: Option<&'a str>,
    again: bool,
}

/// The page that says how it ended.
#[derive(Template)]
#[template(path = "outcome.html", config = "src/pages/askama.toml")]
pub struct Outcome {
    good: bool,
    heading: String,
    user: String,
    title: String,
    scopes: Vec<String>,
    lives: Option<String>,
    code: Option<String>,
    said: Option<String>,
    todo: String,
    back: Option<Back>,
    closable: bool,
}

/// A link that leads on.
struct Back {
    href: String,
    label: String,
}

/// What a link or a form asks for. Nothing prints it: a ticket lets whoever has it connect an account.
#[derive(Default, Deserialize)]
struct Wish {
    provider: Option<String>,
    user: Option<String>,
    scope: Option<String>,
    return_to: Option<String>,
    ticket: Option<String>,
    csrf: Option<String>,
}

/// A form of the dashboard, on its way to the page of its provider.
async fn chosen(State(consent): State<Consent>, Query(wish): Query<Wish>) -> Response {
    let provider = match consent.provider(&wish.provider.unwrap_or_default()) {
        Ok(provider) => provider.name.clone(),
        Err(error) => return failed(SOME_ACCOUNT, &error),
    };
    let query = url::form_urlencoded::Serializer::new(String::new())
        .append_pair("user", wish.user.unwrap_or_default().trim())
        .finish();
    see_other(&format!("/connect/{provider}?{query}"))
}

async fn ask(
    State(consent): State<Consent>,
    Path(provider): Path<String>,
    Query(wish): Query<Wish>,
    Extension(authorized): Extension<Authorized>,
    headers: HeaderMap,
) -> Response {
    let invitation = match invited(&consent, &provider, &wish, authorized) {
        Ok(invitation) => invitation,
        Err(refused) => return *refused,
    };
    match asked(&consent, &provider, &invitation, &wish, &headers).await {
        Ok(page) => page,
        Err(error) => failed(&title(&consent, &provider), &error),
    }
}

async fn asked(
    consent: &Consent,
    provider: &str,
    invitation: &Invitation,
    wish: &Wish,
    headers: &HeaderMap,
) -> Result<Response, ConsentError> {
    let plan = consent.plan(provider, invitation).await?;
    let destination = consent.destination(&plan).await?;
    let browser = Browser::of(headers, consent.inner.parts.links.base())?;
    let page = Connect {
        title: &plan.provider.title,
        provider,
        user: plan.user.as_str(),
        scopes: &plan.scopes,
        host: destination.host_str().unwrap_or_default().to_owned(),
        csrf: browser.csrf(),
        ticket: wish.ticket.as_deref(),
        scope: invitation.scopes.join(" "),
        return_to: invitation.return_to.as_deref(),
        again: plan.again,
    };
    let mut response = web::page(StatusCode::OK, &page);
    // A browser holds every redirect behind a form against `form-action`, also those from one server of the provider's to
    // the next, and nobody knows their names in advance.
    let policy = CONTENT_POLICY.replace("form-action 'self'; ", "");
    response.headers_mut().extend(HeaderValue::try_from(policy).map(|policy| (CONTENT_SECURITY_POLICY, policy)));
    browser.remember(&mut response, consent.inner.parts.links.base());
    Ok(response)
}

async fn begin(
    State(consent): State<Consent>,
    Path(provider): Path<String>,
    Extension(authorized): Extension<Authorized>,
    headers: HeaderMap,
    Form(wish): Form<Wish>,
) -> Response {
    let browser = Browser::known(&headers, consent.inner.parts.links.base())
        .filter(|browser| browser.sent(wish.csrf.as_deref().unwrap_or_default()));
    let Some(browser) = browser else {
        let said = "The form did not come from a page that this browser got here.";
        return web::refusal(
            StatusCode::FORBIDDEN,
            "Start again",
            said,
            "Allow cookies for this site, and open the link once more.",
        );
    };
    let invitation = match invited(&consent, &provider, &wish, authorized) {
        Ok(invitation) => invitation,
        Err(refused) => return *refused,
    };
    let started = async {
        let plan = consent.plan(&provider, &invitation).await?;
        consent.start(&plan, &consent.redirect_uri(&plan.provider), Some(&browser)).await
    };
    match started.await {
        Ok(started) => see_other(started.url.as_str()),
        Err(error) => failed(&title(&consent, &provider), &error),
    }
}

async fn end(State(consent): State<Consent>, Path(provider): Path<String>, at: Uri, headers: HeaderMap) -> Response {
    ended(&consent, &title(&consent, &provider), &at, &headers).await
}

async fn end_anywhere(State(consent): State<Consent>, at: Uri, headers: HeaderMap) -> Response {
    ended(&consent, SOME_ACCOUNT, &at, &headers).await
}

async fn ended(consent: &Consent, title: &str, at: &Uri, headers: &HeaderMap) -> Response {
    let browser = Browser::known(headers, consent.inner.parts.links.base());
    let finished = consent.finish(at.path(), at.query().unwrap_or_default(), browser.as_ref()).await;
    match finished {
        Ok(Finished { return_to: Some(page), provider, .. }) => {
            see_other(returned(page, "connected", &provider.name).as_str())
        }
        Ok(finished) => {
            let mut page = Outcome::of(&finished);
            page.back = Some(Back { href: "/".into(), label: "To the dashboard".into() });
            web::page(StatusCode::OK, &page)
        }
        Err(error) => failed(title, &error),
    }
}

/// What the link invites to: as its ticket says, or as it says itself to somebody who may invite.
fn invited(
    consent: &Consent,
    provider: &str,
    wish: &Wish,
    authorized: Authorized,
) -> Result<Invitation, Box<Response>> {
    if let Some(ticket) = &wish.ticket {
        let now = consent.inner.parts.clock.now().wall;
        let invitation = provider.parse().ok().and_then(|name| consent.inner.parts.links.redeem(&name, ticket, now));
        return invitation.ok_or_else(|| {
            let said = "The link has ended, or is not whole.";
            Box::new(web::refusal(StatusCode::FORBIDDEN, "This link is not good any more", said, "Ask for a new one."))
        });
    }
    if authorized != Authorized(true) {
        return Err(Box::new(web::unauthorized()));
    }
    let scopes = wish.scope.as_deref().unwrap_or_default().split_whitespace().map(str::to_owned).collect();
    let return_to = wish.return_to.clone().filter(|page| !page.is_empty());
    Ok(Invitation { user: wish.user.clone().unwrap_or_default(), scopes, return_to })
}

impl Outcome {
    /// Of a consent that ended well.
    pub fn of(finished: &Finished) -> Self {
        let title = finished.provider.title.clone();
        let granted = finished.granted.as_ref();
        Self {
            good: true,
            heading: match granted {
                Some(_) => format!("{title} is connected"),
                None => format!("{title} is already connected"),
            },
            user: finished.user.to_string(),
            title,
            scopes: granted.map(|granted| granted.scopes.clone()).unwrap_or_default(),
            lives: granted.and_then(|granted| granted.lifetime).map(spoken),
            code: None,
            said: None,
            todo: match granted {
                Some(granted) if !granted.renewable && granted.lifetime.is_some() => {
                    "The provider gave nothing to renew it with: it ends with its token.".into()
                }
                _ => String::new(),
            },
            back: None,
            closable: true,
        }
    }

    /// Of one that did not. `title` is what was to be connected.
    pub fn failed(title: &str, error: &ConsentError) -> Self {
        let (said, back) = match error {
            ConsentError::Refused { description, return_to, .. } => (description.clone(), return_to.clone()),
            _ => (None, None),
        };
        let href = |mut page: Box<Url>| {
            page.query_pairs_mut().append_pair("integration", "failed").append_pair("error", error.code());
            page.to_string()
        };
        Self {
            good: false,
            heading: format!("{title} is not connected"),
            user: String::new(),
            title: String::new(),
            scopes: Vec::new(),
            lives: None,
            code: Some(error.code().to_owned()),
            said,
            todo: sentence(&format!("{error}: {}", error.hint())),
            back: back.map(|page| Back { href: href(page), label: "Back to the application".into() }),
            closable: true,
        }
    }
}

fn failed(title: &str, error: &ConsentError) -> Response {
    tracing::warn!(title, code = error.code(), %error, "a consent failed");
    web::page(error.status(), &Outcome::failed(title, error))
}

fn title(consent: &Consent, provider: &str) -> String {
    let known = consent.inner.parts.providers.iter().find(|known| known.name.as_str() == provider);
    known.map_or_else(|| SOME_ACCOUNT.to_owned(), |known| known.title.clone())
}

/// As people write it.
fn sentence(text: &str) -> String {
    // Marks of a terminal's, which a page has no use for.
    let text = text.replace('`', "");
    let mut characters = text.chars();
    let first = characters.next().map(|first| first.to_uppercase().to_string()).unwrap_or_default();
    format!("{first}{}.", characters.as_str())
}

fn see_other(to: &str) -> Response {
    match HeaderValue::try_from(to) {
        Ok(mut to) => {
            to.set_sensitive(true);
            (StatusCode::SEE_OTHER, [(LOCATION, to)]).into_response()
        }
        Err(_) => StatusCode::INTERNAL_SERVER_ERROR.into_response(),
    }
}

impl Plan {
    /// What is asked for, in words.
    pub fn words(&self) -> String {
        if self.scopes.is_empty() { "its usual scopes".into() } else { self.scopes.join(" ") }
    }
}
