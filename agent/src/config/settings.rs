//! Declares settings: each once, as a field of the struct of its section.
//!
//! [`settings!`] turns the declaration into the struct, its `Default`, the reader and the description. A field has its
//! documentation, its default and its [`SettingKind`], which determines the accepted values. The default file ([`super::default_file`]),
//! the reference (`reference.rs`) and the JSON Schema (`schema.rs`) are printed from the description. `CONTRIBUTING.md`
//! has the recipe for a new setting.

use std::marker::PhantomData;

use serde_json::{Map, Value as Json, json};

use super::document::Section;

/// Keys with their values.
pub(super) type KeyValues = Map<String, Json>;

/// A section of the file.
pub(super) trait Settings: Sized {
    fn read(section: &mut Section<'_>) -> Self;
    /// Its keys with the present values. [`read`](Self::read) reads the same settings from them.
    fn values(&self) -> KeyValues;
    /// Its keys, in the order of the declaration.
    fn describe() -> Vec<SettingKey>;
}

/// The kind of a setting: how it is read and described.
pub(super) trait SettingKind: Sized {
    type Value;

    /// Returns `None` if the file has no value, or an invalid one, which it reports.
    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Self::Value>;

    /// Adds its keys with this value, unless they are absent in the file.
    fn put(&self, name: &'static str, value: &Self::Value, keys: &mut KeyValues);

    /// Its keys in the file; most settings have one.
    fn describe(&self, name: &'static str, doc: &[&'static str], default: &Self::Value) -> Vec<SettingKey>;

    /// Sets the name of the key in the file, instead of the field's name.
    fn named(self, name: &'static str) -> Adjusted<Self> {
        Adjusted { name: Some(name), ..Adjusted::new(self) }
    }

    /// Sets the name of the key in the previous version, which is accepted with a warning.
    fn was(self, old_name: &'static str) -> Adjusted<Self> {
        Adjusted { old_name: Some(old_name), ..Adjusted::new(self) }
    }

    /// Sets what the default file shows instead of the default, as `#key = example`.
    fn example(self, example: impl Into<Json>) -> Adjusted<Self> {
        Adjusted { example: Some(example.into()), is_set: Some(false), ..Adjusted::new(self) }
    }

    /// Comments the key and everything below it out in the default file, as `#key = value`.
    fn commented(self) -> Adjusted<Self> {
        Adjusted { is_set: Some(false), ..Adjusted::new(self) }
    }

    /// As [`SettingKind::example`], but without `#`, because the default file would be invalid without it.
    fn shown(self, example: impl Into<Json>) -> Adjusted<Self> {
        Adjusted { example: Some(example.into()), is_set: Some(true), ..Adjusted::new(self) }
    }
}

/// The description of one key of a section.
#[derive(Debug, Clone)]
pub(super) struct SettingKey {
    pub(super) name: &'static str,
    pub(super) old_name: Option<&'static str>,
    /// Paragraphs.
    pub(super) doc: Vec<String>,
    pub(super) shape: Shape,
    /// Whether the default file sets it. Otherwise the file has it as `#key = value`.
    pub(super) is_set: bool,
    /// Whether a section without it is invalid.
    pub(super) required: bool,
}

#[derive(Debug, Clone)]
pub(super) enum Shape {
    Value {
        /// Completes "expected …".
        words: String,
        /// The named values, each with its meaning.
        choices: Vec<(&'static str, String)>,
        schema: Json,
        default: Option<Json>,
        example: Option<Json>,
    },
    /// `[name]`
    Section(Vec<SettingKey>),
    /// `[[name]]`
    Sections(Vec<SettingKey>),
}

impl SettingKey {
    pub(super) fn section(name: &'static str, doc: &[&'static str], keys: Vec<SettingKey>) -> Self {
        let shape = Shape::Section(keys);
        Self { name, old_name: None, doc: paragraphs(doc), shape, is_set: true, required: false }
    }

    /// Comments the key and everything below it out in the default file, as `#key = value`.
    pub(super) fn unset(mut self) -> Self {
        self.is_set = false;
        if let Shape::Section(keys) | Shape::Sections(keys) = &mut self.shape {
            *keys = std::mem::take(keys).into_iter().map(SettingKey::unset).collect();
        }
        self
    }
}

/// Joins the lines of a doc comment to paragraphs.
pub(super) fn paragraphs(doc: &[&'static str]) -> Vec<String> {
    let blocks = doc.split(|line| line.trim().is_empty()).filter(|block| !block.is_empty());
    blocks.map(|block| block.iter().map(|line| line.trim()).collect::<Vec<_>>().join(" ")).collect()
}

/// A kind with adjustments to its key.
pub(super) struct Adjusted<K> {
    kind: K,
    name: Option<&'static str>,
    old_name: Option<&'static str>,
    example: Option<Json>,
    is_set: Option<bool>,
}

impl<K> Adjusted<K> {
    fn new(kind: K) -> Self {
        Self { kind, name: None, old_name: None, example: None, is_set: None }
    }
}

impl<K: SettingKind> SettingKind for Adjusted<K> {
    type Value = K::Value;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<K::Value> {
        self.kind.read(section, self.name.unwrap_or(key))
    }

    fn put(&self, name: &'static str, value: &K::Value, keys: &mut KeyValues) {
        self.kind.put(self.name.unwrap_or(name), value, keys);
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], default: &K::Value) -> Vec<SettingKey> {
        let adjusted = |mut key: SettingKey| {
            key.old_name = self.old_name.or(key.old_name);
            if let (Shape::Value { example, .. }, Some(adjusted)) = (&mut key.shape, &self.example) {
                *example = Some(adjusted.clone());
            }
            match self.is_set {
                Some(true) => SettingKey { is_set: true, ..key },
                Some(false) => key.unset(),
                None => key,
            }
        };
        self.kind.describe(self.name.unwrap_or(name), doc, default).into_iter().map(adjusted).collect()
    }
}

/// Several keys of a section that together make one value.
pub(super) trait Group: Settings {
    type Value;
    /// Makes the value. Reports keys that contradict each other.
    fn resolve(self, section: &Section<'_>) -> Self::Value;
    /// The keys that make the value.
    fn of(value: &Self::Value) -> Self;
}

/// The kind of a [`Group`].
pub(super) struct Keys<G>(PhantomData<G>);

pub(super) fn keys<G: Group>() -> Keys<G> {
    Keys(PhantomData)
}

impl<G: Group> SettingKind for Keys<G> {
    type Value = G::Value;

    fn read(&self, section: &mut Section<'_>, _: &'static str) -> Option<G::Value> {
        Some(G::read(section).resolve(section))
    }

    fn put(&self, _: &'static str, value: &G::Value, keys: &mut KeyValues) {
        keys.extend(G::of(value).values());
    }

    fn describe(&self, _: &'static str, _: &[&'static str], _: &G::Value) -> Vec<SettingKey> {
        G::describe()
    }
}

/// A field that is not a key of its section and is read by a function.
pub(super) struct Elsewhere<T>(pub(super) fn(&Section<'_>) -> Option<T>);

impl<T> SettingKind for Elsewhere<T> {
    type Value = T;

    fn read(&self, section: &mut Section<'_>, _: &'static str) -> Option<T> {
        (self.0)(section)
    }

    fn put(&self, _: &'static str, _: &T, _: &mut KeyValues) {}

    fn describe(&self, _: &'static str, _: &[&'static str], _: &T) -> Vec<SettingKey> {
        Vec::new()
    }
}

/// `[key]`, which has its defaults if it is absent.
pub(super) struct Nested<S>(PhantomData<S>);

pub(super) fn section<S: Settings>() -> Nested<S> {
    Nested(PhantomData)
}

impl<S: Settings> SettingKind for Nested<S> {
    type Value = S;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<S> {
        Some(section.section(key, S::read))
    }

    fn put(&self, name: &'static str, value: &S, keys: &mut KeyValues) {
        keys.insert(name.to_owned(), value.values().into());
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &S) -> Vec<SettingKey> {
        vec![SettingKey::section(name, doc, S::describe())]
    }
}

/// `[key]`, which is `None` if it is absent.
pub(super) struct OptionalSection<S>(PhantomData<S>);

pub(super) fn optional_section<S: Settings>() -> OptionalSection<S> {
    OptionalSection(PhantomData)
}

impl<S: Settings> SettingKind for OptionalSection<S> {
    type Value = Option<S>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Option<S>> {
        Some(section.optional_section(key, S::read))
    }

    fn put(&self, name: &'static str, value: &Option<S>, keys: &mut KeyValues) {
        keys.extend(value.iter().map(|value| (name.to_owned(), value.values().into())));
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &Option<S>) -> Vec<SettingKey> {
        vec![SettingKey::section(name, doc, S::describe()).unset()]
    }
}

/// `[[key]]`, in file order.
pub(super) struct Repeated<S>(PhantomData<S>);

pub(super) fn sections<S: Settings>() -> Repeated<S> {
    Repeated(PhantomData)
}

impl<S: Settings> SettingKind for Repeated<S> {
    type Value = Vec<S>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Vec<S>> {
        Some(section.sections(key, S::read))
    }

    fn put(&self, name: &'static str, value: &Vec<S>, keys: &mut KeyValues) {
        put_tables(name, value, keys);
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &Vec<S>) -> Vec<SettingKey> {
        vec![SettingKey { shape: Shape::Sections(S::describe()), ..SettingKey::section(name, doc, Vec::new()) }]
    }
}

/// An array of inline tables, in file order.
pub(super) struct Tables<S> {
    words: &'static str,
    section: PhantomData<S>,
}

/// `words` describe the array in the error about any other value.
pub(super) fn tables<S: Settings>(words: &'static str) -> Tables<S> {
    Tables { words, section: PhantomData }
}

impl<S: Settings> SettingKind for Tables<S> {
    type Value = Vec<S>;

    fn read(&self, section: &mut Section<'_>, key: &'static str) -> Option<Vec<S>> {
        Some(section.tables(key, self.words, S::read))
    }

    fn put(&self, name: &'static str, value: &Vec<S>, keys: &mut KeyValues) {
        put_tables(name, value, keys);
    }

    fn describe(&self, name: &'static str, doc: &[&'static str], _: &Vec<S>) -> Vec<SettingKey> {
        let schema = json!({ "type": "array", "items": super::schema::object(&S::describe()) });
        let shape =
            Shape::Value { words: self.words.to_owned(), choices: Vec::new(), schema, default: None, example: None };
        vec![SettingKey { name, old_name: None, doc: paragraphs(doc), shape, is_set: false, required: false }]
    }
}

fn put_tables<S: Settings>(name: &'static str, tables: &[S], keys: &mut KeyValues) {
    if !tables.is_empty() {
        keys.insert(name.to_owned(), tables.iter().map(|table| Json::from(table.values())).collect());
    }
}

/// Declares a section. Each field is a key with the same name.
macro_rules! settings {
    (
        $(#[doc = $doc:literal])*
        $(#[derive($($derive:ident),*)])?
        $vis:vis struct $name:ident {
            $(
                $(#[doc = $field_doc:literal])*
                $field_vis:vis $field:ident: $type:ty = $default:expr => $kind:expr,
            )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone, PartialEq, Eq $(, $($derive),*)?)]
        $vis struct $name {
            $($(#[doc = $field_doc])* $field_vis $field: $type,)*
        }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }

        impl $crate::config::settings::Settings for $name {
            fn read(section: &mut $crate::config::document::Section<'_>) -> Self {
                use $crate::config::settings::SettingKind as _;
                let default = Self::default();
                Self { $($field: $kind.read(section, stringify!($field)).unwrap_or(default.$field),)* }
            }

            fn values(&self) -> $crate::config::settings::KeyValues {
                use $crate::config::settings::SettingKind as _;
                let mut keys = $crate::config::settings::KeyValues::new();
                $($kind.put(stringify!($field), &self.$field, &mut keys);)*
                keys
            }

            fn describe() -> Vec<$crate::config::settings::SettingKey> {
                use $crate::config::settings::SettingKind as _;
                let default = Self::default();
                let mut keys = Vec::new();
                $(keys.extend($kind.describe(stringify!($field), &[$($field_doc),*], &default.$field));)*
                keys
            }
        }
    };
}

/// Declares an enum whose variants have a name in the file and documentation.
macro_rules! choice {
    (
        $(#[doc = $doc:literal])*
        $(#[derive($($derive:path),*)])?
        $vis:vis enum $name:ident {
            $(
                $(#[doc = $variant_doc:literal])*
                $variant:ident = $text:literal,
            )*
        }
    ) => {
        $(#[doc = $doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq $(, $($derive),*)?)]
        $vis enum $name {
            $($(#[doc = $variant_doc])* $variant,)*
        }

        impl $crate::config::value::Choice for $name {
            const ALL: &'static [(&'static str, Self, &'static [&'static str])] =
                &[$(($text, Self::$variant, &[$($variant_doc),*])),*];
        }
    };
}

pub(super) use choice;
pub(super) use settings;
