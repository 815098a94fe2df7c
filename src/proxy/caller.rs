//! Who sends a request, and for whom: any caller when there are no agents, else one that proves who it is.

use std::fmt;
use std::sync::Arc;

use base64::Engine;
use base64::prelude::BASE64_STANDARD;
use http::HeaderMap;
use http::header::PROXY_AUTHORIZATION;
use zeroize::Zeroizing;

use super::reject::Reject;
use crate::names::{ProviderName, UserName};
use crate::secret::Secret;

/// One entry of `agents:` in `proxy.yaml`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Agent {
    /// What logs call it.
    pub name: String,
    /// The password of its proxy credentials: it says which agent this is.
    pub secret: Secret,
    /// For whom it may act.
    pub users: Users,
    /// Whose tokens it may use; all when there is no list.
    pub providers: Option<Vec<ProviderName>>,
}

/// For whom an agent may act.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Users {
    /// For everyone.
    All,
    /// For these.
    These(Vec<UserName>),
}

impl Users {
    /// Whether this is one of them.
    pub fn allow(&self, user: &UserName) -> bool {
        match self {
            Users::All => true,
            Users::These(these) => these.contains(user),
        }
    }
}

/// Who comes in at a listener, where it is the listener that says so.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Entrance {
    /// For whom its callers act, with no credentials.
    pub user: Option<UserName>,
    /// Which agent they are.
    pub agent: Option<Arc<Agent>>,
    /// Nobody does any more: the configuration that it is of has gone, and the listener is still there.
    pub shut: bool,
}

/// Who sends a request, and for whom.
#[derive(Clone)]
pub(super) struct Caller {
    /// For whom.
    pub user: UserName,
    agent: Option<Arc<Agent>>,
    /// Whether it has shown its agent's secret, and no listener has said who it is.
    proven: bool,
}

impl Caller {
    /// Whether the caller may use a provider's tokens.
    ///
    /// # Errors
    /// When its agent may not.
    pub fn may_use(&self, provider: &ProviderName) -> Result<(), Reject> {
        match self.agent.as_ref().and_then(|agent| Some((agent, agent.providers.as_ref()?))) {
            Some((agent, allowed)) if !allowed.contains(provider) => {
                Err(Reject::ProviderNotAllowed { agent: agent.name.clone(), provider: provider.clone() })
            }
            _ => Ok(()),
        }
    }

    /// The agent's name, if it has one.
    pub fn agent(&self) -> Option<&str> {
        self.agent.as_ref().map(|agent| agent.name.as_str())
    }
}

impl fmt::Debug for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} for {:?}", self.agent(), self.user)
    }
}

/// The door: knows the agents, and whom to act for where there are none.
pub(super) struct Door {
    agents: Vec<Arc<Agent>>,
    user: UserName,
}

impl Door {
    pub fn new(agents: Vec<Arc<Agent>>, user: UserName) -> Self {
        Self { agents, user }
    }

    /// Who sends a request with these fields. Every request is looked at anew: a connection proves nothing (LST-009).
    ///
    /// # Errors
    /// 407 without credentials that are right, and 403 for a user that the agent may not act for.
    pub fn admit(&self, entrance: &Entrance, headers: &HeaderMap) -> Result<Caller, Reject> {
        if let Some(caller) = self.told(entrance)? {
            return Ok(caller);
        }
        let mut fields = headers.get_all(PROXY_AUTHORIZATION).iter();
        let Some(given) = fields.next() else { return Err(Reject::Unauthenticated { wrong: false }) };
        // Two would be two users to two readers.
        let credentials = Credentials::read(given.as_bytes()).filter(|_| fields.next().is_none());
        let known = credentials.and_then(|given| Some((self.agent(&given.secret)?, given.user)));
        let (agent, user) = known.ok_or(Reject::Unauthenticated { wrong: true })?;
        let user = match (user.as_str(), &agent.users) {
            // A client that can send no user name: it is clear whom it means when there is one only.
            ("", Users::These(these)) if these.len() == 1 => these[0].clone(),
            (name, _) => name.parse().map_err(|_| Reject::Unauthenticated { wrong: true })?,
        };
        Self::acting(agent, user)
    }

    /// Who sends the requests in a tunnel that another configuration has let in: whoever showed a secret then shows it
    /// now, and is who they are now.
    ///
    /// # Errors
    /// 403 where a new tunnel would not be let in.
    pub fn admit_again(&self, entrance: &Entrance, caller: &Caller) -> Result<Caller, Reject> {
        if let Some(caller) = self.told(entrance)? {
            return Ok(caller);
        }
        let shown = caller.agent.as_ref().filter(|_| caller.proven);
        let agent = shown.and_then(|agent| self.agent(&agent.secret)).ok_or(Reject::NoLongerAdmitted)?;
        Self::acting(agent, caller.user.clone())
    }

    /// Who comes in where nobody has to show who they are.
    fn told(&self, entrance: &Entrance) -> Result<Option<Caller>, Reject> {
        if entrance.shut {
            return Err(Reject::NoLongerAdmitted);
        }
        let caller = |user: &UserName, agent: Option<&Arc<Agent>>| Caller {
            user: user.clone(),
            agent: agent.cloned(),
            proven: false,
        };
        let by_listener = entrance.user.as_ref().map(|user| caller(user, entrance.agent.as_ref()));
        Ok(by_listener.or_else(|| self.agents.is_empty().then(|| caller(&self.user, None))))
    }

    fn acting(agent: Arc<Agent>, user: UserName) -> Result<Caller, Reject> {
        if !agent.users.allow(&user) {
            return Err(Reject::UserNotAllowed { agent: agent.name.clone(), user });
        }
        Ok(Caller { user, agent: Some(agent), proven: true })
    }

    /// The agent whose secret this is. All are compared, each in a time that tells nothing; and nothing is held up: a
    /// guess that is answered late is known to be wrong as soon as no answer comes, and a secret of 16 characters is not
    /// guessed.
    fn agent(&self, secret: &Secret) -> Option<Arc<Agent>> {
        let mut found = None;
        for agent in &self.agents {
            if agent.secret == *secret {
                found = Some(agent.clone());
            }
        }
        found
    }
}

/// Basic credentials (RFC 7617).
struct Credentials {
    user: String,
    secret: Secret,
}

impl Credentials {
    fn read(value: &[u8]) -> Option<Self> {
        let (scheme, encoded) = value.split_at_checked(6)?;
        // PySocks writes the scheme in lower case.
        if !scheme.eq_ignore_ascii_case(b"basic ") {
            return None;
        }
        let decoded = Zeroizing::new(BASE64_STANDARD.decode(encoded.trim_ascii()).ok()?);
        let (user, secret) = std::str::from_utf8(&decoded).ok()?.split_once(':')?;
        Some(Self { user: user.to_owned(), secret: Secret::new(secret) })
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    fn door() -> Door {
        let agent = |name: &str, users, providers: Option<&[&str]>| {
            let secret = Secret::new(format!("secret-of-{name}"));
            let providers = providers.map(|names| names.iter().map(|name| name.parse().unwrap()).collect());
            Arc::new(Agent { name: name.into(), secret, users, providers })
        };
        let these = |names: &[&str]| Users::These(names.iter().map(|name| name.parse().unwrap()).collect());
        let agents = vec![
            agent("researcher", these(&["alice", "bob"]), Some(&["github"])),
            agent("secretary", these(&["alice"]), None),
            agent("operator", Users::All, None),
        ];
        Door::new(agents, UserName::default())
    }

    fn come(door: &Door, value: Option<&str>) -> Result<Caller, &'static str> {
        let mut headers = HeaderMap::new();
        headers.extend(value.map(|value| (PROXY_AUTHORIZATION, HeaderValue::try_from(value).unwrap())));
        door.admit(&Entrance::default(), &headers).map_err(|reject| reject.code())
    }

    fn basic(pair: &str) -> String {
        format!("Basic {}", BASE64_STANDARD.encode(pair))
    }

    #[test]
    fn the_secret_says_who_it_is_and_the_name_for_whom() {
        // LST-008, LST-013
        let door = door();
        for (pair, who) in [
            ("alice:secret-of-researcher", Ok((Some("researcher"), "alice"))),
            ("bob:secret-of-researcher", Ok((Some("researcher"), "bob"))),
            ("carol:secret-of-researcher", Err("user_not_allowed")),
            (":secret-of-researcher", Err("proxy_authentication_required")),
            (":secret-of-secretary", Ok((Some("secretary"), "alice"))),
            ("bob:secret-of-secretary", Err("user_not_allowed")),
            ("anyone at all:secret-of-operator", Ok((Some("operator"), "anyone at all"))),
            ("alice:secret-of-researche", Err("proxy_authentication_required")),
            ("alice:", Err("proxy_authentication_required")),
            ("alice", Err("proxy_authentication_required")),
        ] {
            let came = come(&door, Some(&basic(pair)));
            let came = came.as_ref().map(|caller| (caller.agent(), caller.user.as_str())).map_err(|code| *code);
            assert_eq!(came, who, "{pair}");
        }
    }

    #[test]
    fn whoever_was_let_in_before_may_do_what_they_may_now() {
        // LST-009
        let before = door();
        let alice = come(&before, Some(&basic("alice:secret-of-researcher"))).unwrap();
        let anyone = Door::new(Vec::new(), UserName::default());
        let nobody = come(&anyone, None).unwrap();
        let by_listener = |user: &str| Entrance { user: Some(user.parse().unwrap()), ..Entrance::default() };
        let only = |name: &str, secret: &str, user: &str| {
            let (name, secret) = (name.to_owned(), Secret::new(secret));
            let users = Users::These(vec![user.parse().unwrap()]);
            Door::new(vec![Arc::new(Agent { name, secret, users, providers: None })], UserName::default())
        };
        let now = |door: &Door, entrance: &Entrance, caller: &Caller| {
            let again = door.admit_again(entrance, caller).map_err(|reject| reject.code());
            again.map(|caller| format!("{caller:?}"))
        };
        let shown = Entrance::default();
        let renamed = only("renamed", "secret-of-researcher", "alice");
        assert_eq!(now(&renamed, &shown, &alice).as_deref(), Ok(r#"Some("renamed") for alice"#));
        assert_eq!(now(&only("researcher", "another", "alice"), &shown, &alice), Err("no_longer_admitted"));
        assert_eq!(now(&only("researcher", "secret-of-researcher", "bob"), &shown, &alice), Err("user_not_allowed"));
        assert_eq!(now(&anyone, &shown, &alice).as_deref(), Ok("None for default"));
        assert_eq!(now(&before, &shown, &nobody), Err("no_longer_admitted"));
        assert_eq!(now(&before, &by_listener("carol"), &alice).as_deref(), Ok("None for carol"));
        // It has shown no secret: the listener said who it is, and does so no more.
        let entrance = Entrance { user: Some("alice".parse().unwrap()), agent: alice.agent.clone(), shut: false };
        let told = before.admit(&entrance, &HeaderMap::new()).unwrap();
        assert_eq!(now(&before, &shown, &told), Err("no_longer_admitted"));
    }

    #[test]
    fn what_is_no_basic_credential_is_refused() {
        // LST-008
        let door = door();
        let right = BASE64_STANDARD.encode("alice:secret-of-researcher");
        assert!(come(&door, Some(&format!("bASIC {right}"))).is_ok());
        let huge = format!("Basic {}", "A".repeat(100_000));
        for wrong in [&format!("Bearer {right}"), &right, "Basic", "Basic ", "", "Basic %%%", "Basic /w==", &huge] {
            assert_eq!(come(&door, Some(wrong)).err(), Some("proxy_authentication_required"));
        }
    }

    #[test]
    fn an_agent_uses_its_own_providers_only() {
        let door = door();
        let may = |caller: &Caller, name: &str| caller.may_use(&name.parse().unwrap()).map_err(|reject| reject.code());
        let researcher = come(&door, Some(&basic("bob:secret-of-researcher"))).unwrap();
        assert_eq!((may(&researcher, "github"), may(&researcher, "slack")), (Ok(()), Err("provider_not_allowed")));
        let secretary = come(&door, Some(&basic("alice:secret-of-secretary"))).unwrap();
        assert_eq!(may(&secretary, "slack"), Ok(()));
        let anyone = Door::new(Vec::new(), "ada".parse().unwrap());
        let caller = come(&anyone, Some(&basic("bob:whatever"))).unwrap();
        assert_eq!((caller.user.as_str(), may(&caller, "slack")), ("ada", Ok(())));
    }
}
