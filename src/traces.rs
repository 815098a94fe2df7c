//! What happened within a request, as the spans of OpenTelemetry: collected on its way, and handed on when it ends.
//!
//! A request that says in `traceparent` to which trace it belongs gets its spans there, if that trace is sampled; the
//! header goes on as it came. Nothing here waits: what nobody takes is dropped and counted.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use http::{HeaderMap, Method};
use tokio::sync::mpsc;
use tokio::time::Instant;
use url::Url;

/// So many requests' spans wait at most to be sent on.
const MOST: usize = 2048;
/// The longest `tracestate` that is kept (W3C Trace Context section 3.3.1.5).
const LONGEST_STATE: usize = 512;

/// Where spans are sent, and of which requests.
#[derive(Debug, Clone, PartialEq)]
pub struct Collector {
    /// The URL that they are posted to (OTLP over HTTP).
    pub endpoint: Url,
    /// What goes with them; their values are sensitive.
    pub headers: HeaderMap,
    /// Of how many of the traces that begin here.
    pub share: Share,
    /// What is said of this process.
    pub resource: Vec<(String, String)>,
}

/// Which part of the traces that begin here is kept.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Share(f64);

impl Share {
    /// All of them.
    pub const ALL: Self = Self(1.0);

    /// From 0 for none to 1 for all.
    pub fn new(share: f64) -> Option<Self> {
        (0.0..=1.0).contains(&share).then_some(Self(share))
    }

    /// Whether a trace belongs to it, decided as the SDKs decide: by the random bits of its id.
    fn holds(self, trace: TraceId) -> bool {
        let [.., a, b, c, d, e, f, g, h] = trace;
        let random = u64::from_be_bytes([a, b, c, d, e, f, g, h]) >> 1;
        (random as f64) < self.0 * (1_u64 << 63) as f64
    }
}

/// The id of a trace.
pub type TraceId = [u8; 16];
/// The id of a span.
pub type SpanId = [u8; 8];

/// Where traces begin. A clone counts with it.
#[derive(Clone)]
pub struct Traces {
    inner: Arc<Inner>,
}

struct Inner {
    share: Share,
    finished: mpsc::Sender<Vec<Span>>,
    dropped: AtomicU64,
}

/// What a request does, from its head's arrival to its answer's head.
pub struct Trace {
    traces: Traces,
    context: Context,
    own: SpanId,
    started: SystemTime,
    began: Instant,
    attributes: Vec<Attribute>,
    spans: Vec<Span>,
    /// The last of `spans` is still under way.
    is_open: bool,
}

/// To which trace a request belongs.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Context {
    trace: TraceId,
    parent: Option<SpanId>,
    state: String,
}

/// One span, finished.
#[derive(Debug, Clone)]
pub struct Span {
    /// Its trace.
    pub trace: TraceId,
    /// Itself.
    pub id: SpanId,
    /// Whose part it is.
    pub parent: Option<SpanId>,
    /// Whether that is a span of another process.
    pub parent_is_remote: bool,
    /// The trace's `tracestate`.
    pub state: String,
    /// What it is called.
    pub name: String,
    /// On which side.
    pub kind: Kind,
    /// When it began.
    pub start: SystemTime,
    /// When it ended.
    pub end: SystemTime,
    /// What is known of it, by the names of the semantic conventions.
    pub attributes: Vec<Attribute>,
    /// Whether it failed.
    pub failed: bool,
}

/// On which side of a call a span is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Neither.
    Internal,
    /// It was asked.
    Server,
    /// It asked.
    Client,
}

/// A name and a value.
pub type Attribute = (&'static str, Value);

/// What an attribute can be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// A text.
    Text(String),
    /// A number.
    Number(i64),
    /// Yes or no.
    Flag(bool),
}

impl From<&str> for Value {
    fn from(text: &str) -> Self {
        Value::Text(text.to_owned())
    }
}

impl From<u16> for Value {
    fn from(number: u16) -> Self {
        Value::Number(number.into())
    }
}

impl Traces {
    /// With what comes of it.
    pub fn new(share: Share) -> (Self, mpsc::Receiver<Vec<Span>>) {
        let (finished, taken) = mpsc::channel(MOST);
        (Self { inner: Arc::new(Inner { share, finished, dropped: AtomicU64::new(0) }) }, taken)
    }

    /// Begins to trace a request with these fields, if it is to be.
    pub fn begin(&self, headers: &HeaderMap) -> Option<Box<Trace>> {
        let mut random = [0; 24];
        getrandom::fill(&mut random).ok()?;
        let (new, own) = random.split_first_chunk::<16>()?;
        let context = match Context::of(headers) {
            Some((context, is_sampled)) => is_sampled.then_some(context)?,
            None => {
                self.inner.share.holds(*new).then_some(Context { trace: *new, parent: None, state: String::new() })?
            }
        };
        Some(Box::new(Trace {
            traces: self.clone(),
            context,
            own: own.try_into().ok()?,
            started: SystemTime::now(),
            began: Instant::now(),
            attributes: Vec::new(),
            spans: Vec::new(),
            is_open: false,
        }))
    }

    /// How many spans were dropped since this was last asked.
    pub fn dropped(&self) -> u64 {
        self.inner.dropped.swap(0, Ordering::Relaxed)
    }

    fn hand_on(&self, spans: Vec<Span>) {
        let number = spans.len() as u64;
        if self.inner.finished.try_send(spans).is_err() {
            self.inner.dropped.fetch_add(number, Ordering::Relaxed);
        }
    }
}

impl Trace {
    /// Says something of the request itself.
    pub fn says(&mut self, attribute: &'static str, value: impl Into<Value>) {
        self.attributes.push((attribute, value.into()));
    }

    /// Begins a call to somebody else. What is begun ends before the next begins, or with the request.
    pub fn begin_call(&mut self, name: &str, attributes: Vec<Attribute>) {
        let now = Instant::now();
        let span = self.span(name.to_owned(), Kind::Client, (now, now), attributes);
        self.spans.push(span);
        self.is_open = true;
    }

    /// Ends it, with what came of it.
    pub fn end_call(&mut self, attributes: impl IntoIterator<Item = Attribute>, failed: bool) {
        if !std::mem::take(&mut self.is_open) {
            return;
        }
        let end = self.at(Instant::now());
        if let Some(span) = self.spans.last_mut() {
            (span.end, span.failed) = (end, failed);
            span.attributes.extend(attributes);
        }
    }

    /// What took from `since` until now within the request.
    pub fn took(&mut self, name: &str, since: Instant, attributes: Vec<Attribute>, failed: bool) {
        let span = self.span(name.to_owned(), Kind::Internal, (since, Instant::now()), attributes);
        self.spans.push(Span { failed, ..span });
    }

    /// Ends it, and hands it on.
    pub fn finish(mut self, name: String, failed: bool) {
        self.end_call([("error.type", "agent_gone".into())], true);
        let attributes = std::mem::take(&mut self.attributes);
        let span = self.span(name, Kind::Server, (self.began, Instant::now()), attributes);
        let Context { parent, .. } = self.context;
        let mut spans = std::mem::take(&mut self.spans);
        spans.push(Span { id: self.own, parent, parent_is_remote: parent.is_some(), failed, ..span });
        self.traces.hand_on(spans);
    }

    /// A part of the request.
    fn span(&self, name: String, kind: Kind, (start, end): (Instant, Instant), attributes: Vec<Attribute>) -> Span {
        let mut id = [0; 8];
        // Without randomness nothing else works either.
        let _ = getrandom::fill(&mut id);
        Span {
            trace: self.context.trace,
            id,
            parent: Some(self.own),
            parent_is_remote: false,
            state: self.context.state.clone(),
            name,
            kind,
            start: self.at(start),
            end: self.at(end),
            attributes,
            failed: false,
        }
    }

    fn at(&self, instant: Instant) -> SystemTime {
        self.started + instant.saturating_duration_since(self.began)
    }
}

impl Context {
    /// The one that a request names (W3C Trace Context section 3.2), and whether it is sampled.
    fn of(headers: &HeaderMap) -> Option<(Self, bool)> {
        let mut fields = headers.get_all("traceparent").iter();
        let (field, None) = (fields.next()?.as_bytes(), fields.next()) else { return None };
        let version = hexadecimal::<1>(field.get(..2)?)?;
        let known = version == [0] && field.len() == 55;
        // Of a later version the beginning is as in this one.
        let later = !matches!(version, [0 | 255]) && field.get(55).is_none_or(|next| *next == b'-');
        let dashes = [2, 35, 52].iter().all(|at| field.get(*at) == Some(&b'-'));
        if !(dashes && (known || later)) {
            return None;
        }
        let trace = hexadecimal::<16>(field.get(3..35)?)?;
        let parent = hexadecimal::<8>(field.get(36..52)?)?;
        let [flags] = hexadecimal::<1>(field.get(53..55)?)?;
        if trace == [0; 16] || parent == [0; 8] {
            return None;
        }
        Some((Self { trace, parent: Some(parent), state: state(headers) }, flags & 1 == 1))
    }
}

fn state(headers: &HeaderMap) -> String {
    let fields: Option<Vec<_>> = headers.get_all("tracestate").iter().map(|field| field.to_str().ok()).collect();
    fields.map(|fields| fields.join(",")).filter(|state| state.len() <= LONGEST_STATE).unwrap_or_default()
}

/// Lower-case digits only, as the standard has it.
fn hexadecimal<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let digit = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut bytes = [0; N];
    if digits.len() != 2 * N {
        return None;
    }
    for (byte, pair) in bytes.iter_mut().zip(digits.chunks_exact(2)) {
        *byte = digit(pair[0])? << 4 | digit(pair[1])?;
    }
    Some(bytes)
}

/// A method as traces name it: an agent may make up any number of others.
pub fn method(method: &Method) -> &str {
    const KNOWN: [Method; 9] = [
        Method::GET,
        Method::HEAD,
        Method::POST,
        Method::PUT,
        Method::PATCH,
        Method::DELETE,
        Method::OPTIONS,
        Method::CONNECT,
        Method::TRACE,
    ];
    if KNOWN.contains(method) { method.as_str() } else { "_OTHER" }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn context(fields: &[(&'static str, &str)]) -> Option<(Context, bool)> {
        let fields = fields.iter().map(|(name, value)| (http::HeaderName::from_static(name), value.parse().unwrap()));
        Context::of(&fields.collect())
    }

    #[test]
    fn a_request_names_its_trace_as_the_standard_has_it_or_not_at_all() {
        const TRACE: &str = "4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7";
        let named = |field: &str| context(&[("traceparent", field)]).map(|(_, is_sampled)| is_sampled);
        for (field, is_sampled) in
            [("00-TRACE-01", true), ("00-TRACE-00", false), ("00-TRACE-03", true), ("cc-TRACE-01-what-will-be", true)]
        {
            assert_eq!(named(&field.replace("TRACE", TRACE)), Some(is_sampled), "{field}");
        }
        for field in
            ["ff-TRACE-01", "00-TRACE-01-", "00-TRACE-1", "00-TRACE", "cc-TRACE-01.x", "", "0-TRACE-01", "00_TRACE-01"]
        {
            assert_eq!(named(&field.replace("TRACE", TRACE)), None, "{field}");
        }
        assert_eq!(named(&format!("00-{}-01", TRACE.to_uppercase())), None);
        assert_eq!(named("00-00000000000000000000000000000000-00f067aa0ba902b7-01"), None);
        assert_eq!(named("00-4bf92f3577b34da6a3ce929d0e0e4736-0000000000000000-01"), None);
        let field = format!("00-{TRACE}-01");
        assert_eq!(context(&[("traceparent", &field), ("traceparent", &field)]), None);
        let (named, _) = context(&[("traceparent", &field), ("tracestate", "a=1"), ("tracestate", "b=2")]).unwrap();
        assert_eq!((named.state.as_str(), named.parent), ("a=1,b=2", Some([0, 0xf0, 0x67, 0xaa, 0x0b, 0xa9, 2, 0xb7])));
    }

    #[test]
    fn a_share_of_the_traces_that_begin_here_is_kept_and_all_that_the_agent_samples() {
        let kept = |share: f64, headers: &HeaderMap| {
            let (traces, _taken) = Traces::new(Share::new(share).unwrap());
            (0..1000).filter(|_| traces.begin(headers).is_some()).count()
        };
        let none = HeaderMap::new();
        assert_eq!((kept(0.0, &none), kept(1.0, &none)), (0, 1000));
        assert!((150..350).contains(&kept(0.25, &none)));
        let mut sampled = HeaderMap::new();
        sampled.insert("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-01".parse().unwrap());
        assert_eq!(kept(0.0, &sampled), 1000);
        sampled.insert("traceparent", "00-4bf92f3577b34da6a3ce929d0e0e4736-00f067aa0ba902b7-00".parse().unwrap());
        assert_eq!(kept(1.0, &sampled), 0);
        assert!(Share::new(1.1).is_none() && Share::new(-0.1).is_none() && Share::new(f64::NAN).is_none());
    }

    #[test]
    fn what_nobody_takes_is_dropped_and_counted() {
        let (traces, _taken) = Traces::new(Share::new(1.0).unwrap());
        for _ in 0..MOST + 3 {
            traces.begin(&HeaderMap::new()).unwrap().finish("GET".into(), false);
        }
        assert_eq!((traces.dropped(), traces.dropped()), (3, 0));
    }
}
