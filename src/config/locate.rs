//! Reads a YAML document into a tree in which every key and value knows its line and column.
//!
//! The YAML reader tells a place only at the end of an error's text. So the visitors here fail on purpose at every
//! scalar, once its value is safe, and read the place from the error: one pass finds them all.

use std::collections::HashMap;
use std::fmt;

use serde::de::{self, DeserializeSeed, Deserializer, EnumAccess, MapAccess, SeqAccess, Visitor};
use zeroize::Zeroizing;

use super::Mistake;

/// The longest file that is read, in bytes.
pub(super) const LONGEST: usize = 1 << 20;

/// The most keys and scalar values that a file may have.
const MOST_SCALARS: usize = 100_000;

/// How deep brackets may nest: no deeper than what the YAML reader reads.
const DEEPEST: usize = 128;

/// The most lists and mappings in brackets that a file may have.
const MOST_BRACKETS: usize = 10_000;

const TOO_DEEP: &str = "this is nested too deeply";

/// A line and a column, both from 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Position {
    pub line: usize,
    pub column: usize,
}

/// A value in the file.
#[derive(Debug)]
pub(super) struct Node {
    /// Its first character; for a mapping, a list or nothing under a key, that key's.
    pub at: Position,
    /// What it is.
    pub value: Value,
    /// Whether its text came from outside of the file, and so must never be shown.
    pub replaced: bool,
    /// Whether a mistake in it is already known: it is then as if it had decoded.
    pub broken: bool,
}

/// What a value is.
#[derive(Debug)]
pub(super) enum Value {
    Nothing,
    Bool(bool),
    /// A whole number, or none for any other.
    Number(Option<u64>),
    Text(Zeroizing<String>),
    List(Vec<Node>),
    Mapping(Vec<Entry>),
}

/// A key in the file, with its value.
#[derive(Debug)]
pub(super) struct Entry {
    pub key: String,
    pub at: Position,
    /// Where the same key stands before, if it does: then this one counts for nothing.
    pub repeats: Option<Position>,
    pub node: Node,
}

/// A file, read.
#[derive(Debug)]
pub(super) struct Document {
    pub file: String,
    pub root: Node,
}

impl Document {
    /// Reads a text as one YAML document without anchors, aliases and tags.
    pub fn read(file: &str, text: &str) -> Result<Self, Mistake> {
        match read(text) {
            Ok(root) => Ok(Self { file: file.to_owned(), root }),
            Err(Stop { at: Position { line, column }, what, hint }) => {
                Err(Mistake { file: file.to_owned(), line, column, place: String::new(), what, hint })
            }
        }
    }

    /// Forgets all keys at the top but these.
    pub fn keep(&mut self, keys: &[&str]) {
        if let Value::Mapping(entries) = &mut self.root.value {
            entries.retain(|entry| keys.contains(&entry.key.as_str()));
        }
    }

    /// The place from which all others are reached.
    pub fn top(&self) -> Spot<'_> {
        Spot { path: String::new(), at: self.root.at, node: Some(&self.root) }
    }

    /// A mistake at a place.
    pub fn mistake(&self, spot: &Spot<'_>, what: impl Into<String>, hint: Option<String>) -> Mistake {
        let Position { line, column } = spot.at;
        Mistake { file: self.file.clone(), line, column, place: spot.path.clone(), what: what.into(), hint }
    }

    /// Every key that stands twice in its mapping (a YAML reader would let the last one win).
    pub fn repeated_keys(&self) -> Vec<Mistake> {
        let mut found = Vec::new();
        self.find_repeated(&self.top(), &mut found);
        found
    }

    fn find_repeated(&self, spot: &Spot<'_>, found: &mut Vec<Mistake>) {
        for item in spot.items() {
            self.find_repeated(&item, found);
        }
        for entry in spot.all_entries() {
            let inner = spot.to(entry);
            let Some(first) = entry.repeats else {
                self.find_repeated(&inner, found);
                continue;
            };
            let key = Spot { at: entry.at, ..inner };
            let hint = format!("the first one is on line {}", first.line);
            found.push(self.mistake(&key, "the key is here twice", Some(hint)));
        }
    }
}

/// A place in the file, whether or not something is there.
#[derive(Debug, Clone)]
pub(super) struct Spot<'a> {
    /// As in `routes[1].provider`.
    pub path: String,
    /// Where it is, or where it is missing.
    pub at: Position,
    node: Option<&'a Node>,
}

impl<'a> Spot<'a> {
    /// The value of a key of this mapping.
    pub fn key(&self, key: &str) -> Spot<'a> {
        match self.all_entries().iter().find(|entry| entry.key == key) {
            Some(entry) => self.to(entry),
            None => Spot { path: join(&self.path, key), at: self.at, node: None },
        }
    }

    /// The value of an entry of this mapping, found before.
    pub fn to(&self, entry: &'a Entry) -> Spot<'a> {
        Spot { path: join(&self.path, &entry.key), at: entry.node.at, node: Some(&entry.node) }
    }

    /// The entries of this mapping that decode, in file order.
    pub fn entries(&self) -> impl Iterator<Item = Spot<'a>> {
        self.all_entries().iter().filter(|entry| entry.decodes()).map(|entry| self.to(entry))
    }

    /// The keys of this mapping, whether or not their values decode.
    pub fn keys(&self) -> impl Iterator<Item = &'a str> + use<'a> {
        self.all_entries().iter().filter(|entry| entry.repeats.is_none()).map(|entry| entry.key.as_str())
    }

    /// The items of this list that decode, in file order.
    pub fn items(&self) -> impl Iterator<Item = Spot<'a>> {
        let list: &[Node] = match self.node.map(|node| &node.value) {
            Some(Value::List(list)) => list,
            _ => &[],
        };
        let spot = |(index, node): (usize, &'a Node)| Spot {
            path: format!("{}[{index}]", self.path),
            at: node.at,
            node: Some(node),
        };
        list.iter().enumerate().filter(|(_, node)| !node.broken).map(spot)
    }

    /// Whether something is written here, be it a mistake.
    pub fn is_given(&self) -> bool {
        self.node.is_some()
    }

    /// Whether a mistake is already known here.
    pub fn is_broken(&self) -> bool {
        self.node.is_some_and(|node| node.broken)
    }

    /// Whether a mistake is already known in an item of this list.
    pub fn has_broken_items(&self) -> bool {
        matches!(self.node.map(|node| &node.value), Some(Value::List(list)) if list.iter().any(|item| item.broken))
    }

    /// Whether the value came from outside of the file.
    pub fn is_replaced(&self) -> bool {
        self.node.is_some_and(|node| node.replaced)
    }

    fn all_entries(&self) -> &'a [Entry] {
        match self.node.map(|node| &node.value) {
            Some(Value::Mapping(entries)) => entries,
            _ => &[],
        }
    }
}

impl Entry {
    /// Whether the entry is to be decoded.
    pub fn decodes(&self) -> bool {
        self.repeats.is_none() && !self.node.broken
    }
}

/// The path of a key in a mapping. A key that may be a secret with its colon in the wrong place is not shown.
pub(super) fn join(path: &str, key: &str) -> String {
    let key = if is_plain(key) { key } else { "(..)" };
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Names, hosts, and hosts with a port; not `client_secret:hunter2`.
pub(super) fn is_plain(key: &str) -> bool {
    let (name, port) = key.rsplit_once(':').unwrap_or((key, ""));
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'*');
    let address = name.strip_prefix('[').and_then(|name| name.strip_suffix(']'));
    let name_is_plain = match address {
        Some(address) => address.bytes().all(|b| b.is_ascii_hexdigit() || matches!(b, b':' | b'.')),
        None => name.bytes().all(plain),
    };
    key.len() <= 64 && !name.is_empty() && name_is_plain && port.bytes().all(|b| b.is_ascii_digit())
}

/// Why a text is not read to its end.
struct Stop {
    at: Position,
    what: String,
    hint: Option<String>,
}

fn stop(at: Position, what: &str, hint: Option<&str>) -> Stop {
    Stop { at, what: what.to_owned(), hint: hint.map(str::to_owned) }
}

const START: Position = Position { line: 1, column: 1 };

fn read(text: &str) -> Result<Node, Stop> {
    if text.len() > LONGEST {
        return Err(stop(START, "the file is longer than 1 MiB", None));
    }
    if text.starts_with('\u{feff}') {
        let hint = "save it as UTF-8 without a byte order mark";
        return Err(stop(START, "the file begins with a byte order mark", Some(hint)));
    }
    bound_brackets(text)?;
    let mut reader = Reader { nodes: 0, last: None, stopped: None };
    let node =
        ReadNode { reader: &mut reader, under: Some(START) }.deserialize(serde_yaml::Deserializer::from_str(text));
    node.map_err(|error| reader.stopped.unwrap_or_else(|| in_our_words(text, &error)))
}

/// The YAML reader takes time by the square of how deep brackets nest, and only then says that it is too deep.
fn bound_brackets(text: &str) -> Result<(), Stop> {
    let (mut open, mut all) = (0_usize, 0);
    for (index, line) in text.lines().enumerate() {
        for (column, byte) in line.bytes().enumerate() {
            match byte {
                b'[' | b'{' => (open, all) = (open + 1, all + 1),
                b']' | b'}' => open = open.saturating_sub(1),
                _ => continue,
            }
            let at = Position { line: index + 1, column: column + 1 };
            if open > DEEPEST {
                return Err(stop(at, TOO_DEEP, None));
            }
            // Closed in a comment, it is not closed for the reader.
            if all > MOST_BRACKETS {
                return Err(stop(at, "the file has more than 10000 lists and mappings in brackets", None));
            }
        }
    }
    Ok(())
}

/// An error of the YAML reader itself.
fn in_our_words(text: &str, error: &serde_yaml::Error) -> Stop {
    let said = error.to_string();
    let at = error.location().map(|at| Position { line: at.line(), column: at.column() }).unwrap_or(START);
    if said.contains("more than one document") {
        let separator = text.lines().enumerate().filter(|(_, line)| line.starts_with("---")).last();
        let line = separator.map_or(1, |(index, _)| index + 1);
        return stop(Position { line, column: 1 }, "the file holds more than one YAML document", None);
    }
    if said.starts_with("recursion limit") {
        return stop(at, TOO_DEEP, None);
    }
    if said.contains("invalid value: ") || said.contains("invalid type: ") {
        // Its text shows the value.
        return stop(at, "this is not what its YAML tag says", Some("leave out the tag that begins with `!!`"));
    }
    let line = text.lines().nth(at.line - 1).unwrap_or_default();
    let hint = if line.trim_start_matches(' ').starts_with('\t') {
        Some("indent with spaces, not with tabs")
    } else if said.contains("alias") || said.contains("anchor") {
        Some("quote a value that begins with `*` or `&`, as in `\"*.example.com\"`")
    } else if line.contains("[::") {
        Some("quote an IPv6 address, as in `\"[::1]:3128\"`")
    } else {
        None
    };
    let problem = said.split(" at line ").next().unwrap_or_default();
    let problem = problem.split(" at position ").next().unwrap_or_default();
    stop(at, &format!("this is not YAML: {problem}"), hint)
}

/// What the visitors share.
struct Reader {
    nodes: usize,
    /// How far the text has been read. What comes from before was not written here: it is an alias.
    last: Option<Position>,
    stopped: Option<Stop>,
}

impl Reader {
    fn stop<E: de::Error>(&mut self, at: Position, what: &str, hint: Option<&str>) -> E {
        self.stopped = Some(stop(at, what, hint));
        E::custom(what)
    }

    /// Takes the place of a scalar from the error that its visitor made of it.
    fn pass<E: de::Error>(&mut self, error: &E) -> Result<Position, E> {
        let at = end_of_text(error);
        if self.last.is_some_and(|last| at <= last) {
            let hint = "write the value out wherever it is needed";
            return Err(self.stop(at, "an anchor and its aliases are not read here", Some(hint)));
        }
        self.last = Some(at);
        self.nodes += 1;
        if self.nodes > MOST_SCALARS {
            return Err(self.stop(at, "the file has more than 100000 keys and values", None));
        }
        Ok(at)
    }
}

/// The place that ends an error's text, ` at line 3 column 7`; the reader leaves out the very first one.
fn end_of_text(error: &impl fmt::Display) -> Position {
    let said = error.to_string();
    let place = said.rsplit_once(" at line ").and_then(|(_, place)| place.split_once(" column "));
    let parse =
        |(line, column): (&str, &str)| Some(Position { line: line.parse().ok()?, column: column.parse().ok()? });
    place.and_then(parse).unwrap_or(START)
}

/// Reads a value.
struct ReadNode<'r> {
    reader: &'r mut Reader,
    /// The key that it is under.
    under: Option<Position>,
}

impl<'de> DeserializeSeed<'de> for ReadNode<'_> {
    type Value = Node;

    fn deserialize<D: Deserializer<'de>>(self, yaml: D) -> Result<Node, D::Error> {
        let Self { reader, under } = self;
        let mut scalar = None;
        let read = yaml.deserialize_any(ReadValue { reader, scalar: &mut scalar });
        let (value, at) = match (read, scalar) {
            (Ok(value), _) => {
                let at = under.or(first_inside(&value)).or(reader.last).unwrap_or(START);
                (value, at)
            }
            (Err(error), Some(scalar)) => {
                let at = reader.pass(&error)?;
                // Nothing has no character of its own.
                let at = if matches!(scalar, Value::Nothing) { under.unwrap_or(at) } else { at };
                (scalar, at)
            }
            (Err(error), None) => return Err(error),
        };
        Ok(Node { at, value, replaced: false, broken: false })
    }
}

fn first_inside(value: &Value) -> Option<Position> {
    match value {
        Value::List(list) => list.first().map(|node| node.at),
        Value::Mapping(entries) => entries.first().map(|entry| entry.at),
        _ => None,
    }
}

/// Reads a list or a mapping, and fails at a scalar once it is in `scalar`.
struct ReadValue<'r> {
    reader: &'r mut Reader,
    scalar: &'r mut Option<Value>,
}

impl ReadValue<'_> {
    fn fail<E: de::Error>(self, scalar: Value) -> Result<Value, E> {
        *self.scalar = Some(scalar);
        Err(E::custom("here"))
    }
}

impl<'de> Visitor<'de> for ReadValue<'_> {
    type Value = Value;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("YAML")
    }

    fn visit_unit<E: de::Error>(self) -> Result<Value, E> {
        self.fail(Value::Nothing)
    }

    fn visit_none<E: de::Error>(self) -> Result<Value, E> {
        self.fail(Value::Nothing)
    }

    fn visit_bool<E: de::Error>(self, value: bool) -> Result<Value, E> {
        self.fail(Value::Bool(value))
    }

    fn visit_u64<E: de::Error>(self, value: u64) -> Result<Value, E> {
        self.fail(Value::Number(Some(value)))
    }

    fn visit_i64<E: de::Error>(self, _: i64) -> Result<Value, E> {
        self.fail(Value::Number(None))
    }

    fn visit_u128<E: de::Error>(self, _: u128) -> Result<Value, E> {
        self.fail(Value::Number(None))
    }

    fn visit_i128<E: de::Error>(self, _: i128) -> Result<Value, E> {
        self.fail(Value::Number(None))
    }

    fn visit_f64<E: de::Error>(self, _: f64) -> Result<Value, E> {
        self.fail(Value::Number(None))
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<Value, E> {
        self.fail(Value::Text(Zeroizing::new(text.to_owned())))
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut items: A) -> Result<Value, A::Error> {
        let mut list = Vec::new();
        while let Some(node) = items.next_element_seed(ReadNode { reader: &mut *self.reader, under: None })? {
            list.push(node);
        }
        Ok(Value::List(list))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Value, A::Error> {
        let mut entries = Vec::new();
        let mut seen: HashMap<String, Position> = HashMap::new();
        while let Some((key, at)) = map.next_key_seed(ReadKey { reader: &mut *self.reader })? {
            let node = map.next_value_seed(ReadNode { reader: &mut *self.reader, under: Some(at) })?;
            let repeats = seen.get(&key).copied();
            seen.entry(key.clone()).or_insert(at);
            entries.push(Entry { key, at, repeats, node });
        }
        Ok(Value::Mapping(entries))
    }

    fn visit_enum<A: EnumAccess<'de>>(self, _: A) -> Result<Value, A::Error> {
        let at = self.reader.last.unwrap_or(START);
        Err(self.reader.stop(at, "a YAML tag, `!`, is not read here", Some("quote a value that begins with `!`")))
    }
}

/// Reads a key, as it is spelled.
struct ReadKey<'r> {
    reader: &'r mut Reader,
}

impl<'de> DeserializeSeed<'de> for ReadKey<'_> {
    type Value = (String, Position);

    fn deserialize<D: Deserializer<'de>>(self, yaml: D) -> Result<Self::Value, D::Error> {
        let mut spelled = None;
        let failed = yaml.deserialize_str(Spelling(&mut spelled));
        match (failed, spelled) {
            (Err(error), Some(key)) => Ok((key, self.reader.pass(&error)?)),
            _ => {
                let at = self.reader.last.unwrap_or(START);
                Err(self.reader.stop(at, "after this, a key is neither a word nor a quoted string", None))
            }
        }
    }
}

/// Fails at a key once it has its spelling.
struct Spelling<'k>(&'k mut Option<String>);

impl Visitor<'_> for Spelling<'_> {
    type Value = ();

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a key")
    }

    fn visit_str<E: de::Error>(self, text: &str) -> Result<(), E> {
        *self.0 = Some(text.to_owned());
        Err(E::custom("here"))
    }
}
