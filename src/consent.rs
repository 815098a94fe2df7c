//! A user's consent, from the link to the stored grant (RFC 6749 section 4.1 with PKCE, RFC 8628, RFC 9207).
//!
//! What is under way is kept in the store, sealed, so that any process on the same store can finish it. It is found by
//! its `state`, good once, and bound to the browser that began it.

mod api;
pub mod device;
pub mod pages;

use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use axum::Router;
use axum::http::StatusCode;
use dashmap::DashMap;
use dashmap::mapref::entry::Entry;
use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};
use url::Url;

use crate::clock::Clock;
use crate::connections::spoken;
use crate::links::{Invitation, Links};
use crate::names::{ProviderName, Subject, UserName};
use crate::oauth::authorization::{self, Outcome};
use crate::oauth::registration::Registration;
use crate::oauth::wanted::Wanted;
use crate::oauth::{Grant, Provider, is_scope, pkce, union};
use crate::secret::Secret;
use crate::store::{Flow, Most, PROVIDER_CHANGED, State, Store, StoreError, Taken};
use crate::tokens::{GrantError, Granted, Proof, Tokens};
use crate::web::Browser;

/// How long a user may take.
pub const LIVES: Duration = Duration::from_secs(600);
/// So many consents may be under way at once (OAU-019): one user's link can begin any number, and ends nobody else's.
const MOST: Most = Most { flows: 1000, of_one: 20 };
/// How often a second visit looks whether the first one has ended.
const LOOK_AGAIN: Duration = Duration::from_millis(50);

/// Consents. A clone is the same ones.
#[derive(Clone)]
pub struct Consent {
    inner: Arc<Inner>,
}

struct Inner {
    parts: Parts,
    /// How many answers to a flow are being looked at, by its id.
    under_way: Arc<DashMap<[u8; 32], usize>>,
}

/// An answer to a flow that is being looked at, until this goes.
struct UnderWay {
    inner: Arc<Inner>,
    flow: [u8; 32],
}

impl UnderWay {
    fn begin(inner: Arc<Inner>, flow: [u8; 32]) -> Self {
        *inner.under_way.entry(flow).or_insert(0) += 1;
        Self { inner, flow }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        if let Entry::Occupied(mut count) = self.inner.under_way.entry(self.flow) {
            *count.get_mut() -= 1;
            if *count.get() == 0 {
                count.remove();
            }
        }
    }
}

/// What consents work with.
pub struct Parts {
    /// Who gives grants, and where they are used.
    pub tokens: Tokens,
    /// Where what is under way is kept.
    pub store: Store,
    /// The links that lead here.
    pub links: Links,
    /// What time it is.
    pub clock: Clock,
    /// Whom there is to connect.
    pub providers: Vec<Arc<Provider>>,
    /// Where a browser may be sent back to.
    pub return_to: Vec<Url>,
}

/// Who is to consent to what, checked.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The provider.
    pub provider: Arc<Provider>,
    /// The user.
    pub user: UserName,
    /// All that is asked for.
    pub scopes: Vec<String>,
    /// Of these, those that are not in the configuration.
    pub further: Vec<String>,
    /// Where the browser goes afterwards.
    pub return_to: Option<Url>,
    /// Whether the user is connected already.
    pub again: bool,
}

/// A consent that has begun. Nothing prints it.
pub struct Started {
    /// Where the browser goes. It holds the state: for that browser only.
    pub url: Url,
}

/// A consent that has ended well.
#[derive(Debug, Clone)]
pub struct Finished {
    /// The provider.
    pub provider: Arc<Provider>,
    /// Who connected.
    pub user: UserName,
    /// What was granted; nothing when this is a second visit of a finished consent.
    pub granted: Option<Granted>,
    /// Where the browser goes now.
    pub return_to: Option<Url>,
}

/// Why there is no consent.
#[derive(Debug, thiserror::Error)]
pub enum ConsentError {
    /// No such provider, or none that users consent at.
    #[error("no provider named `{0}` has users consent")]
    Unknown(String),
    /// Not a user's name.
    #[error("this is no user's name")]
    User,
    /// Not a scope.
    #[error("this is no scope")]
    Scope,
    /// A page that is not on the list.
    #[error("`return_to` names a page that `proxy.yaml` does not allow")]
    ReturnTo,
    /// It is not known where to send the browser.
    #[error("{0}")]
    Nowhere(String),
    /// The store fails.
    #[error("{0}")]
    Store(#[from] StoreError),
    /// The machine has no randomness.
    #[error("the machine has no randomness: {0}")]
    Randomness(#[from] getrandom::Error),
    /// It answers no consent that is under way.
    #[error("no consent that began here is waiting for this")]
    StateUnknown,
    /// Ten minutes have passed.
    #[error("the consent took longer than {}", spoken(LIVES))]
    StateExpired,
    /// The user has not entered the device's code in time (RFC 8628 section 3.5).
    #[error("the code ended before it was entered")]
    CodeExpired,
    /// It was tried before, and brought nothing.
    #[error("this consent has been used")]
    StateUsed,
    /// It began in another browser.
    #[error("the consent began in another browser")]
    OtherBrowser,
    /// The provider is configured as another server or client since it began.
    #[error("the provider was configured anew while the consent was under way")]
    ProviderChanged,
    /// Another authorization server answered (RFC 9207 section 2.4).
    #[error("another server answered than the one that was asked")]
    IssuerMismatch,
    /// The server names itself in every answer, and not in this one.
    #[error("the answer does not say which server it is from")]
    IssuerMissing,
    /// The user or the provider said no.
    #[error("the provider answered `{error}`")]
    Refused {
        /// Its code.
        error: String,
        /// Its own words.
        description: Option<String>,
        /// Where the browser came from.
        return_to: Option<Box<Url>>,
    },
    /// The code brought no grant.
    #[error("{0}")]
    Exchange(#[from] GrantError),
}

impl ConsentError {
    /// A stable name.
    pub fn code(&self) -> &str {
        match self {
            ConsentError::Unknown(_) => "unknown_provider",
            ConsentError::User => "bad_user",
            ConsentError::Scope => "bad_scope",
            ConsentError::ReturnTo => "return_to_not_allowed",
            ConsentError::Nowhere(_) => "provider_unavailable",
            ConsentError::Store(error) => error.code(),
            ConsentError::Randomness(_) => "no_randomness",
            ConsentError::StateUnknown => "state_unknown",
            ConsentError::StateExpired => "state_expired",
            ConsentError::CodeExpired => "code_expired",
            ConsentError::StateUsed => "state_used",
            ConsentError::OtherBrowser => "other_browser",
            ConsentError::ProviderChanged => PROVIDER_CHANGED,
            ConsentError::IssuerMismatch => "issuer_mismatch",
            ConsentError::IssuerMissing => "issuer_missing",
            ConsentError::Refused { error, .. } => error,
            ConsentError::Exchange(_) => "exchange_failed",
        }
    }

    /// The status of an answer that tells it.
    pub fn status(&self) -> StatusCode {
        match self {
            ConsentError::Unknown(_) => StatusCode::NOT_FOUND,
            ConsentError::Nowhere(_) => StatusCode::BAD_GATEWAY,
            ConsentError::Store(_) | ConsentError::Randomness(_) => StatusCode::INTERNAL_SERVER_ERROR,
            _ => StatusCode::BAD_REQUEST,
        }
    }

    /// What to do about it.
    pub fn hint(&self) -> String {
        match self {
            ConsentError::Unknown(_) => "providers with `authorization_code:` in `proxy.yaml` can be connected".into(),
            ConsentError::User => "a user's name has 1 to 1024 bytes and no control characters".into(),
            ConsentError::Scope => "a scope is printable ASCII without spaces, `\"` and `\\`".into(),
            ConsentError::ReturnTo => "the operator adds it under `return_to` in `proxy.yaml`".into(),
            ConsentError::Nowhere(_) => {
                "try again; if it stays, the operator checks the provider's endpoints in `proxy.yaml`".into()
            }
            ConsentError::Store(error) => error.hint(),
            ConsentError::Randomness(_) => "report it".into(),
            ConsentError::StateUnknown
            | ConsentError::StateExpired
            | ConsentError::StateUsed
            | ConsentError::OtherBrowser
            | ConsentError::ProviderChanged => {
                "start again, with the link that you were given or from the dashboard".into()
            }
            ConsentError::CodeExpired => "start again, and enter the new code in time".into(),
            ConsentError::IssuerMismatch | ConsentError::IssuerMissing => {
                "do not try again until the operator has looked at it: somebody may have mixed two providers up, or \
                 `issuer` in `proxy.yaml` is not what the provider calls itself"
                    .into()
            }
            ConsentError::Refused { error, .. } if error == "access_denied" => {
                "nothing was changed; to connect after all, start again and say yes".into()
            }
            ConsentError::Refused { error, .. } if error == "invalid_scope" => {
                "the provider does not know a scope that was asked for: the operator corrects `scopes` in `proxy.yaml`"
                    .into()
            }
            ConsentError::Refused { .. } => {
                "start again; if it stays, the operator compares the client's registration with `proxy.yaml`".into()
            }
            ConsentError::Exchange(GrantError::Store(error)) => error.hint(),
            ConsentError::Exchange(_) => {
                "start again; if it stays, the operator checks `client_id`, `client_secret` and `client_auth`".into()
            }
        }
    }
}

/// A flow, as it is kept.
#[derive(Serialize, Deserialize)]
struct Kept {
    provider: String,
    user: String,
    #[serde(with = "exposed")]
    verifier: Secret,
    redirect_uri: String,
    further: Vec<String>,
    return_to: Option<Url>,
    /// Of the browser that began; none when a program did, which waits for the answer itself.
    browser: Option<String>,
    issuer: Option<String>,
    names_itself: bool,
    /// At which server, and of which client; none in one that an older version began.
    #[serde(default)]
    registration: Option<String>,
    /// Seconds since 1970.
    began: u64,
}

/// A secret within a text that is sealed as a whole.
mod exposed {
    use serde::{Deserialize, Deserializer, Serializer};

    use crate::secret::Secret;

    pub fn serialize<S: Serializer>(secret: &Secret, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(secret.expose())
    }

    pub fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Secret, D::Error> {
        String::deserialize(deserializer).map(Secret::new)
    }
}

/// What a browser brought back.
struct Returned {
    /// The path that it came to.
    at: String,
    response: authorization::Response,
    /// Which browser it is, as a flow keeps it.
    browser: Option<String>,
}

impl Consent {
    /// Puts the parts together.
    pub fn new(parts: Parts) -> Self {
        Self { inner: Arc::new(Inner { parts, under_way: Arc::default() }) }
    }

    /// The same consents, which from now on work with these parts.
    pub fn reconfigured(&self, parts: Parts) -> Self {
        Self { inner: Arc::new(Inner { parts, under_way: self.inner.under_way.clone() }) }
    }

    /// Its pages and its one call. They need the guard before them.
    pub fn router(&self) -> Router {
        pages::router(self.clone()).merge(api::router(self.clone()))
    }

    /// Checks who is to consent to what.
    ///
    /// # Errors
    /// When that cannot be.
    pub async fn plan(&self, provider: &str, invitation: &Invitation) -> Result<Plan, ConsentError> {
        let provider = self.provider(provider)?;
        let user = match invitation.user.as_str() {
            "" => UserName::default(),
            name => name.parse().map_err(|_| ConsentError::User)?,
        };
        if !invitation.scopes.iter().all(|scope| is_scope(scope)) {
            return Err(ConsentError::Scope);
        }
        let return_to = invitation.return_to.as_deref().map(|page| self.allowed(page)).transpose()?;
        let subject = Subject::User(user.clone());
        // A row that does not open can be replaced like any other.
        let row = self.inner.parts.store.grant(&provider.name, &subject).await.ok().flatten();
        // What was granted at another server, or to another client, says nothing of this one.
        let (registration, wanted) = (Registration::of(&provider), Wanted::of(&provider));
        let row = row.filter(|row| row.is_of(registration));
        let mut further =
            union(&invitation.scopes, row.as_ref().map(|row| row.further_scopes.as_slice()).unwrap_or_default());
        further.retain(|scope| !provider.target.scopes.contains(scope));
        let scopes = union(&provider.target.scopes, &further);
        let again = row.is_some_and(|row| row.state_for(registration, wanted) == State::Connected);
        Ok(Plan { provider, user, scopes, further, return_to, again })
    }

    /// Where the browser of a plan will go.
    ///
    /// # Errors
    /// When that is not known.
    pub async fn destination(&self, plan: &Plan) -> Result<Url, ConsentError> {
        let authorizer = self.inner.parts.tokens.authorizer(&plan.provider.name).await;
        authorizer.map(|authorizer| authorizer.endpoint).map_err(ConsentError::Nowhere)
    }

    /// Begins: keeps what the answer will be held against, and says where the browser goes.
    ///
    /// # Errors
    /// When it cannot be kept, or it is not known where to go.
    pub async fn start(
        &self,
        plan: &Plan,
        redirect_uri: &str,
        browser: Option<&Browser>,
    ) -> Result<Started, ConsentError> {
        let Parts { tokens, store, clock, .. } = &self.inner.parts;
        let authorizer = tokens.authorizer(&plan.provider.name).await.map_err(ConsentError::Nowhere)?;
        let (state, verifier) = (Secret::random()?, pkce::verifier()?);
        let now = clock.now().wall;
        let kept = Kept {
            provider: plan.provider.name.to_string(),
            user: plan.user.to_string(),
            verifier: verifier.clone(),
            redirect_uri: redirect_uri.to_owned(),
            further: plan.further.clone(),
            return_to: plan.return_to.clone(),
            browser: browser.map(Browser::binding),
            issuer: authorizer.issuer,
            names_itself: authorizer.names_itself,
            registration: Some(Registration::of(&plan.provider).to_string()),
            began: seconds(now),
        };
        let content = Secret::new(serde_json::to_string(&kept).expect("a flow is JSON"));
        let flow = Flow { id: id(&state), content, expires_at: now + LIVES };
        let whose = (plan.provider.name.clone(), Subject::User(plan.user.clone()));
        store.put_flow(flow, whose, MOST, now).await?;
        let request = authorization::Request { redirect_uri, scopes: &plan.scopes, state: &state, verifier: &verifier };
        Ok(Started { url: authorization::url(&plan.provider, &authorizer.endpoint, &request) })
    }

    /// Ends: holds what a browser brought back to the path `at` against what was kept, and only then redeems the code.
    ///
    /// # Errors
    /// Anything that does not fit, or brings no grant.
    pub async fn finish(&self, at: &str, query: &str, browser: Option<&Browser>) -> Result<Finished, ConsentError> {
        let response = authorization::read(query).ok_or(ConsentError::StateUnknown)?;
        // Before the flow is taken: a second visit that finds it taken waits for this one.
        let under_way = UnderWay::begin(self.inner.clone(), id(&response.state));
        let returned = Returned { at: at.to_owned(), response, browser: browser.map(Browser::binding) };
        let consent = self.clone();
        // In a task of its own: a second click cancels the first one's request, and the flow is good once.
        let ending = tokio::spawn(async move { consent.end(returned, under_way).await });
        ending.await.map_err(|_| ConsentError::Nowhere("the consent broke off".into()))?
    }

    async fn end(&self, returned: Returned, under_way: UnderWay) -> Result<Finished, ConsentError> {
        let Returned { at, response, browser } = returned;
        let now = self.inner.parts.clock.now().wall;
        let (flow, first) = match self.inner.parts.store.take_flow(under_way.flow, now).await? {
            Taken::Flow(flow) => (flow, true),
            Taken::Again(flow) => (flow, false),
            Taken::Expired => return Err(ConsentError::StateExpired),
            Taken::No => return Err(ConsentError::StateUnknown),
        };
        let kept: Kept = serde_json::from_str(flow.content.expose()).map_err(|_| ConsentError::StateUnknown)?;
        let provider = self.provider(&kept.provider)?;
        let registration = Registration::of(&provider).to_string();
        if kept.registration.as_ref().is_some_and(|its| *its != registration) {
            // Its code is another server's, and shown to none but that.
            return Err(ConsentError::ProviderChanged);
        }
        if kept.browser != browser {
            return Err(ConsentError::OtherBrowser);
        }
        // Each provider has a redirect URI of its own: an answer at another's is a mix-up (RFC 9700 section 4.4).
        if Url::parse(&kept.redirect_uri).map_or(true, |asked| asked.path() != at) {
            return Err(ConsentError::IssuerMismatch);
        }
        let user: UserName = kept.user.parse().map_err(|_| ConsentError::User)?;
        if !first {
            return self.again(provider, user, kept, under_way).await;
        }
        match (&response.iss, &kept.issuer) {
            (Some(iss), Some(issuer)) if iss != issuer => {
                return Err(ConsentError::IssuerMismatch);
            }
            (None, Some(_)) if kept.names_itself => return Err(ConsentError::IssuerMissing),
            _ => {}
        }
        let code = match response.outcome {
            Outcome::Code(code) => code,
            Outcome::Refused { error, description } => {
                tracing::info!(provider = %provider.name, user = ?user, error, "a consent was refused");
                return Err(ConsentError::Refused { error, description, return_to: kept.return_to.map(Box::new) });
            }
        };
        let proof = Proof::Code { code, verifier: kept.verifier, redirect_uri: kept.redirect_uri };
        let granted = self.inner.parts.tokens.grant(&provider.name, &user, proof, kept.further).await?;
        tracing::info!(provider = %provider.name, user = ?user, scopes = granted.scopes.join(" "), "connected");
        Ok(Finished { provider, user, granted: Some(granted), return_to: kept.return_to })
    }

    /// A second visit by the same browser: a double click, or the back button (OAU-006).
    async fn again(
        &self,
        provider: Arc<Provider>,
        user: UserName,
        kept: Kept,
        under_way: UnderWay,
    ) -> Result<Finished, ConsentError> {
        let flow = under_way.flow;
        drop(under_way);
        while self.inner.under_way.contains_key(&flow) {
            tokio::time::sleep(LOOK_AGAIN).await;
        }
        let row = self.inner.parts.store.grant(&provider.name, &Subject::User(user.clone())).await?;
        let came_of_it = row.is_some_and(|row| row.state == State::Connected && seconds(row.stored_at) >= kept.began);
        if !came_of_it {
            return Err(ConsentError::StateUsed);
        }
        Ok(Finished { provider, user, granted: None, return_to: kept.return_to })
    }

    fn provider(&self, name: &str) -> Result<Arc<Provider>, ConsentError> {
        let known = self.inner.parts.providers.iter().find(|provider| provider.name.as_str() == name);
        let consents = known.filter(|provider| provider.grant == Grant::AuthorizationCode);
        // Anybody may ask for it, and the log says so: it must not look like two lines of it.
        let shown = || name.chars().take(64).flat_map(char::escape_debug).collect();
        consents.cloned().ok_or_else(|| ConsentError::Unknown(shown()))
    }

    /// Where the answer to the sidecar itself goes: from the configuration, never from a Host (OAU-008).
    fn redirect_uri(&self, provider: &Provider) -> String {
        match &provider.consent.redirect_uri {
            Some(uri) => uri.to_string(),
            None => {
                let mut uri = self.inner.parts.links.base().clone();
                uri.set_path(&format!("/callback/{}", provider.name));
                uri.to_string()
            }
        }
    }

    /// A page that a browser may be sent back to: one of the list, or below one that ends with `/`.
    fn allowed(&self, page: &str) -> Result<Url, ConsentError> {
        let url = Url::parse(page).map_err(|_| ConsentError::ReturnTo)?;
        let plain = url.username().is_empty() && url.password().is_none() && url.fragment().is_none();
        let covers = |listed: &Url| {
            let here = listed.origin() == url.origin();
            let below = listed.path().ends_with('/') && url.path().starts_with(listed.path());
            here && (below || listed.path() == url.path())
        };
        let allowed = plain && self.inner.parts.return_to.iter().any(covers);
        if allowed { Ok(url) } else { Err(ConsentError::ReturnTo) }
    }
}

/// A page with how the consent ended in its query.
fn returned(mut page: Url, outcome: &str, provider: &ProviderName) -> Url {
    page.query_pairs_mut().append_pair("integration", outcome).append_pair("provider", provider.as_str());
    page
}

fn id(state: &Secret) -> [u8; 32] {
    Sha256::digest(state.expose().as_bytes()).into()
}

fn seconds(time: SystemTime) -> u64 {
    time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs()
}
