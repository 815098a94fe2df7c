//! The shape of `proxy.yaml`: the structs that it is decoded into, and that its JSON Schema is made from.
//!
//! Every field is optional here, so that what is missing is found together with all other mistakes. An attribute that
//! makes serde look at a value twice (`untagged`, `flatten`, `try_from`) would lose the place of a mistake.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::time::Duration;

use http::Method;
use schemars::generate::SchemaSettings;
use schemars::transform::RecursiveTransform;
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::Deserialize;
use serde::de::{self, Deserializer, MapAccess, SeqAccess, Visitor, value};

use super::leaf::{FilePath, Parameter, Parsed, ProviderUrl, Resource, RouteHost, Scope, Size, Status, StoreKey, Text};
use crate::routes::PathPattern;
use crate::secret::Secret;

/// The configuration of Sidebearer.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
#[schemars(title = "proxy.yaml")]
pub(super) struct File {
    /// Where agents reach the proxy; `127.0.0.1:3128` when left out.
    pub listen: Option<Parsed<SocketAddr>>,
    /// PEM files with further roots to trust, for upstreams and token endpoints.
    pub extra_ca_files: Option<Vec<Parsed<FilePath>>>,
    /// The address to dial for a host and port, instead of asking DNS.
    pub resolve: Option<Entries<Parsed<SocketAddr>>>,
    /// How long live requests may go on after SIGTERM; `20s` when left out.
    pub drain: Option<Parsed<Duration>>,
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
    /// Keys of 32 bytes as base64: the first seals, all open. One is made when there are none.
    pub keys: Option<Vec<Parsed<StoreKey>>>,
}

/// An authorization server, as one client sees it.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
#[schemars(transform = with_token_url)]
pub(super) struct Provider {
    /// Where tokens come from (RFC 6749 section 3.2).
    #[serde(alias = "token_url")]
    pub token_endpoint: Option<Parsed<ProviderUrl>>,
    /// The issuer that the token endpoint is discovered from (RFC 8414), instead of `token_endpoint`.
    pub issuer: Option<Parsed<ProviderUrl>>,
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

/// Which requests get whose token.
#[derive(Debug, Default, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, expecting = "a mapping")]
pub(super) struct Route {
    /// A host name, or `*.` and a name for one label more; with a port unless it is the usual one.
    #[schemars(required)]
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

/// The other name of `token_endpoint`, which schemars does not take over from serde.
fn with_token_url(schema: &mut Schema) {
    let Some(serde_json::Value::Object(keys)) = schema.get_mut("properties") else { return };
    if let Some(endpoint) = keys.get("token_endpoint").cloned() {
        keys.insert("token_url".to_owned(), endpoint);
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
