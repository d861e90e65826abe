//! Collects the dynamic metadata of an EPP's replies about one request, for the access log, the span and counters.
//!
//! Takes the metadata of each reply, of any phase and exchange; later values replace earlier ones of the same name. What is kept is
//! within the configured bytes, number and depth, and what is dropped is counted. Numbers that are to be counted need no room.

use std::{collections::BTreeMap, sync::Arc};

use parking_lot::Mutex;
use prost_types::{Struct, Value, value::Kind};
use serde_json::{Map, Value as Json};

use super::message::{DESTINATION, LB};
use crate::config::EppMetadata;

/// The metadata of one request: shared by its exchanges and its record.
pub type SharedMetadata = Arc<Mutex<Collected>>;

/// Everything that EPPs said about one request.
#[derive(Debug)]
pub struct Collected {
    rules: Arc<EppMetadata>,
    values: BTreeMap<Name, Kept>,
    /// Bytes of the names and values.
    bytes: usize,
    dropped: DroppedValues,
    /// The last value of each counter of the rules.
    numbers: Vec<Option<CountedValue>>,
}

/// Namespace and key.
type Name = (String, String);

#[derive(Debug)]
struct Kept {
    value: Json,
    bytes: usize,
}

/// How many values were dropped, by reason.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
pub struct DroppedValues {
    pub bytes: u64,
    pub depth: u64,
    pub entries: u64,
    /// What is not in a namespace.
    pub form: u64,
}

/// A value that is to be counted.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum CountedValue {
    /// Finite and not negative.
    Valid(f64),
    Negative,
    NotFinite,
    /// The value is of another type.
    Absent,
}

/// Why a value is not kept.
enum Refused {
    Bytes,
    Depth,
}

impl Collected {
    pub fn new(rules: &Arc<EppMetadata>) -> Self {
        Self {
            rules: Arc::clone(rules),
            values: BTreeMap::new(),
            bytes: 0,
            dropped: DroppedValues::default(),
            numbers: vec![None; rules.counters.len()],
        }
    }

    /// Takes the metadata of one reply.
    pub fn take(&mut self, metadata: &Struct) {
        for (namespace, value) in &metadata.fields {
            let Some(Kind::StructValue(values)) = &value.kind else {
                self.dropped.form += 1;
                continue;
            };
            for (key, value) in &values.fields {
                // The pick is in the log anyway.
                if namespace != LB || key != DESTINATION {
                    self.note(namespace, key, value);
                    self.keep(namespace, key, value);
                }
            }
        }
    }

    /// Metadata was too large to be looked at.
    pub fn refused(&mut self) {
        self.dropped.bytes += 1;
    }

    /// The kept values as JSON: an object for each namespace. `None` without any.
    pub fn json(&self) -> Option<String> {
        let mut all: BTreeMap<&str, BTreeMap<&str, &Json>> = BTreeMap::new();
        for ((namespace, key), kept) in &self.values {
            all.entry(namespace).or_default().insert(key, &kept.value);
        }
        (!all.is_empty()).then(|| serde_json::to_string(&all).unwrap_or_default())
    }

    /// Namespace, key and value of everything that is kept.
    pub fn values(&self) -> impl Iterator<Item = (&str, &str, &Json)> {
        self.values.iter().map(|((namespace, key), kept)| (namespace.as_str(), key.as_str(), &kept.value))
    }

    pub fn dropped(&self) -> DroppedValues {
        self.dropped
    }

    /// The last value of each counter that occurred, with its name.
    pub fn numbers(&self) -> impl Iterator<Item = (String, CountedValue)> {
        let named = self.rules.counters.iter().zip(&self.numbers);
        named.filter_map(|(name, number)| Some((name.to_string(), (*number)?)))
    }

    fn note(&mut self, namespace: &str, key: &str, value: &Value) {
        for (counter, number) in self.rules.counters.iter().zip(&mut self.numbers) {
            if counter.namespace == namespace && counter.key == key {
                *number = Some(CountedValue::of(value));
            }
        }
    }

    fn keep(&mut self, namespace: &str, key: &str, value: &Value) {
        let name = (namespace.to_owned(), key.to_owned());
        // An earlier value is wrong now, even if there is no room for this one.
        if let Some(before) = self.values.remove(&name) {
            self.bytes -= before.bytes;
        }
        if self.values.len() >= self.rules.log_entries {
            self.dropped.entries += 1;
            return;
        }
        let room = self.rules.log_bytes.saturating_sub(self.bytes);
        match fitted(namespace, key, value, self.rules.log_depth, room) {
            Ok(kept) => {
                self.bytes += kept.bytes;
                self.values.insert(name, kept);
            }
            Err(Refused::Bytes) => self.dropped.bytes += 1,
            Err(Refused::Depth) => self.dropped.depth += 1,
        }
    }
}

impl CountedValue {
    fn of(value: &Value) -> Self {
        match value.kind {
            Some(Kind::NumberValue(number)) if !number.is_finite() => Self::NotFinite,
            Some(Kind::NumberValue(number)) if number < 0.0 => Self::Negative,
            Some(Kind::NumberValue(number)) => Self::Valid(number),
            _ => Self::Absent,
        }
    }
}

/// The value as JSON, if it and its name fit into `room` bytes.
fn fitted(namespace: &str, key: &str, value: &Value, depth: usize, room: usize) -> Result<Kept, Refused> {
    let names = quoted(namespace) + quoted(key);
    let mut left = room.checked_sub(names).ok_or(Refused::Bytes)?;
    let value = json(value, depth, &mut left)?;
    // Escapes make it longer than its parts.
    let bytes = names + value.to_string().len();
    if bytes > room { Err(Refused::Bytes) } else { Ok(Kept { value, bytes }) }
}

/// The length of a text as JSON, with a separator.
fn quoted(text: &str) -> usize {
    serde_json::to_string(text).map_or(usize::MAX, |text| text.len() + 1)
}

/// Converts a value of at most `depth` levels. Takes its size, without escapes, from `left` before it allocates.
fn json(value: &Value, depth: usize, left: &mut usize) -> Result<Json, Refused> {
    let Some(below) = depth.checked_sub(1) else { return Err(Refused::Depth) };
    let mut take = |bytes: usize| left.checked_sub(bytes).map(|rest| *left = rest).ok_or(Refused::Bytes);
    Ok(match &value.kind {
        None | Some(Kind::NullValue(_)) => take(4).map(|()| Json::Null)?,
        Some(Kind::BoolValue(truth)) => take(4).map(|()| Json::Bool(*truth))?,
        Some(Kind::NumberValue(number)) => take(1).map(|()| as_json(*number))?,
        Some(Kind::StringValue(text)) => take(text.len() + 2).map(|()| Json::String(text.clone()))?,
        Some(Kind::ListValue(list)) => {
            take(2 + list.values.len())?;
            Json::Array(list.values.iter().map(|value| json(value, below, left)).collect::<Result<_, _>>()?)
        }
        Some(Kind::StructValue(fields)) => {
            take(2)?;
            let mut all = Map::new();
            for (key, value) in &fields.fields {
                *left = left.checked_sub(key.len() + 4).ok_or(Refused::Bytes)?;
                all.insert(key.clone(), json(value, below, left)?);
            }
            Json::Object(all)
        }
    })
}

/// An integer without a fraction; text for what JSON cannot write.
fn as_json(number: f64) -> Json {
    /// Up to here every integer has a representation of its own.
    const EXACT: f64 = 9_007_199_254_740_992.0;
    if number.fract() == 0.0 && number.abs() < EXACT {
        return Json::from(number as i64);
    }
    serde_json::Number::from_f64(number).map_or_else(|| Json::String(number.to_string()), Json::Number)
}

#[cfg(test)]
mod tests;
