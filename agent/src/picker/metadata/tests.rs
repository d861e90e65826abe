use prost_types::ListValue;

use super::*;
use crate::config::Attribute;

fn of(kind: Kind) -> Value {
    Value { kind: Some(kind) }
}

fn number(number: f64) -> Value {
    of(Kind::NumberValue(number))
}

fn text(text: &str) -> Value {
    of(Kind::StringValue(text.to_owned()))
}

fn list(values: impl IntoIterator<Item = Value>) -> Value {
    of(Kind::ListValue(ListValue { values: values.into_iter().collect() }))
}

fn fields<'n>(fields: impl IntoIterator<Item = (&'n str, Value)>) -> Struct {
    Struct { fields: fields.into_iter().map(|(key, value)| (key.to_owned(), value)).collect() }
}

/// Metadata with one namespace.
fn within(namespace: &str, key: &str, value: Value) -> Struct {
    fields([(namespace, of(Kind::StructValue(fields([(key, value)]))))])
}

fn collected(rules: EppMetadata) -> Collected {
    Collected::new(&Arc::new(rules))
}

fn counting(names: &[&str]) -> EppMetadata {
    let attribute = |name: &&str| {
        let (namespace, key) = name.split_once('/').unwrap();
        Attribute { namespace: namespace.into(), key: key.into() }
    };
    EppMetadata { counters: names.iter().map(attribute).collect(), ..EppMetadata::default() }
}

#[test]
fn values_keep_their_names_and_later_ones_replace_earlier_ones() {
    let mut all = collected(EppMetadata::default());
    assert_eq!(all.json(), None);
    all.take(&within("b", "x", number(1.0)));
    all.take(&within("envoy.lb", "cost", number(0.25)));
    all.take(&within("b", "x", text("é\"")));
    let nested = of(Kind::StructValue(fields([("10.0.0.1:80", list([number(1.0), of(Kind::BoolValue(true))]))])));
    all.take(&within("envoy.lb", "scores", nested));
    all.take(&within("envoy.lb", DESTINATION, text("10.0.0.1:80")));
    let expected = r#"{"b":{"x":"é\""},"envoy.lb":{"cost":0.25,"scores":{"10.0.0.1:80":[1,true]}}}"#;
    assert_eq!(all.json().as_deref(), Some(expected));
    assert_eq!(all.dropped(), DroppedValues::default());
}

#[test]
fn values_beyond_a_bound_are_dropped_and_counted() {
    let rules = EppMetadata { log_bytes: 100, log_entries: 3, log_depth: 2, ..EppMetadata::default() };
    let mut all = collected(rules);
    all.take(&fields([("n", number(1.0))]));
    all.take(&within("n", "deep", list([list([number(1.0)])])));
    all.take(&within("n", "long", text(&"x".repeat(100))));
    all.take(&within("n", "escaped", text(&"\u{1}".repeat(20))));
    all.take(&within("n", &"k".repeat(100), number(1.0)));
    all.take(&within("n", "many", list(vec![number(1.0); 1000])));
    assert_eq!(all.json(), None);
    assert_eq!(all.dropped(), DroppedValues { bytes: 4, depth: 1, entries: 0, form: 1 });
    for key in ["a", "b", "c", "d"] {
        all.take(&within("n", key, number(1.0)));
    }
    assert_eq!((all.json().as_deref(), all.dropped().entries), (Some(r#"{"n":{"a":1,"b":1,"c":1}}"#), 1));
    // A value without room removes the earlier one of its name.
    all.take(&within("n", "a", text(&"x".repeat(100))));
    assert_eq!(all.json().as_deref(), Some(r#"{"n":{"b":1,"c":1}}"#));
    all.take(&within("n", "a", text(&"x".repeat(60))));
    all.refused();
    assert!(all.json().unwrap().len() <= 100);
    assert_eq!(all.dropped(), DroppedValues { bytes: 6, depth: 1, entries: 1, form: 1 });
}

#[test]
fn last_value_of_each_counter_is_counted_even_without_room() {
    let rules = EppMetadata { log_bytes: 0, ..counting(&["envoy.lb/cost", "a/b/c", "a/other"]) };
    let mut all = collected(rules);
    all.take(&within("envoy.lb", "cost", number(3.0)));
    all.take(&within("a", "cost", number(4.0)));
    all.take(&within("a", "b/c", number(5.0)));
    all.take(&within("envoy.lb", "cost", number(0.5)));
    let numbers: Vec<_> = all.numbers().collect();
    assert_eq!(
        numbers,
        [("envoy.lb/cost".to_owned(), CountedValue::Valid(0.5)), ("a/b/c".to_owned(), CountedValue::Valid(5.0))]
    );
    assert_eq!(all.json(), None);
}

#[test]
fn numbers_that_cannot_be_added_are_refused() {
    for (value, expected) in [
        (number(f64::NAN), CountedValue::NotFinite),
        (number(f64::INFINITY), CountedValue::NotFinite),
        (number(f64::NEG_INFINITY), CountedValue::NotFinite),
        (number(-0.5), CountedValue::Negative),
        (text("7"), CountedValue::Absent),
        (list([number(1.0)]), CountedValue::Absent),
        (Value { kind: None }, CountedValue::Absent),
        (number(-0.0), CountedValue::Valid(0.0)),
    ] {
        let mut all = collected(counting(&["n/k"]));
        all.take(&within("n", "k", number(1.0)));
        all.take(&within("n", "k", value.clone()));
        assert_eq!(all.numbers().map(|(_, number)| number).collect::<Vec<_>>(), [expected], "{value:?}");
    }
    let mut all = collected(EppMetadata::default());
    all.take(&within("n", "k", number(f64::NAN)));
    assert_eq!(all.json().as_deref(), Some(r#"{"n":{"k":"NaN"}}"#));
}
