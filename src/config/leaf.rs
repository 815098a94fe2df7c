//! The single values of `proxy.yaml`, each parsed into a type that cannot be wrong.

use std::borrow::Cow;
use std::fmt;
use std::marker::PhantomData;
use std::net::SocketAddr;
use std::str::FromStr;
use std::time::Duration;

use base64::Engine as _;
use base64::alphabet;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use http::{Method, StatusCode};
use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};
use serde::de::{self, Deserialize, Deserializer, Visitor};
use url::Url;
use zeroize::Zeroizing;

use crate::host::HostError;
use crate::oauth::Issuer;
use crate::routes::{HostPattern, PathPattern};
use crate::secret::Secret;
use crate::traces::Share;
use crate::upstream::{NoProxy, ProxyUrlError, UpstreamProxy};

/// A leaf as a field of a struct in the schema.
#[derive(Debug, Clone)]
pub(super) struct Parsed<T>(pub T);

/// What a single value can be parsed into. No error shows the value: it may be a secret.
pub(super) trait Leaf: Sized {
    /// What is expected, as in "expected ..., found a list".
    const EXPECTED: &'static str;

    /// Reads the text of a string.
    fn parse(text: &str) -> Result<Self, Wrong>;

    /// Reads a whole number, for the few leaves that are one.
    fn from_number(_: u64) -> Option<Result<Self, Wrong>> {
        None
    }

    /// Its JSON Schema, which lets `${VAR}` pass wherever a string may be.
    fn schema() -> Schema {
        json_schema!({ "type": "string" })
    }
}

/// Why a leaf was refused.
#[derive(Debug)]
pub(super) enum Wrong {
    /// It is not at all what is expected.
    Shape,
    /// It is, but it cannot be this one: what, and what to do about it.
    Because(String, Option<&'static str>),
}

fn because<T>(what: impl fmt::Display, hint: impl Into<Option<&'static str>>) -> Result<T, Wrong> {
    Err(Wrong::Because(what.to_string(), hint.into()))
}

impl<'de, T: Leaf> Deserialize<'de> for Parsed<T> {
    fn deserialize<D: Deserializer<'de>>(value: D) -> Result<Self, D::Error> {
        value.deserialize_any(Read(PhantomData)).map(Self)
    }
}

impl<T: Leaf> JsonSchema for Parsed<T> {
    fn inline_schema() -> bool {
        true
    }

    fn schema_name() -> Cow<'static, str> {
        T::EXPECTED.into()
    }

    fn json_schema(_: &mut SchemaGenerator) -> Schema {
        T::schema()
    }
}

struct Read<T>(PhantomData<T>);

impl<T: Leaf> Read<T> {
    fn finish<E: de::Error>(read: Result<T, Wrong>) -> Result<T, E> {
        read.map_err(|wrong| match wrong {
            Wrong::Shape => E::custom(format_args!("expected {}", T::EXPECTED)),
            Wrong::Because(what, None) => E::custom(what),
            Wrong::Because(what, Some(hint)) => E::custom(format_args!("{what}\n{hint}")),
        })
    }
}

impl<T: Leaf> Visitor<'_> for Read<T> {
    type Value = T;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(T::EXPECTED)
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<T, E> {
        Self::finish(T::parse(text))
    }

    fn visit_u64<E: de::Error>(self, number: u64) -> Result<T, E> {
        match T::from_number(number) {
            Some(read) => Self::finish(read),
            None => Err(E::invalid_type(de::Unexpected::Unsigned(number), &self)),
        }
    }
}

/// Where a listener is.
#[derive(Debug, Clone)]
pub(super) enum ListenPlace {
    /// An address and a port.
    Tcp(SocketAddr),
    /// A socket in the file system.
    Unix(FilePath),
}

impl Leaf for ListenPlace {
    const EXPECTED: &'static str =
        "an address and a port, as in `127.0.0.1:3128`, or a socket, as in `unix:/run/sidebearer.sock`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        match text.strip_prefix("unix:") {
            Some(path) if path.starts_with('/') || path.starts_with("~/") => FilePath::parse(path).map(Self::Unix),
            Some(_) => because("the path of a socket begins with `/` or `~/`", None),
            None => SocketAddr::parse(text).map(Self::Tcp),
        }
    }
}

/// Who may use a file, as `chmod` has it.
#[derive(Debug, Clone, Copy)]
pub(super) struct FileMode(pub u32);

impl Leaf for FileMode {
    const EXPECTED: &'static str = "a file's mode in quotes, as in `\"0660\"`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let octal = matches!(text.len(), 3 | 4) && text.bytes().all(|b| matches!(b, b'0'..=b'7'));
        match u32::from_str_radix(text, 8) {
            Ok(mode) if octal && mode <= 0o777 => Ok(Self(mode)),
            _ => Err(Wrong::Shape),
        }
    }

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": r"^0?[0-7]{3}$|\$\{" })
    }
}

/// A number of things, at least one.
#[derive(Debug, Clone, Copy)]
pub(super) struct Count(pub usize);

impl Leaf for Count {
    const EXPECTED: &'static str = "a whole number from 1 on";

    fn parse(text: &str) -> Result<Self, Wrong> {
        text.parse().ok().filter(|count| *count > 0).map(Self).ok_or(Wrong::Shape)
    }

    fn from_number(number: u64) -> Option<Result<Self, Wrong>> {
        Some(usize::try_from(number).ok().filter(|count| *count > 0).map(Self).ok_or(Wrong::Shape))
    }

    fn schema() -> Schema {
        json_schema!({ "type": ["string", "integer"], "pattern": r"^[0-9]+$|\$\{", "minimum": 1 })
    }
}

impl Leaf for SocketAddr {
    const EXPECTED: &'static str = "an address and a port, as in `127.0.0.1:3128`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        text.parse().map_err(|_| Wrong::Shape)
    }
}

/// Where the admin listener is, if anywhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct AdminAddress(pub Option<SocketAddr>);

impl Leaf for AdminAddress {
    const EXPECTED: &'static str = "an address and a port, as in `127.0.0.1:3129`, or `off`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(|_| Wrong::Shape)
    }
}

/// Where the health listener is, if anywhere.
#[derive(Debug, Clone, Copy)]
pub(super) struct HealthAddress(pub Option<SocketAddr>);

impl Leaf for HealthAddress {
    const EXPECTED: &'static str = "an address and a port, as in `127.0.0.1:3130`, or `off`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        if text == "off" {
            return Ok(Self(None));
        }
        text.parse().map(|address| Self(Some(address))).map_err(|_| Wrong::Shape)
    }
}

/// The name of an environment variable.
#[derive(Debug, Clone)]
pub(super) struct Variable(pub String);

impl Leaf for Variable {
    const EXPECTED: &'static str = "the name of an environment variable, as in `GH_TOKEN`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let word = text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'_');
        let named = word && text.bytes().next().is_some_and(|first| !first.is_ascii_digit());
        if named { Ok(Self(text.to_owned())) } else { Err(Wrong::Shape) }
    }
}

/// A part of a URL or host: nothing in it can end that part.
#[derive(Debug, Clone)]
pub(super) struct Word;

impl Leaf for Word {
    const EXPECTED: &'static str = "a word of letters, digits, `-`, `_` and `.`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.');
        if !text.is_empty() && text.bytes().all(plain) { Ok(Self) } else { Err(Wrong::Shape) }
    }
}

/// A text that is there and has no control characters.
#[derive(Debug, Clone)]
pub(super) struct Text(pub String);

impl Leaf for Text {
    const EXPECTED: &'static str = "a string";

    fn parse(text: &str) -> Result<Self, Wrong> {
        one_line(text).map(|text| Self(text.to_owned()))
    }
}

fn one_line(text: &str) -> Result<&str, Wrong> {
    if text.is_empty() {
        return because("the value is empty", None);
    }
    if text.chars().any(char::is_control) {
        return because("the value has more than one line, or another control character", None);
    }
    Ok(text)
}

impl Leaf for Secret {
    const EXPECTED: &'static str = "a string";

    fn parse(text: &str) -> Result<Self, Wrong> {
        one_line(text).map(Secret::new)
    }
}

/// A parameter's value, which may be empty.
#[derive(Debug, Clone)]
pub(super) struct Parameter(pub String);

impl Leaf for Parameter {
    const EXPECTED: &'static str = "a string";

    fn parse(text: &str) -> Result<Self, Wrong> {
        Ok(Self(text.to_owned()))
    }
}

/// A word of a command, which may be empty or have several lines.
#[derive(Debug, Clone)]
pub(super) struct Argument(pub Secret);

impl Leaf for Argument {
    const EXPECTED: &'static str = "a string";

    fn parse(text: &str) -> Result<Self, Wrong> {
        Ok(Self(Secret::new(text)))
    }
}

/// A path in the file system, `~/` still as it is.
#[derive(Debug, Clone)]
pub(super) struct FilePath(pub String);

impl Leaf for FilePath {
    const EXPECTED: &'static str = "a path";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let text = one_line(text)?;
        if text.starts_with('~') && !text.starts_with("~/") {
            return because("only `~/` stands for a home directory", "write the whole path");
        }
        Ok(Self(text.to_owned()))
    }
}

/// A key of 32 bytes, kept as standard base64 however it was written.
#[derive(Debug, Clone)]
pub(super) struct StoreKey(pub Secret);

impl Leaf for StoreKey {
    const EXPECTED: &'static str = "a key of 32 bytes as base64 or as 64 hexadecimal digits";

    fn parse(text: &str) -> Result<Self, Wrong> {
        match hexadecimal(text).or_else(|| base64_of_any_kind(text)) {
            Some(bytes) if bytes.len() == 32 => Ok(Self(Secret::new(STANDARD.encode(bytes.as_slice())))),
            _ => because(format_args!("expected {}", Self::EXPECTED), "make one with `openssl rand -base64 32`"),
        }
    }
}

fn hexadecimal(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    if text.len() != 64 {
        return None;
    }
    let digits = text.bytes().map(|b| (b as char).to_digit(16).map(|digit| digit as u8));
    let digits = Zeroizing::new(digits.collect::<Option<Vec<u8>>>()?);
    Some(Zeroizing::new(digits.chunks(2).map(|pair| pair[0] << 4 | pair[1]).collect()))
}

/// With the standard alphabet or the one for URLs, with or without padding.
fn base64_of_any_kind(text: &str) -> Option<Zeroizing<Vec<u8>>> {
    let lenient = GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent);
    let decode = |alphabet| GeneralPurpose::new(alphabet, lenient).decode(text).ok();
    decode(&alphabet::STANDARD).or_else(|| decode(&alphabet::URL_SAFE)).map(Zeroizing::new)
}

impl Leaf for Duration {
    const EXPECTED: &'static str = "a duration with its unit, as in `500ms`, `20s`, `5m` or `1h`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let (number, unit) = number_and_unit(text)?;
        let milliseconds = match unit {
            "ms" => 1,
            "s" => 1_000,
            "m" => 60_000,
            "h" => 3_600_000,
            _ => return Err(Wrong::Shape),
        };
        // Far from what an `Instant` can be added to without a panic.
        const TEN_YEARS: u64 = 87_600 * 3_600_000;
        match number.checked_mul(milliseconds) {
            Some(total) if total <= TEN_YEARS => Ok(Duration::from_millis(total)),
            _ => because("this is longer than ten years", None),
        }
    }

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": r"^[0-9]+(ms|s|m|h)$|\$\{" })
    }
}

fn number_and_unit(text: &str) -> Result<(u64, &str), Wrong> {
    let end = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let number = text[..end].parse().map_err(|_| Wrong::Shape)?;
    Ok((number, &text[end..]))
}

/// A number of bytes.
#[derive(Debug, Clone, Copy)]
pub(super) struct Size(pub usize);

impl Leaf for Size {
    const EXPECTED: &'static str = "a number of bytes, as in `1MiB`, `64KiB` or `65536`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let (number, unit) = number_and_unit(text)?;
        let bytes = match unit {
            "" => Some(number),
            "KiB" => number.checked_mul(1 << 10),
            "MiB" => number.checked_mul(1 << 20),
            "GiB" => number.checked_mul(1 << 30),
            _ => return Err(Wrong::Shape),
        };
        match bytes.and_then(|bytes| usize::try_from(bytes).ok()) {
            Some(bytes) => Ok(Self(bytes)),
            None => because("this is more than there can be", None),
        }
    }

    fn from_number(number: u64) -> Option<Result<Self, Wrong>> {
        Some(usize::try_from(number).map(Self).map_err(|_| Wrong::Shape))
    }

    fn schema() -> Schema {
        json_schema!({ "type": ["string", "integer"], "pattern": r"^[0-9]+([KMG]iB)?$|\$\{", "minimum": 0 })
    }
}

/// A part of a whole.
#[derive(Debug, Clone, Copy)]
pub(super) struct Percent(pub Share);

impl Leaf for Percent {
    const EXPECTED: &'static str = "a percentage from 0 to 100, as in `10%` or `0.5%`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let number = text.strip_suffix('%').filter(|number| number.bytes().all(|b| b.is_ascii_digit() || b == b'.'));
        let share = number.and_then(|number| Share::new(number.parse::<f64>().ok()? / 100.0));
        share.map(Self).ok_or(Wrong::Shape)
    }

    fn schema() -> Schema {
        json_schema!({ "type": "string", "pattern": r"^[0-9]+(\.[0-9]+)?%$|\$\{" })
    }
}

/// A status of the 4xx class that can mean that a token is no longer good.
#[derive(Debug, Clone, Copy)]
pub(super) struct Status(pub StatusCode);

impl Leaf for Status {
    const EXPECTED: &'static str = "a status from 400 to 499";

    fn parse(_: &str) -> Result<Self, Wrong> {
        Err(Wrong::Shape)
    }

    fn from_number(number: u64) -> Option<Result<Self, Wrong>> {
        let status = u16::try_from(number).ok().and_then(|number| StatusCode::from_u16(number).ok());
        Some(match status {
            Some(StatusCode::PROXY_AUTHENTICATION_REQUIRED) => {
                because("407 is about this proxy's own callers, never about a token", None)
            }
            Some(status) if status.is_client_error() => Ok(Self(status)),
            _ => Err(Wrong::Shape),
        })
    }

    fn schema() -> Schema {
        json_schema!({ "type": "integer", "minimum": 400, "maximum": 499 })
    }
}

/// A scope token (RFC 6749 section 3.3).
#[derive(Debug, Clone)]
pub(super) struct Scope(pub String);

impl Leaf for Scope {
    const EXPECTED: &'static str = "a scope";

    fn parse(text: &str) -> Result<Self, Wrong> {
        if text.contains(' ') {
            return because("a scope has no space", "give each scope its own item of the list");
        }
        if text.is_empty() || !text.bytes().all(|b| b.is_ascii_graphic() && b != b'"' && b != b'\\') {
            return because("a scope is printable ASCII without `\"` and `\\`", None);
        }
        Ok(Self(text.to_owned()))
    }
}

/// Where a token is to be used (RFC 8707 section 2).
#[derive(Debug, Clone)]
pub(super) struct Resource(pub String);

impl Leaf for Resource {
    const EXPECTED: &'static str = "an absolute URI without a fragment";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let whole = is_unambiguous(text) && Url::parse(text).is_ok_and(|url| url.fragment().is_none());
        if whole { Ok(Self(text.to_owned())) } else { Err(Wrong::Shape) }
    }
}

/// The proxy that leads out.
#[derive(Debug, Clone)]
pub(super) enum ProxyChoice {
    /// Whichever the environment names.
    Environment,
    /// This one.
    One(UpstreamProxy),
}

impl Leaf for ProxyChoice {
    const EXPECTED: &'static str = "the URL of a proxy, as in `http://proxy.example.com:3128`, or `environment`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        if text == "environment" {
            return Ok(Self::Environment);
        }
        text.parse().map(Self::One).or_else(|error: ProxyUrlError| because(error, error.hint()))
    }
}

impl Leaf for NoProxy {
    const EXPECTED: &'static str =
        "a host name, an address or a network, as in `internal.example`, `10.1.2.3:8080` or `10.0.0.0/8`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        text.parse().map_err(|_| Wrong::Shape)
    }
}

/// A URL of a provider.
#[derive(Debug, Clone)]
pub(super) struct ProviderUrl(pub Url);

impl Leaf for ProviderUrl {
    const EXPECTED: &'static str = "a URL, as in `https://auth.example.com/token`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        let url = Url::parse(text).map_err(|_| Wrong::Shape)?;
        let scheme = url.scheme();
        let written = text.get(scheme.len()..).is_some_and(|rest| rest.starts_with("://"));
        if !is_unambiguous(text) || !matches!(scheme, "http" | "https") || !written {
            return Err(Wrong::Shape);
        }
        if !url.username().is_empty() || url.password().is_some() || text.contains('@') {
            return because("a URL must not carry a user name or a password", "use `client_id` and `client_secret`");
        }
        if url.fragment().is_some() {
            return because("a URL of a provider has no `#`", None);
        }
        Ok(Self(url))
    }
}

/// An issuer, as it calls itself.
#[derive(Debug, Clone)]
pub(super) struct IssuerUrl(pub Issuer);

impl Leaf for IssuerUrl {
    const EXPECTED: &'static str = ProviderUrl::EXPECTED;

    fn parse(text: &str) -> Result<Self, Wrong> {
        ProviderUrl::parse(text).map(|ProviderUrl(url)| Self(Issuer { url, name: text.to_owned() }))
    }
}

/// Whether all parsers would see the same characters of a URL: some drop a tab or turn `\` into `/`.
fn is_unambiguous(text: &str) -> bool {
    text.bytes().all(|b| b.is_ascii_graphic() && b != b'\\')
}

/// The host of a route, and its port where it is written.
#[derive(Debug, Clone)]
pub(super) struct RouteHost {
    pub pattern: HostPattern,
    pub port: Option<u16>,
}

impl Leaf for RouteHost {
    const EXPECTED: &'static str = "a host name, as in `api.example.com`, `*.example.com` or `api.internal:8443`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        if text.contains('/') {
            return because("a host is not a URL", "leave out `https://`; a path goes into `paths`");
        }
        let (host, port) = match text.rsplit_once(':') {
            Some((host, port)) if !text.ends_with(']') => (host, Some(route_port(port)?)),
            _ => (text, None),
        };
        match host.parse() {
            Ok(pattern) => Ok(Self { pattern, port }),
            Err(error) => because(error, None),
        }
    }
}

fn route_port(text: &str) -> Result<u16, Wrong> {
    let digits = text.len() <= 5 && text.bytes().all(|b| b.is_ascii_digit());
    match text.parse() {
        Ok(port) if digits && port != 0 => Ok(port),
        _ => because(HostError::Port, None),
    }
}

impl Leaf for PathPattern {
    const EXPECTED: &'static str = "a path, as in `/v1/items` or `/v1/**`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        text.parse().or_else(|error| because(error, None))
    }
}

impl Leaf for Method {
    const EXPECTED: &'static str = "a method, as in `GET`";

    fn parse(text: &str) -> Result<Self, Wrong> {
        const KNOWN: [&str; 9] = ["GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT"];
        let capitals = KNOWN.iter().find(|known| known.eq_ignore_ascii_case(text));
        match capitals {
            Some(known) if *known != text => {
                because("methods are compared exactly", "write it in capitals, as in `GET`")
            }
            _ => Method::from_str(text).map_err(|_| Wrong::Shape),
        }
    }
}
