//! Takes a request's own tokens out of its answer, on routes with `redact_reflections`.
//!
//! A guard against accidents: echo endpoints, debug and error pages that repeat a request's headers. The fields are
//! searched at once, text while it streams. Whoever wants to can get a token past it: in pieces, compressed, as base64.

use std::ops::Range;
use std::pin::Pin;
use std::sync::LazyLock;
use std::task::{Context, Poll, ready};

use bytes::{Bytes, BytesMut};
use http::header::{ACCEPT_ENCODING, CONTENT_ENCODING, CONTENT_TYPE, HeaderMap};
use http::{HeaderValue, Response};
use http_body::{Body, Frame, SizeHint};
use hyper::ext::ReasonPhrase;
use zeroize::Zeroizing;

use super::body::{ResponseBody, longer};
use crate::secret::Secret;

/// Stands in a token's place, byte for byte, so that lengths, ranges and framing stay right.
const FILLER: u8 = b'*';

/// What is text besides `text/*`, and what may hold text or a repeated head: parts of a batch, `message/http`.
const TEXT_TYPES: [&str; 3] = ["text", "message", "multipart"];
const TEXT_SUBTYPES: [&str; 12] = [
    "json",
    "xml",
    "javascript",
    "x-javascript",
    "ecmascript",
    "x-www-form-urlencoded",
    "graphql",
    "http",
    "x-ndjson",
    "ndjson",
    "yaml",
    "x-yaml",
];
const TEXT_SUFFIXES: [&str; 3] = ["+json", "+xml", "+yaml"];
/// Text whose characters take more than a byte each.
const WIDE_CHARSETS: [&str; 3] = ["utf-16", "utf-32", "ucs-2"];

/// Asks for an answer that can be searched (RFC 9110 section 12.5.3).
pub(super) fn ask_for_plain(request: &mut HeaderMap) {
    request.insert(ACCEPT_ENCODING, HeaderValue::from_static("identity"));
}

/// Whether a body is text that came in a coding all the same, and so cannot be searched.
pub(super) fn is_coded_text(response: &Response<ResponseBody>) -> bool {
    is_coded(response.headers()) && is_text(response.headers()) && !response.body().is_end_stream()
}

fn is_coded(headers: &HeaderMap) -> bool {
    let plain = |coding: &HeaderValue| coding.is_empty() || coding.as_bytes().eq_ignore_ascii_case(b"identity");
    !headers.get_all(CONTENT_ENCODING).iter().all(plain)
}

/// Whether a body is text, as far as its fields say: without a type, it may be.
fn is_text(headers: &HeaderMap) -> bool {
    let mut types = headers.get_all(CONTENT_TYPE).iter().peekable();
    types.peek().is_none() || types.any(|value| is_text_type(&String::from_utf8_lossy(value.as_bytes())))
}

fn is_text_type(value: &str) -> bool {
    let value = value.to_ascii_lowercase();
    let (essence, parameters) = value.split_once(';').unwrap_or((&value, ""));
    if WIDE_CHARSETS.iter().any(|charset| parameters.contains(charset)) {
        return false;
    }
    let Some((kind, subtype)) = essence.trim().split_once('/') else { return true };
    TEXT_TYPES.contains(&kind)
        || TEXT_SUBTYPES.contains(&subtype)
        || TEXT_SUFFIXES.iter().any(|suffix| subtype.ends_with(suffix))
}

/// The tokens that a request carried, looked for in its answer.
#[derive(Default)]
pub(super) struct Redactor {
    tokens: Vec<Token>,
    /// The bytes that something looked for can begin with.
    starts: Vec<u8>,
}

struct Token {
    secret: Secret,
    spellings: &'static [Spelling],
}

/// One way to write a token in text: each character as itself, or in one of its other forms.
struct Spelling {
    /// What every other form begins with; by itself it never stands for a character.
    lead: Option<u8>,
    /// The other forms, by the character.
    forms: Vec<Vec<String>>,
}

/// As it is; percent-encoded (RFC 3986 section 2.1); in a JSON string (RFC 8259 section 7); in HTML.
static SPELLINGS: LazyLock<[Spelling; 4]> = LazyLock::new(|| {
    [
        Spelling { lead: None, forms: Vec::new() },
        Spelling::new(b'%', |c, _| vec![format!("%{c:02x}"), format!("%{c:02X}")]),
        Spelling::new(b'\\', |c, letter| vec![format!("\\u{c:04x}"), format!("\\u{c:04X}"), format!("\\{letter}")]),
        Spelling::new(b'&', |c, _| {
            let named = NAMED.iter().filter(|(named, _)| *named == c).map(|(_, name)| format!("&{name};"));
            named.chain([format!("&#{c};"), format!("&#x{c:x};"), format!("&#x{c:X};")]).collect()
        }),
    ]
});
const NAMED: [(u8, &str); 5] = [(b'&', "amp"), (b'<', "lt"), (b'>', "gt"), (b'"', "quot"), (b'\'', "apos")];

/// How a token and a text agree from one place on. What is still open outranks what is whole, since it is longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Fit {
    No,
    /// So many bytes are the token.
    Whole(usize),
    /// The text ends before the token does.
    Begun,
}

/// What was found in a text.
struct Found {
    whole: Vec<Range<usize>>,
    /// Where something begins that may become a token; the end of the text if nothing does.
    open: usize,
}

impl Redactor {
    /// Looks for this token, too.
    pub(super) fn add(&mut self, secret: &Secret) {
        let Some(&first) = secret.expose().as_bytes().first() else { return };
        if self.tokens.iter().any(|token| token.secret == *secret) {
            return;
        }
        // Most tokens look the same in every spelling.
        let plain = secret.expose().bytes().all(is_plain);
        let spellings = if plain { &SPELLINGS[..1] } else { &SPELLINGS[..] };
        let leads = spellings.iter().filter(|spelling| !spelling.forms(first).is_empty());
        self.starts.extend(leads.filter_map(|spelling| spelling.lead).chain([first]));
        self.tokens.push(Token { secret: secret.clone(), spellings });
    }

    /// Takes the tokens out of an answer: out of its head now, and out of its body, if it can be searched, as it comes.
    pub(super) fn redact(self, mut response: Response<ResponseBody>) -> Response<ResponseBody> {
        self.fields(response.headers_mut());
        let reason = response.extensions().get::<ReasonPhrase>();
        if reason.is_some_and(|reason| !self.find(reason.as_bytes(), true).whole.is_empty()) {
            response.extensions_mut().remove::<ReasonPhrase>();
        }
        let text = is_text(response.headers()) && !is_coded(response.headers());
        response.map(|body| body.redacted(self, text))
    }

    fn fields(&self, fields: &mut HeaderMap) {
        for value in fields.values_mut() {
            let whole = self.find(value.as_bytes(), true).whole;
            if whole.is_empty() {
                continue;
            }
            let sensitive = value.is_sensitive();
            let masked = masked(Bytes::copy_from_slice(value.as_bytes()), &whole);
            *value = HeaderValue::from_maybe_shared(masked).unwrap_or(HeaderValue::from_static(""));
            value.set_sensitive(sensitive);
        }
    }

    /// The tokens in a text. The `last` text has no other behind it in which a token could go on. Every place is looked
    /// at by itself: a token that is not made of repetitions of its own beginning disagrees with most at the first byte.
    fn find(&self, text: &[u8], last: bool) -> Found {
        let (mut whole, mut at) = (Vec::new(), 0);
        while let Some(skipped) = text[at..].iter().position(|byte| self.starts.contains(byte)) {
            at += skipped;
            match self.fit(&text[at..], last) {
                Fit::No => at += 1,
                Fit::Begun => return Found { whole, open: at },
                Fit::Whole(length) => {
                    whole.push(at..at + length);
                    at += length;
                }
            }
        }
        Found { whole, open: text.len() }
    }

    /// The longest fit at the beginning of a text.
    fn fit(&self, text: &[u8], last: bool) -> Fit {
        let fits =
            self.tokens.iter().flat_map(|token| token.spellings.iter().map(|spelling| token.fit(spelling, text)));
        fits.filter(|fit| !(last && *fit == Fit::Begun)).max().unwrap_or(Fit::No)
    }
}

impl Token {
    fn fit(&self, spelling: &Spelling, text: &[u8]) -> Fit {
        let mut at = 0;
        for character in self.secret.expose().bytes() {
            match spelling.fit(character, &text[at..]) {
                Fit::Whole(length) => at += length,
                other => return other,
            }
        }
        Fit::Whole(at)
    }
}

impl Spelling {
    fn new(lead: u8, forms: impl Fn(u8, char) -> Vec<String>) -> Self {
        let spelled = |c: u8| if is_plain(c) { Vec::new() } else { forms(c, char::from(c)) };
        Self { lead: Some(lead), forms: (0..128).map(spelled).collect() }
    }

    fn forms(&self, character: u8) -> &[String] {
        self.forms.get(usize::from(character)).map_or(&[], Vec::as_slice)
    }

    fn fit(&self, character: u8, text: &[u8]) -> Fit {
        let Some(&first) = text.first() else { return Fit::Begun };
        if Some(first) != self.lead {
            return if first == character { Fit::Whole(1) } else { Fit::No };
        }
        let agree = |form: &&String| form.bytes().zip(text).all(|(form, byte)| form == *byte);
        match self.forms(character).iter().find(agree) {
            Some(form) if form.len() <= text.len() => Fit::Whole(form.len()),
            Some(_) => Fit::Begun,
            None => Fit::No,
        }
    }
}

/// Characters that no encoder writes in another form: with these alone, a token looks the same everywhere.
fn is_plain(character: u8) -> bool {
    character.is_ascii_alphanumeric() || matches!(character, b'-' | b'.' | b'_')
}

fn masked(text: Bytes, whole: &[Range<usize>]) -> Bytes {
    if whole.is_empty() {
        return text;
    }
    let mut text = BytesMut::from(text);
    for range in whole {
        text[range.clone()].fill(FILLER);
    }
    text.freeze()
}

/// A body whose tokens are taken out while it streams.
pub(super) struct Redacted<B: Body> {
    body: B,
    redactor: Redactor,
    /// Whether its data is searched, not its trailers alone.
    text: bool,
    /// The end of what came, where a token may have begun; less than the token is long.
    held: Zeroizing<Vec<u8>>,
    /// What came behind it: trailers, an error, or the end.
    behind: Option<Next<B::Error>>,
}

type Next<E> = Option<Result<Frame<Bytes>, E>>;

impl<B: Body<Data = Bytes, Error: Unpin> + Unpin> Redacted<B> {
    pub(super) fn new(body: B, redactor: Redactor, text: bool) -> Self {
        Self { body, redactor, text, held: Zeroizing::default(), behind: None }
    }

    /// What can go on of what is held and of what came, as the same memory where nothing has to change.
    fn pass(&mut self, data: Bytes, last: bool) -> Bytes {
        let held = std::mem::take(&mut self.held);
        let mut data = if held.is_empty() { data } else { [&held[..], &data[..]].concat().into() };
        let found = self.redactor.find(&data, last);
        self.held = Zeroizing::new(data.split_off(found.open).to_vec());
        masked(data, &found.whole)
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Next<B::Error>> {
        loop {
            if let Some(behind) = self.behind.take() {
                return Poll::Ready(behind);
            }
            let next = match ready!(Pin::new(&mut self.body).poll_frame(cx)) {
                Some(Ok(frame)) => frame,
                end => return Poll::Ready(self.behind(end)),
            };
            match next.into_data() {
                Ok(data) if !self.text => return Poll::Ready(Some(Ok(Frame::data(data)))),
                Ok(data) => {
                    let data = self.pass(data, self.body.is_end_stream());
                    if !data.is_empty() {
                        return Poll::Ready(Some(Ok(Frame::data(data))));
                    }
                }
                Err(mut other) => {
                    if let Some(trailers) = other.trailers_mut() {
                        self.redactor.fields(trailers);
                    }
                    return Poll::Ready(self.behind(Some(Ok(other))));
                }
            }
        }
    }

    /// What is held has come to its end: it goes first.
    fn behind(&mut self, next: Next<B::Error>) -> Next<B::Error> {
        let held = self.pass(Bytes::new(), true);
        if held.is_empty() {
            return next;
        }
        self.behind = Some(next);
        Some(Ok(Frame::data(held)))
    }
}

impl<B: Body<Data = Bytes, Error: Unpin> + Unpin> Body for Redacted<B> {
    type Data = Bytes;
    type Error = B::Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, B::Error>>> {
        self.poll_next(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.held.is_empty() && self.behind.is_none() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        longer(self.body.size_hint(), self.held.len())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use futures_util::FutureExt;
    use http_body_util::BodyExt;
    use proptest::prelude::*;

    use super::*;

    fn redactor(tokens: &[&str]) -> Redactor {
        let mut redactor = Redactor::default();
        tokens.iter().for_each(|token| redactor.add(&Secret::new(*token)));
        redactor
    }

    fn redacted(tokens: &[&str], text: &str) -> String {
        let text = Bytes::copy_from_slice(text.as_bytes());
        let whole = redactor(tokens).find(&text, true).whole;
        String::from_utf8(masked(text, &whole).to_vec()).unwrap()
    }

    /// Frames of a body, which may know that no more come.
    struct Frames {
        left: VecDeque<Result<Frame<Bytes>, &'static str>>,
        knows_its_end: bool,
    }

    impl Body for Frames {
        type Data = Bytes;
        type Error = &'static str;

        fn poll_frame(mut self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<Next<&'static str>> {
            Poll::Ready(self.left.pop_front())
        }

        fn is_end_stream(&self) -> bool {
            self.knows_its_end && self.left.is_empty()
        }

        fn size_hint(&self) -> SizeHint {
            let lengths = self.left.iter().filter_map(|frame| frame.as_ref().ok()?.data_ref().map(Bytes::len));
            SizeHint::with_exact(lengths.sum::<usize>() as u64)
        }
    }

    fn body(tokens: &[&str], pieces: &[&[u8]], knows_its_end: bool) -> Redacted<Frames> {
        let left = pieces.iter().map(|piece| Ok(Frame::data(Bytes::copy_from_slice(piece)))).collect();
        Redacted::new(Frames { left, knows_its_end }, redactor(tokens), true)
    }

    #[test]
    fn a_token_is_recognised_in_the_spellings_of_urls_json_and_html() {
        // SEC-040
        let same = |text: &str| "*".repeat(text.len());
        for spelled in [
            "a+/b=c~!",
            "a%2B%2Fb%3Dc%7E%21",
            "a%2b/b%3dc~!",
            "a+\\/b=c~!",
            "a\\u002B\\u002fb\\u003Dc~!",
            "a&#43;&#x2F;b&#x3d;c~!",
        ] {
            assert_eq!(redacted(&["a+/b=c~!"], spelled), same(spelled));
        }
        assert_eq!(
            redacted(&["a\"b&<"], "a\\\"b&< a&quot;b&amp;&lt;"),
            format!("{} {}", same("a.\"b&<"), same("a&quot;b&amp;&lt;"))
        );
        for other in ["a%2B%2Fb%3Dc%7E%2", "a%252B/b=c~!", "A+/b=c~!", "%61+/b=c~!", "a++/b=c~!", "a%2Gb"] {
            assert_eq!(redacted(&["a+/b=c~!"], other), other);
        }
    }

    #[test]
    fn every_token_of_the_request_is_looked_for_and_the_longest_wins() {
        assert_eq!(redacted(&["abc", "bcd", "abcd", "abc"], "abcd abc bcd ab"), "**** *** *** ab");
        assert_eq!(redacted(&["aab"], "aaaab aab"), "aa*** ***");
        assert_eq!(redacted(&[""], "abc"), "abc");
    }

    #[test]
    fn fields_keep_their_length_and_whether_they_are_sensitive() {
        // SEC-041
        let mut fields = HeaderMap::new();
        let mut sensitive = HeaderValue::from_static("Bearer a/b");
        sensitive.set_sensitive(true);
        fields.append("x-echo", sensitive);
        fields.append("x-echo", HeaderValue::from_bytes(b"\xffa%2Fb\xff").unwrap());
        fields.append("location", HeaderValue::from_static("/?q=abc"));
        redactor(&["a/b"]).fields(&mut fields);
        let all: Vec<&HeaderValue> = fields.get_all("x-echo").iter().collect();
        assert_eq!(all[0], "Bearer ***");
        assert!(all[0].is_sensitive());
        assert_eq!(all[1].as_bytes(), b"\xff*****\xff");
        assert_eq!(fields["location"], "/?q=abc");
    }

    #[test]
    fn what_changes_nothing_is_passed_on_at_once_and_uncopied() {
        let mut body = body(&["token"], &[], false);
        let data = Bytes::from_static(b"data: tok, to");
        let passed = body.pass(data.clone(), false);
        assert_eq!((passed.as_ptr(), &passed[..], &body.held[..]), (data.as_ptr(), &b"data: tok, "[..], &b"to"[..]));
        assert_eq!(&body.pass(Bytes::from_static(b"\n\n"), false)[..], b"to\n\n");
        assert_eq!(&body.pass(Bytes::from_static(b"event\n\n"), false)[..], b"event\n\n");
    }

    #[test]
    fn what_is_held_goes_before_trailers_an_error_and_the_end() {
        let fields: HeaderMap = [("x-echo".parse().unwrap(), "token".parse().unwrap())].into_iter().collect();
        let trailers = Frame::trailers(fields);
        for (last, knows_its_end) in
            [(Some(Ok(trailers)), false), (Some(Err("cut")), true), (None, false), (None, true)]
        {
            let mut body = body(&["token"], &[b"to", b"k"], knows_its_end);
            assert_eq!(body.size_hint().exact(), Some(3));
            let more = last.is_some();
            body.body.left.extend(last);
            let next = |body: &mut Redacted<Frames>| body.frame().now_or_never().unwrap();
            assert_eq!(next(&mut body).unwrap().unwrap().data_ref().unwrap(), "tok");
            assert_eq!((body.is_end_stream(), body.size_hint().exact()), (knows_its_end && !more, Some(0)));
            match next(&mut body) {
                Some(Ok(frame)) => assert_eq!(frame.trailers_ref().unwrap()["x-echo"], "*****"),
                Some(Err(error)) => assert_eq!(error, "cut"),
                None => assert!(!more),
            }
            assert!(next(&mut body).is_none());
        }
    }

    #[test]
    fn text_is_known_by_its_type() {
        for (kind, text) in [
            ("text/html; charset=utf-8", true),
            ("TEXT/event-stream", true),
            ("application/problem+json", true),
            ("application/json;charset=UTF-16LE", false),
            ("application/x-www-form-urlencoded", true),
            ("application/javascript", true),
            ("image/svg+xml", true),
            ("multipart/mixed; boundary=x", true),
            ("message/http", true),
            ("", true),
            ("json", true),
            ("application/octet-stream", false),
            ("application/grpc", false),
            ("application/grpc+proto", false),
            ("application/vnd.ms-excel", false),
            ("image/png", false),
        ] {
            assert_eq!(is_text_type(kind), text, "{kind}");
        }
        assert!(is_text(&HeaderMap::new()));
    }

    /// Every way to write a token, one by one.
    fn all_spelled(token: &str) -> Vec<String> {
        let hex = |c: char| [format!("{:02x}", c as u8), format!("{:02X}", c as u8)];
        let percent = |c: char| hex(c).map(|hex| format!("%{hex}")).to_vec();
        let json = |c: char| [hex(c).map(|hex| format!("\\u00{hex}")).to_vec(), vec![format!("\\{c}")]].concat();
        let html = |c: char| {
            let named = if c == '&' { vec!["&amp;".to_owned()] } else { Vec::new() };
            [hex(c).map(|hex| format!("&#x{hex};")).to_vec(), vec![format!("&#{};", c as u8)], named].concat()
        };
        let mut all = vec![token.to_owned()];
        for (lead, forms) in [('%', &percent as &dyn Fn(char) -> Vec<String>), ('\\', &json), ('&', &html)] {
            let mut spelled = vec![String::new()];
            for c in token.chars() {
                let mut ways = if c.is_ascii_alphanumeric() { Vec::new() } else { forms(c) };
                ways.extend((c != lead).then(|| c.to_string()));
                spelled = spelled.iter().flat_map(|head| ways.iter().map(move |way| format!("{head}{way}"))).collect();
            }
            all.extend(spelled);
        }
        all
    }

    /// What is to come out, found in the slowest way.
    fn expected(spelled: &[String], text: &str) -> String {
        let (mut out, mut at) = (String::new(), 0);
        while at < text.len() {
            let longest = spelled.iter().filter(|token| text[at..].starts_with(*token)).map(String::len).max();
            match longest {
                Some(length) => out.push_str(&"*".repeat(length)),
                None => out.push_str(&text[at..=at]),
            }
            at += longest.unwrap_or(1);
        }
        out
    }

    /// Text of the characters that tokens and their spellings are made of, with tokens in it.
    fn text(spelled: Vec<String>) -> impl Strategy<Value = String> {
        let token = prop::sample::select(spelled.clone());
        let part = (prop::sample::select(spelled), 0..20usize)
            .prop_map(|(token, end)| token[..end.min(token.len())].to_owned());
        prop::collection::vec(prop_oneof![token, part, "[ab/%&\\\\u0-9fx#;]{0,6}", "[ -~&&[^*]]{0,6}"], 0..12)
            .prop_map(|parts| parts.concat())
    }

    fn cut<'a>(text: &'a str, sizes: &[usize]) -> Vec<&'a [u8]> {
        let (mut rest, mut pieces) = (text.as_bytes(), Vec::new());
        for size in sizes {
            let (piece, after) = rest.split_at((*size).min(rest.len()));
            pieces.push(piece);
            rest = after;
        }
        pieces.push(rest);
        pieces
    }

    #[test]
    fn what_only_resembles_an_escape_is_not_held() {
        let mut body = body(&["/&/"], &[], false);
        for text in ["\\U", "\\U002f", "&AMP", "%2g"] {
            assert_eq!(body.pass(Bytes::from(text), false), text);
        }
    }

    proptest! {
        #[test]
        fn whatever_the_frames_no_token_goes_through_and_all_else_does(
            (tokens, text) in prop::collection::vec("[ab/%&]{1,4}", 1..3).prop_flat_map(|tokens| {
                let spelled = tokens.iter().flat_map(|token| all_spelled(token)).collect();
                (Just(tokens), text(spelled))
            }),
            sizes in prop::collection::vec(0..9usize, 0..30),
            knows_its_end: bool,
        ) {
            // SEC-040
            let tokens: Vec<&str> = tokens.iter().map(String::as_str).collect();
            let spelled: Vec<String> = tokens.iter().flat_map(|token| all_spelled(token)).collect();
            let expected = expected(&spelled, &text);
            let pieces = cut(&text, &sizes);
            let whole = body(&tokens, &pieces, knows_its_end).collect().now_or_never().unwrap().unwrap().to_bytes();
            prop_assert_eq!(String::from_utf8_lossy(&whole), expected.as_str());
            prop_assert_eq!(whole.len(), text.len());
            prop_assert!(!spelled.iter().any(|token| expected.contains(token.as_str())));

            let mut body = body(&tokens, &[], false);
            for piece in pieces {
                body.pass(Bytes::copy_from_slice(piece), false);
                let held = std::str::from_utf8(&body.held).unwrap();
                let open = |token: &String| token.len() > held.len() && token.starts_with(held);
                prop_assert!(held.is_empty() || spelled.iter().any(open), "held {:?}", held);
                prop_assert_eq!(body.size_hint().exact(), Some(held.len() as u64));
            }
        }
    }
}
