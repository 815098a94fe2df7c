//! The shape of `proxy.yaml`: the structs that it is decoded into, and that its JSON Schema is made from.
//!
//! Every field is optional here, so that what is missing is found together with all other mistakes. An attribute that
//! makes serde look at a value twice (`untagged`, `flatten`, `try_from`) would lose the place of a mistake.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::time::Duration;

use http::Method;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor, value};

use super::leaf::{
    AdminAddress, Argument, Count, FileMode, FilePath, HealthAddress, IssuerUrl, Leaf, ListenPlace, Parameter, Parsed,
    Percent, ProviderUrl, ProxyChoice, Resource, RouteHost, Scope, Size, Status, StoreKey, Text, Variable, Word,
};
use crate::routes::PathPattern;
use crate::secret::Secret;
use crate::telemetry;
use crate::upstream::NoProxy;

/// Where the health listener is when nothing is said of it.
pub(super) const HEALTH: SocketAddr = SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), 3130);

/// The configuration of Sidebearer.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
#[schemars(title = "proxy.yaml")]
pub(super) struct File {
    /// Where agents reach the proxy, or a list of such places; `127.0.0.1:3128` when left out.
    pub listen: Option<OneOrMore<Listener>>,
    /// Where a packet filter redirects the connections of agents that know of no proxy, or a list of such places; nowhere
    /// when left out.
    pub transparent: Option<OneOrMore<Listener>>,
    /// Where people and their browsers reach the dashboard, consent and the admin API, or `off`; `127.0.0.1:3129` when
    /// left out.
    pub admin: Option<Parsed<AdminAddress>>,
    /// What whoever uses the admin listener has to know; needed where others than this machine can reach it.
    pub admin_token: Option<Parsed<Secret>>,
    /// Whether a program of this machine may have it stop: `POST /quit` at the admin listener; `false` when left out.
    pub quit: Option<bool>,
    /// How browsers reach the admin listener, if that is not by its address.
    pub public_url: Option<Parsed<ProviderUrl>>,
    /// Where a consent may send a browser back to: pages, or with a final `/` everything below.
    pub return_to: Option<Vec<Parsed<ProviderUrl>>>,
    /// Where probes and metrics are, or `off`; `127.0.0.1:3130` when left out. It shows no secrets and no users, and may be
    /// reached by others: `0.0.0.0:3130`.
    pub health: Option<Parsed<HealthAddress>>,
    /// Who may use the proxy, and for whom; any caller on this machine when left out.
    pub agents: Option<Vec<Agent>>,
    /// PEM files with further roots to trust, for upstreams and token endpoints.
    pub extra_ca_files: Option<Vec<Parsed<FilePath>>>,
    /// The address to dial for a host and port, instead of asking DNS.
    pub resolve: Option<Entries<Parsed<SocketAddr>>>,
    /// The HTTP proxy that everything goes out through, or `environment` for those that its variables name.
    pub upstream_proxy: Option<Parsed<ProxyChoice>>,
    /// Hosts, with all below them, addresses and networks that `upstream_proxy` is not asked for.
    pub no_proxy: Option<Vec<Parsed<NoProxy>>>,
    /// How long live requests may go on after SIGTERM; `20s` when left out.
    pub drain: Option<Parsed<Duration>>,
    /// Where each use of a token is written down; nowhere when left out.
    pub audit: Option<Audit>,
    /// Where OpenTelemetry's spans of requests are sent; nowhere when left out.
    pub traces: Option<Traces>,
    /// How much `sidebearer run` logs of what it does itself, unless `RUST_LOG` is set; `info` when left out.
    pub log_level: Option<LogLevel>,
    /// How long, how large and how many anything may be.
    pub limits: Option<Limits>,
    /// The longest request body that can be sent a second time after a 401; `1MiB` when left out.
    pub replay_limit: Option<Parsed<Size>>,
    /// The local certificate authority.
    pub ca: Option<Ca>,
    /// The authorization servers that tokens come from, by name.
    pub providers: Option<Entries<Provider>>,
    /// Which requests get whose token; the most specific route wins.
    pub routes: Option<Vec<Route>>,
    /// What happens to a host that no route names; `tunnel` when left out.
    pub unmatched: Option<Unmatched>,
    /// Where grants are kept, sealed.
    pub store: Option<Store>,
}

/// A place where agents reach the proxy: an address, or a mapping that also says who comes in there.
#[derive(Debug)]
pub(super) struct Listener(pub ListenerKeys);

/// A place where agents reach the proxy, and who comes in there.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct ListenerKeys {
    /// An address and a port, or `unix:` and the path of a socket.
    #[schemars(required)]
    pub address: Option<Parsed<ListenPlace>>,
    /// For whom its callers act, without credentials.
    pub user: Option<Parsed<Text>>,
    /// Which of `agents` they are.
    pub agent: Option<Parsed<Text>>,
    /// Who may connect to a Unix socket, as a file's mode; `"0600"` when left out.
    pub mode: Option<Parsed<FileMode>>,
}

impl<'de> Deserialize<'de> for Listener {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(ReadListener).map(Self)
    }
}

struct ReadListener;

impl<'de> Visitor<'de> for ReadListener {
    type Value = ListenerKeys;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}, or a mapping with an `address`", ListenPlace::EXPECTED)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<ListenerKeys, E> {
        let address = Parsed::deserialize(value::StrDeserializer::new(text))?;
        Ok(ListenerKeys { address: Some(address), ..ListenerKeys::default() })
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<ListenerKeys, A::Error> {
        ListenerKeys::deserialize(value::MapAccessDeserializer::new(map))
    }
}

impl JsonSchema for Listener {
    fn schema_name() -> Cow<'static, str> {
        "Listener".into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let (address, keys) =
            (Parsed::<ListenPlace>::json_schema(generator), generator.subschema_for::<ListenerKeys>());
        json_schema!({ "anyOf": [address, keys] })
    }
}

/// How long, how large and how many anything may be.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Limits {
    /// How long a request's head may take, from its first byte; `30s` when left out.
    pub head_timeout: Option<Parsed<Duration>>,
    /// How long an agent's connection may be open with no request on it; `5m` when left out.
    pub idle_timeout: Option<Parsed<Duration>>,
    /// How long an agent may pause within a body of a length that it has named; `5m` when left out.
    pub body_timeout: Option<Parsed<Duration>>,
    /// How long an agent may take nothing of what is there for it; `5m` when left out.
    pub write_timeout: Option<Parsed<Duration>>,
    /// How long an agent's TLS handshake may take; `10s` when left out.
    pub handshake_timeout: Option<Parsed<Duration>>,
    /// How long a connection to an upstream may take; `10s` when left out.
    pub connect_timeout: Option<Parsed<Duration>>,
    /// How long an upstream's TLS handshake may take; `10s` when left out.
    pub upstream_handshake_timeout: Option<Parsed<Duration>>,
    /// The largest head of a request; `256KiB` when left out.
    pub max_head: Option<Parsed<Size>>,
    /// The most fields in a head; `128` when left out.
    pub max_headers: Option<Parsed<Count>>,
    /// The most connections of agents at once, further ones wait; `10000` when left out.
    pub max_connections: Option<Parsed<Count>>,
}

/// An agent that may use the proxy.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Agent {
    /// What it is called in logs.
    #[schemars(required)]
    pub name: Option<Parsed<Text>>,
    /// The password in its proxy credentials, of at least 16 characters.
    #[schemars(required)]
    pub secret: Option<Parsed<Secret>>,
    /// For whom it may act; `["*"]` for everyone.
    #[schemars(required)]
    pub users: Option<Vec<Parsed<Text>>>,
    /// Whose tokens it may use; all when left out.
    pub providers: Option<Vec<Parsed<Text>>>,
}

/// Where each use of a token is written down, as a line of JSON.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Audit {
    /// The file, whose folder must be there, or `-` for standard output.
    #[schemars(required)]
    pub file: Option<Parsed<FilePath>>,
    /// Whether a token is sent only when that is on the disk; `false` when left out.
    pub required: Option<bool>,
}

/// Where OpenTelemetry's spans of requests are sent (OTLP over HTTP).
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Traces {
    /// The collector, without `/v1/traces`.
    #[schemars(required)]
    pub endpoint: Option<Parsed<ProviderUrl>>,
    /// How many of the traces that begin here are kept; `100%` when left out. A trace that an agent has begun is kept if
    /// the agent keeps it.
    pub sample: Option<Parsed<Percent>>,
    /// Header fields for the collector, such as `authorization`.
    pub headers: Option<Entries<Parsed<Secret>>>,
    /// What is said of this sidecar, besides `service.name` and `service.version`, or in their place.
    pub resource: Option<Entries<Parsed<Text>>>,
}

/// The local certificate authority.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Ca {
    /// The directory that it is kept in; `ca` in the store's directory when left out.
    pub path: Option<Parsed<FilePath>>,
}

/// Where grants are kept, sealed.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Store {
    /// The directory of the embedded store; `~/.local/share/sidebearer` when left out.
    pub path: Option<Parsed<FilePath>>,
    /// A PostgreSQL database that many sidecars share, in place of the embedded store:
    /// `postgres://user@host:5432/database`. Its server is verified by name; `sslmode=disable` is for one on this machine.
    pub url: Option<Parsed<Secret>>,
    /// The password for it, if it is not in the URL.
    pub password: Option<Parsed<Secret>>,
    /// Keys of 32 bytes as base64: the first seals, all open. One is made when there are none.
    pub keys: Option<Vec<Parsed<StoreKey>>>,
    /// Instead of `keys`: a program, with its arguments, that prints them as base64, one a line.
    pub key_command: Option<Vec<Parsed<Argument>>>,
}

/// An authorization server, as one client sees it.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
#[schemars(transform = with_token_url)]
pub(super) struct Provider {
    /// What people call it; its name when left out.
    pub title: Option<Parsed<Text>>,
    /// The preset whose keys fill in what is left out here, or `none`; its own name when that is a preset's.
    #[expect(dead_code, reason = "presets read it in the document, before it is decoded")]
    pub preset: Option<Parsed<Text>>,
    /// Values for the `{name}`s in a preset's URLs and hosts.
    #[expect(dead_code, reason = "presets read it in the document, before it is decoded")]
    pub variables: Option<Entries<Parsed<Word>>>,
    /// The hosts of a route that names this provider and no `host`.
    pub hosts: Option<Vec<Parsed<RouteHost>>>,
    /// Environment variables that programs insist on; `exec` sets them to a dummy.
    pub placeholders: Option<Vec<Parsed<Variable>>>,
    /// Where a user takes access back by hand.
    pub manage_url: Option<Parsed<ProviderUrl>>,
    /// Where tokens come from (RFC 6749 section 3.2).
    #[serde(alias = "token_url")]
    pub token_endpoint: Option<Parsed<ProviderUrl>>,
    /// Where users consent (RFC 6749 section 3.1).
    #[serde(alias = "auth_url")]
    pub authorization_endpoint: Option<Parsed<ProviderUrl>>,
    /// Where a device flow begins (RFC 8628 section 3.1).
    pub device_authorization_endpoint: Option<Parsed<ProviderUrl>>,
    /// Where tokens are given back (RFC 7009).
    pub revocation_endpoint: Option<Parsed<ProviderUrl>>,
    /// Where refresh tokens are redeemed, if that is not the token endpoint.
    pub refresh_endpoint: Option<Parsed<ProviderUrl>>,
    /// The issuer, from which the endpoints that are left out are discovered (RFC 8414).
    pub issuer: Option<Parsed<IssuerUrl>>,
    /// Allows `http` for a token endpoint or issuer on this very machine.
    pub allow_http: Option<bool>,
    /// The client's name at the provider (RFC 6749 section 2.2).
    #[schemars(required)]
    pub client_id: Option<Parsed<Text>>,
    /// Its secret, best as `${file:PATH}` or `${VAR}`; left out for a public client.
    pub client_secret: Option<Parsed<Secret>>,
    /// How the client proves itself: `client_secret_basic` with a secret and `none` without, when left out.
    pub client_auth: Option<ClientAuth>,
    /// Tokens for the client itself (RFC 6749 section 4.4).
    pub client_credentials: Option<Grant>,
    /// Tokens for a user, from a refresh token in the store (RFC 6749 section 6).
    pub refresh_token: Option<Grant>,
    /// Tokens for a user who consents in a browser (RFC 6749 section 4.1, with PKCE).
    pub authorization_code: Option<Consent>,
    /// Further parameters of the authorization request.
    pub authorization_params: Option<Entries<Parsed<Parameter>>>,
    /// What stands between two scopes in an authorization request; a space when left out.
    pub scope_separator: Option<ScopeSeparator>,
    /// The parameter that names the scopes in an authorization request; `scope` when left out.
    pub scope_parameter: Option<Parsed<Text>>,
    /// Scopes that every consent asks for, besides those of `authorization_code`.
    pub required_scopes: Option<Vec<Parsed<Scope>>>,
    /// Whether a refresh names the scopes again; `true` when left out.
    pub scopes_on_refresh: Option<bool>,
    /// How token requests are written; `form` when left out.
    pub token_request: Option<TokenRequest>,
    /// Whether token answers may be form-encoded.
    pub form_answers: Option<bool>,
    /// The member of a token answer that holds the tokens, if they are not at its top.
    pub token_member: Option<Parsed<Text>>,
    /// Values of `token_type` that mean Bearer, besides `Bearer`.
    pub token_types: Option<Vec<Parsed<Text>>>,
    /// `error` codes that say, as `invalid_grant` does, that a grant is dead.
    pub dead_grant_errors: Option<Vec<Parsed<Text>>>,
    /// What happens to a request whose user has not connected.
    pub on_missing: Option<OnMissing>,
    /// How long before its end a token is renewed; `5m` when left out.
    pub refresh_before: Option<Parsed<Duration>>,
    /// The lifetime of a token whose provider names none; unlimited until a 401 when left out.
    pub default_lifetime: Option<Parsed<Duration>>,
    /// Statuses that, like 401, say that a token is no longer good.
    pub refresh_on: Option<Vec<Parsed<Status>>>,
}

/// How a client proves itself at the token endpoint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum ClientAuth {
    /// In the Authorization header.
    ClientSecretBasic,
    /// In the body.
    ClientSecretPost,
    /// Not at all: a public client.
    None,
}

/// What is asked for in a token request.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Grant {
    /// The scopes of the token (RFC 6749 section 3.3).
    pub scopes: Option<Vec<Parsed<Scope>>>,
    /// The API that the token is for, at providers that have this parameter.
    pub audience: Option<Parsed<Text>>,
    /// The API that the token is for (RFC 8707), or a list of them.
    pub resource: Option<OneOrMore<Parsed<Resource>>>,
    /// Further parameters of the token request.
    pub params: Option<Entries<Parsed<Parameter>>>,
}

/// What is asked of a user, and how.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Consent {
    /// The scopes that a user is asked for (RFC 6749 section 3.3).
    pub scopes: Option<Vec<Parsed<Scope>>>,
    /// The API that the token is for, at providers that have this parameter.
    pub audience: Option<Parsed<Text>>,
    /// The API that the token is for (RFC 8707), or a list of them.
    pub resource: Option<OneOrMore<Parsed<Resource>>>,
    /// Further parameters of the token request.
    pub params: Option<Entries<Parsed<Parameter>>>,
    /// The one redirect URI that the provider allows, if it is not free to vary.
    pub redirect_uri: Option<Parsed<ProviderUrl>>,
}

impl Consent {
    /// What it has in common with the other grants.
    pub fn split(self) -> (Grant, Option<Parsed<ProviderUrl>>) {
        let Self { scopes, audience, resource, params, redirect_uri } = self;
        (Grant { scopes, audience, resource, params }, redirect_uri)
    }
}

/// What stands between two scopes in an authorization request.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
pub(super) enum ScopeSeparator {
    /// A space, as in RFC 6749.
    #[serde(rename = " ")]
    Space,
    /// A comma.
    #[serde(rename = ",")]
    Comma,
}

/// How token requests are written.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum TokenRequest {
    /// As a form, as in RFC 6749.
    Form,
    /// As JSON.
    Json,
}

/// What happens to a request whose user has not connected.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct OnMissing {
    /// How long it waits for the user; it is refused at once when left out.
    pub wait: Option<Parsed<Duration>>,
    /// Where a message with the link is posted, as JSON.
    pub webhook: Option<Parsed<ProviderUrl>>,
    /// A program that is run with the link as its last argument.
    pub command: Option<Vec<Parsed<Text>>>,
}

/// Which requests get whose token.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Route {
    /// A host name, or `*.` and a name for one label more; with a port unless it is the usual one. The provider's
    /// `hosts` when left out.
    pub host: Option<Parsed<RouteHost>>,
    /// Paths, where `*` stays in a segment and a final `/**` is everything below; all when left out.
    pub paths: Option<Vec<Parsed<PathPattern>>>,
    /// Methods; all when left out.
    pub methods: Option<Vec<Parsed<Method>>>,
    /// Whose token the requests get.
    pub provider: Option<Parsed<Text>>,
    /// Refuses the requests, instead of `provider`.
    pub deny: Option<bool>,
    /// Speaks to the upstream without TLS, on port 80 unless another is written.
    pub plaintext: Option<bool>,
    /// Whether a request that was answered 401 is sent once more; `once` when left out.
    pub retry: Option<Retry>,
    /// The protocol spoken to the upstream; `auto` when left out.
    pub upstream_http: Option<UpstreamHttp>,
    /// Takes the token out of answers that repeat it: fields, and text that is not compressed.
    pub redact_reflections: Option<bool>,
}

/// Whether a request that was answered 401 is sent once more.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Retry {
    /// Once more, with a new token.
    Once,
    /// The 401 goes to the agent.
    Never,
}

/// The protocol spoken to an upstream.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum UpstreamHttp {
    /// Whatever ALPN chooses.
    Auto,
    /// HTTP/1.1 only.
    H1,
}

/// How much is logged.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum LogLevel {
    /// What somebody has to mend.
    Error,
    /// What somebody should look at.
    Warn,
    /// Each request, and what happens to tokens.
    Info,
    /// How connections end, too.
    Debug,
    /// Everything.
    Trace,
}

impl From<LogLevel> for telemetry::LogLevel {
    fn from(level: LogLevel) -> Self {
        match level {
            LogLevel::Error => Self::Error,
            LogLevel::Warn => Self::Warn,
            LogLevel::Info => Self::Info,
            LogLevel::Debug => Self::Debug,
            LogLevel::Trace => Self::Trace,
        }
    }
}

/// What happens to a host that no route names.
#[derive(Debug, Clone, Copy, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub(super) enum Unmatched {
    /// Its bytes are passed on, unseen and without a token.
    Tunnel,
    /// It is refused.
    Deny,
}

/// A mapping from names to values, in file order. The document has no key twice.
#[derive(Debug)]
pub(super) struct Entries<T>(pub Vec<(String, T)>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Entries<T> {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_map(ReadEntries(PhantomData)).map(Self)
    }
}

struct ReadEntries<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ReadEntries<T> {
    type Value = Vec<(String, T)>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a mapping")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Self::Value, A::Error> {
        let mut entries = Vec::new();
        while let Some(entry) = map.next_entry()? {
            entries.push(entry);
        }
        Ok(entries)
    }
}

impl<T: JsonSchema> JsonSchema for Entries<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("Entries_of_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        json_schema!({ "type": "object", "additionalProperties": generator.subschema_for::<T>() })
    }
}

/// A value, or a list of such.
#[derive(Debug)]
pub(super) struct OneOrMore<T>(pub Vec<T>);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for OneOrMore<T> {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(ReadOneOrMore(PhantomData)).map(Self)
    }
}

struct ReadOneOrMore<T>(PhantomData<T>);

impl<'de, T: Deserialize<'de>> Visitor<'de> for ReadOneOrMore<T> {
    type Value = Vec<T>;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a string or a list of strings")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Vec<T>, E> {
        T::deserialize(value::StrDeserializer::new(text)).map(|one| vec![one])
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<Vec<T>, E> {
        T::deserialize(value::U64Deserializer::new(number)).map(|one| vec![one])
    }

    fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Vec<T>, A::Error> {
        T::deserialize(value::MapAccessDeserializer::new(map)).map(|one| vec![one])
    }

    fn visit_seq<A: SeqAccess<'de>>(self, items: A) -> Result<Vec<T>, A::Error> {
        Vec::deserialize(value::SeqAccessDeserializer::new(items))
    }
}

impl<T: JsonSchema> JsonSchema for OneOrMore<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        format!("One_or_more_of_{}", T::schema_name()).into()
    }

    fn json_schema(generator: &mut SchemaGenerator) -> Schema {
        let one = generator.subschema_for::<T>();
        json_schema!({ "anyOf": [one, { "type": "array", "items": one }] })
    }
}

/// The JSON Schema of `proxy.yaml`.
pub(super) fn json_schema() -> serde_json::Value {
    let settings = SchemaSettings::draft2020_12().with_transform(RecursiveTransform(no_null_scalars));
    settings.into_generator().into_root_schema_for::<File>().to_value()
}

/// The other names of two endpoints, which schemars does not take over from serde.
fn with_token_url(schema: &mut Schema) {
    let Some(serde_json::Value::Object(keys)) = schema.get_mut("properties") else { return };
    for (name, other) in [("token_endpoint", "token_url"), ("authorization_endpoint", "auth_url")] {
        if let Some(endpoint) = keys.get(name).cloned() {
            keys.insert(other.to_owned(), endpoint);
        }
    }
}

/// An optional key may be left out; only a list or a mapping may be there with nothing in it.
fn no_null_scalars(schema: &mut Schema) {
    let Some(serde_json::Value::Array(types)) = schema.get_mut("type") else { return };
    if types.iter().all(|name| name != "array" && name != "object") {
        types.retain(|name| name != "null");
    }
    if let [only] = types.as_slice() {
        let only = only.clone();
        schema.insert("type".to_owned(), only);
    }
}
