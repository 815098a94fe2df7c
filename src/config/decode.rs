//! Decodes a document into plain structs, and goes on after a mistake.
//!
//! A derived `Deserialize` stops at the first mistake. So the document is decoded again and again: each time the
//! value that was wrong is marked, and the next time it is passed over. No message here ever shows a value.

use std::fmt;

use serde::de::value::StrDeserializer;
use serde::de::{self, DeserializeSeed, Deserializer, Expected, IntoDeserializer, MapAccess, SeqAccess, Unexpected};
use serde::de::{Deserialize, Visitor};
use serde::forward_to_deserialize_any;

use super::Mistake;
use super::locate::{Document, Entry, Node, Position, Value, join};

/// The most mistakes that are told.
const MOST: usize = 100;

/// Decodes what can be, with a mistake for all that cannot; nothing if not even the whole has the right shape.
pub(super) fn decode<T: for<'de> Deserialize<'de>>(document: &mut Document) -> (Option<T>, Vec<Mistake>) {
    let mut mistakes = Vec::new();
    while !document.root.broken {
        let mistake = match T::deserialize(&document.root) {
            Ok(value) => return (Some(value), mistakes),
            Err(problem) => mark(document, problem),
        };
        if mistakes.len() == MOST {
            let what = format!("there are more mistakes than {MOST}, and this is where the next one is");
            mistakes.push(Mistake { what, hint: None, ..mistake });
            break;
        }
        mistakes.push(mistake);
    }
    (None, mistakes)
}

/// Marks the value that a problem is in, and says where that is.
fn mark(document: &mut Document, problem: Problem) -> Mistake {
    let mut node = &mut document.root;
    let mut at = node.at;
    let mut place = String::new();
    for step in problem.steps.iter().rev() {
        let next = match (step, &mut node.value) {
            (Step::Item(index), Value::List(list)) => {
                place = format!("{place}[{index}]");
                list.get_mut(*index).map(|item| (item.at, item))
            }
            (Step::Key(key), Value::Mapping(entries)) => {
                place = join(&place, key);
                let entry = entries.iter_mut().find(|entry| entry.key == *key);
                entry.map(|entry| (if problem.in_key { entry.at } else { entry.node.at }, &mut entry.node))
            }
            _ => None,
        };
        let Some(next) = next else { break };
        (at, node) = next;
    }
    node.broken = true;
    let Position { line, column } = at;
    let Problem { what, hint, .. } = problem;
    Mistake { file: document.file.clone(), line, column, place, what, hint }
}

/// A mistake on its way out of the structs, collecting its path.
#[derive(Debug)]
pub(super) struct Problem {
    what: String,
    hint: Option<String>,
    /// Innermost first.
    steps: Vec<Step>,
    /// Whether it is the last key that is wrong, not its value.
    in_key: bool,
}

#[derive(Debug)]
pub(super) enum Step {
    Key(String),
    Item(usize),
}

impl Problem {
    fn new(what: impl Into<String>, hint: Option<String>) -> Self {
        Self { what: what.into(), hint, steps: Vec::new(), in_key: false }
    }

    fn under(mut self, step: Step) -> Self {
        self.steps.push(step);
        self
    }

    fn key(mut self, key: &str) -> Self {
        self.in_key = true;
        self.under(Step::Key(key.to_owned()))
    }
}

impl de::Error for Problem {
    /// What is wrong, and a hint on a line of its own.
    fn custom<T: fmt::Display>(message: T) -> Self {
        let message = message.to_string();
        match message.split_once('\n') {
            Some((what, hint)) => Self::new(what, Some(hint.to_owned())),
            None => Self::new(message, None),
        }
    }

    fn invalid_type(found: Unexpected<'_>, expected: &dyn Expected) -> Self {
        let expected = match expected.to_string() {
            sequence if sequence == "a sequence" => "a list".to_owned(),
            expected => expected,
        };
        let found = name(found);
        let hint = match (expected.as_str(), found) {
            ("a string", "a number" | "a boolean") => Some("put it in quotes".to_owned()),
            ("a boolean", _) => Some("write `true` or `false`".to_owned()),
            ("a list", "a string" | "a number") => Some("put it in brackets, as in `[a, b]`".to_owned()),
            _ => None,
        };
        Self::new(format!("expected {expected}, found {found}"), hint)
    }

    fn invalid_value(_: Unexpected<'_>, expected: &dyn Expected) -> Self {
        Self::new(format!("expected {expected}"), None)
    }

    fn unknown_variant(variant: &str, expected: &'static [&'static str]) -> Self {
        Self::new(format!("expected one of {}", list(expected)), did_you_mean(variant, expected))
    }

    fn unknown_field(field: &str, expected: &'static [&'static str]) -> Self {
        let spaceless = field.split_once(':').filter(|(key, _)| expected.contains(key));
        let hint = match spaceless {
            Some((key, _)) => format!("put a space after `{key}:`"),
            None => did_you_mean(field, expected).unwrap_or_else(|| format!("the keys here are {}", list(expected))),
        };
        Self::new("unknown key", Some(hint))
    }

    fn duplicate_field(field: &'static str) -> Self {
        Self::new(format!("this is `{field}` again, under its other name"), Some("leave out one of them".to_owned()))
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.what)
    }
}

impl std::error::Error for Problem {}

/// The nearest of some names, when it is near.
pub(super) fn did_you_mean(given: &str, names: &[&str]) -> Option<String> {
    let near = names.iter().map(|name| (strsim::normalized_damerau_levenshtein(given, name), name));
    let (nearness, name) = near.max_by(|(a, _), (b, _)| a.total_cmp(b))?;
    (nearness >= 0.6).then(|| format!("did you mean `{name}`?"))
}

/// Names, one after the other.
pub(super) fn list(names: &[&str]) -> String {
    let names: Vec<String> = names.iter().map(|name| format!("`{name}`")).collect();
    names.join(", ")
}

fn name(found: Unexpected<'_>) -> &'static str {
    match found {
        Unexpected::Bool(_) => "a boolean",
        Unexpected::Unsigned(_) | Unexpected::Signed(_) | Unexpected::Float(_) => "a number",
        Unexpected::Str(_) => "a string",
        Unexpected::Unit | Unexpected::Option => "nothing",
        Unexpected::Seq => "a list",
        Unexpected::Map => "a mapping",
        _ => "something else",
    }
}

fn unexpected(node: &Node) -> Unexpected<'_> {
    match &node.value {
        Value::Nothing => Unexpected::Unit,
        Value::Bool(value) => Unexpected::Bool(*value),
        Value::Number(number) => Unexpected::Unsigned(number.unwrap_or_default()),
        Value::Text(text) => Unexpected::Str(text),
        Value::List(_) => Unexpected::Seq,
        Value::Mapping(_) => Unexpected::Map,
    }
}

impl<'de> Deserializer<'de> for &'de Node {
    type Error = Problem;

    fn deserialize_any<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        match &self.value {
            Value::Nothing => visitor.visit_unit(),
            Value::Bool(value) => visitor.visit_bool(*value),
            Value::Number(Some(number)) => visitor.visit_u64(*number),
            Value::Number(None) => visitor.visit_f64(f64::NAN),
            Value::Text(text) => visitor.visit_str(text),
            Value::List(list) => visitor.visit_seq(Items { list, next: 0 }),
            Value::Mapping(entries) => map(entries, visitor),
        }
    }

    /// A key that is there has a value: `client_id:` is a mistake, and not the same as no `client_id`.
    fn deserialize_option<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_some(self)
    }

    fn deserialize_newtype_struct<V: Visitor<'de>>(self, _: &'static str, visitor: V) -> Result<V::Value, Problem> {
        visitor.visit_newtype_struct(self)
    }

    /// A list whose items are all commented out is an empty one.
    fn deserialize_seq<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        match &self.value {
            Value::Nothing => visitor.visit_seq(Items { list: &[], next: 0 }),
            _ => self.deserialize_any(visitor),
        }
    }

    /// So is a mapping: `client_credentials:` alone says which grant it is.
    fn deserialize_map<V: Visitor<'de>>(self, visitor: V) -> Result<V::Value, Problem> {
        match &self.value {
            Value::Nothing => map(&[], visitor),
            Value::Mapping(entries) => map(entries, visitor),
            // A derived struct would take a list for its fields in order.
            _ => Err(de::Error::invalid_type(unexpected(self), &visitor)),
        }
    }

    fn deserialize_struct<V: Visitor<'de>>(
        self,
        _: &'static str,
        _: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        self.deserialize_map(visitor)
    }

    fn deserialize_enum<V: Visitor<'de>>(
        self,
        _: &'static str,
        variants: &'static [&'static str],
        visitor: V,
    ) -> Result<V::Value, Problem> {
        match &self.value {
            Value::Text(text) => visitor.visit_enum(StrDeserializer::new(text.as_str())),
            _ => {
                let one_of = format!("one of {}", list(variants));
                Err(de::Error::invalid_type(unexpected(self), &one_of.as_str()))
            }
        }
    }

    forward_to_deserialize_any! {
        bool i8 i16 i32 i64 i128 u8 u16 u32 u64 u128 f32 f64 char str string bytes byte_buf unit unit_struct tuple
        tuple_struct identifier ignored_any
    }
}

struct Items<'de> {
    list: &'de [Node],
    next: usize,
}

impl<'de> SeqAccess<'de> for Items<'de> {
    type Error = Problem;

    fn next_element_seed<T: DeserializeSeed<'de>>(&mut self, seed: T) -> Result<Option<T::Value>, Problem> {
        while self.list.get(self.next).is_some_and(|node| node.broken) {
            self.next += 1;
        }
        let Some(node) = self.list.get(self.next) else { return Ok(None) };
        let index = self.next;
        self.next += 1;
        seed.deserialize(node).map(Some).map_err(|problem| problem.under(Step::Item(index)))
    }
}

/// Visits a mapping; a problem that is in no value of it is in the key that was last read.
fn map<'de, V: Visitor<'de>>(entries: &'de [Entry], visitor: V) -> Result<V::Value, Problem> {
    let mut entries = Entries { rest: entries.iter(), entry: None };
    visitor.visit_map(&mut entries).map_err(|problem| match entries.entry {
        Some(entry) if problem.steps.is_empty() => problem.key(&entry.key),
        _ => problem,
    })
}

struct Entries<'de> {
    rest: std::slice::Iter<'de, Entry>,
    entry: Option<&'de Entry>,
}

impl<'de> MapAccess<'de> for Entries<'de> {
    type Error = Problem;

    fn next_key_seed<K: DeserializeSeed<'de>>(&mut self, seed: K) -> Result<Option<K::Value>, Problem> {
        let Some(entry) = self.rest.find(|entry| entry.decodes()) else { return Ok(None) };
        self.entry = Some(entry);
        let key: StrDeserializer<'_, Problem> = entry.key.as_str().into_deserializer();
        seed.deserialize(key).map(Some)
    }

    fn next_value_seed<V: DeserializeSeed<'de>>(&mut self, seed: V) -> Result<V::Value, Problem> {
        let Some(entry) = self.entry else { return Err(de::Error::custom("a value without a key")) };
        seed.deserialize(&entry.node).map_err(|problem| problem.under(Step::Key(entry.key.clone())))
    }
}
