//! Reads a TOML text as a tree with positions, and collects the errors.
//!
//! Reading never stops at an error: the reader gets the default and continues, so that one run reports everything. A key has at
//! most one error, so a check that runs on such a default adds no misleading second one. A section learns its keys by being asked
//! for them; a key that nothing asked for is unknown and an error.

mod renames;

use std::{cell::RefCell, collections::BTreeMap, fmt::Display, ops::Range};

use toml::{
    Spanned,
    de::{DeArray, DeString, DeTable, DeValue},
};

use super::{
    error::{ConfigError, ConfigErrors, ConfigWarning, Position},
    settings::SettingKey,
    value::{self, Parsed},
};

/// The least similarity, from 0 to 1, at which an unknown key is taken for a misspelt known one. clap uses the same.
const ALIKE: f64 = 0.7;

/// Reads `text` with `read`, which gets the root section. `keys` are the known keys, with their old names. Returns all errors in
/// file order.
pub(super) fn read<T>(
    text: &str,
    file: &str,
    keys: &[SettingKey],
    read: impl FnOnce(&mut Section<'_>) -> T,
) -> Result<(T, Vec<ConfigWarning>), ConfigErrors> {
    let place = DocumentContext { text, file, errors: RefCell::default() };
    let (mut tree, syntax) = DeTable::parse_recoverable(text);
    for error in syntax {
        let position = place.position(error.span().map_or(0, |span| span.start));
        let message = error.message().replace('\n', ", ");
        place.errors.borrow_mut().push(ConfigError::Syntax { file: file.to_owned(), position, message });
    }
    ConfigErrors::check(place.errors.take())?;

    let mut warnings = Vec::new();
    renames::apply(&place, tree.get_mut(), "", keys, &mut warnings);
    let mut root = Section::new(&place, String::new(), 0, Some(tree.get_ref()));
    let value = read(&mut root);
    root.finish();
    ConfigErrors::check(place.errors.take())?;
    warnings.sort_by_key(|warning| warning.position);
    Ok((value, warnings))
}

struct DocumentContext<'d> {
    text: &'d str,
    file: &'d str,
    errors: RefCell<Vec<ConfigError>>,
}

impl DocumentContext<'_> {
    fn position(&self, offset: usize) -> Position {
        let before = self.text.char_indices().take_while(|(at, _)| *at < offset);
        before.fold(Position { line: 1, column: 1 }, |position, (_, character)| match character {
            '\n' => Position { line: position.line + 1, column: 1 },
            _ => Position { column: position.column + 1, ..position },
        })
    }

    fn report(&self, offset: usize, key: String, found: String, expected: String) {
        let mut errors = self.errors.borrow_mut();
        if !errors.iter().any(|error| matches!(error, ConfigError::Value { key: known, .. } if *known == key)) {
            let position = self.position(offset);
            errors.push(ConfigError::Value { file: self.file.to_owned(), position, key, found, expected });
        }
    }
}

/// One table of the file, or an absent table, in which every key has its default.
pub(super) struct Section<'d> {
    place: &'d DocumentContext<'d>,
    path: String,
    /// Byte offset of its first line, for errors about missing keys.
    start: usize,
    table: Option<&'d DeTable<'d>>,
    known: Vec<&'static str>,
}

impl<'d> Section<'d> {
    fn new(place: &'d DocumentContext<'d>, path: String, start: usize, table: Option<&'d DeTable<'d>>) -> Self {
        Self { place, path, start, table, known: Vec::new() }
    }

    /// The value of `key`, or `None` if the key is absent or its value is wrong.
    pub(super) fn read<T>(&mut self, key: &'static str, parse: impl FnOnce(&DeValue<'_>) -> Parsed<T>) -> Option<T> {
        let value = self.get(key)?;
        self.parse(value, self.path_of(key), parse)
    }

    /// As [`Section::read`], but absence is an error.
    pub(super) fn require<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl FnOnce(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        if !self.has(key) {
            self.reject(key, "nothing", expected);
        }
        self.read(key, parse)
    }

    /// Reads the elements of an array. An absent array is empty; invalid elements are reported and left out.
    pub(super) fn list<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> Vec<T> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let DeValue::Array(elements) = value.get_ref() else {
            self.reject(key, value::shown(value.get_ref()), expected);
            return Vec::new();
        };
        self.elements(key, elements, parse)
    }

    /// Reads one value or a non-empty array. An absent key is empty; invalid elements are reported and left out.
    pub(super) fn one_or_more<T>(&mut self, key: &'static str, parse: impl Fn(&DeValue<'_>) -> Parsed<T>) -> Vec<T> {
        let Some(value) = self.get(key) else { return Vec::new() };
        match value.get_ref() {
            DeValue::Array(elements) if elements.is_empty() => {
                self.reject(key, "an empty array", "at least one value");
                Vec::new()
            }
            DeValue::Array(elements) => self.elements(key, elements, parse),
            _ => self.parse(value, self.path_of(key), parse).into_iter().collect(),
        }
    }

    /// Reads a table whose keys the author chooses. An absent table is empty; invalid entries are reported and left out.
    pub(super) fn entries<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        parse: impl Fn(&DeValue<'_>) -> Parsed<T>,
    ) -> BTreeMap<String, T> {
        let Some(value) = self.get(key) else { return BTreeMap::new() };
        let DeValue::Table(table) = value.get_ref() else {
            self.reject(key, value::shown(value.get_ref()), expected);
            return BTreeMap::new();
        };
        let path = self.path_of(key);
        let entry = |(name, value): (&Spanned<DeString<'_>>, _)| {
            let name = name.get_ref().to_string();
            self.parse(value, format!("{path}.{name}"), &parse).map(|value| (name, value))
        };
        table.iter().filter_map(entry).collect()
    }

    /// Reads the table under `key` with `read`.
    pub(super) fn section<T>(&mut self, key: &'static str, read: impl FnOnce(&mut Section<'d>) -> T) -> T {
        if let Some(value) = self.get(key).map(Spanned::get_ref).filter(|value| !value.is_table()) {
            self.reject(key, value::shown(value), "a section");
        }
        let mut section = self.at(key);
        let value = read(&mut section);
        section.finish();
        value
    }

    /// As [`Section::section`] if the file has `key`, otherwise `None`.
    pub(super) fn optional_section<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&mut Section<'d>) -> T,
    ) -> Option<T> {
        self.knows([key]);
        self.has(key).then(|| self.section(key, read))
    }

    /// Returns this section unread, for checks after everything has been read.
    pub(super) fn view(&self) -> Section<'d> {
        Section::new(self.place, self.path.clone(), self.start, self.table)
    }

    /// Returns the section under `key` unread, for checks after everything has been read.
    pub(super) fn at(&self, key: &str) -> Section<'d> {
        let value = self.table.and_then(|table| table.get(key));
        let table = value.and_then(|value| value.get_ref().as_table());
        let start = value.map_or(self.start, |value| value.span().start);
        Section::new(self.place, self.path_of(key), start, table)
    }

    /// Returns the `[[key]]` sections unread, for checks after everything has been read.
    pub(super) fn each(&self, key: &str) -> Vec<Section<'d>> {
        let elements = self.table.and_then(|table| table.get(key)).and_then(|value| value.get_ref().as_array());
        let path = self.path_of(key);
        let section = |(index, element): (usize, &'d Spanned<DeValue<'d>>)| {
            let table = element.get_ref().as_table()?;
            Some(Section::new(self.place, format!("{path}[{index}]"), element.span().start, Some(table)))
        };
        elements.into_iter().flat_map(|elements| elements.iter().enumerate()).filter_map(section).collect()
    }

    /// Adds to the keys that the section may have.
    pub(super) fn knows(&mut self, keys: impl IntoIterator<Item = &'static str>) {
        for key in keys {
            if !self.known.contains(&key) {
                self.known.push(key);
            }
        }
    }

    /// Reads each `[[key]]` section with `read`, in file order.
    pub(super) fn sections<T>(&mut self, key: &'static str, read: impl FnMut(&mut Section<'d>) -> T) -> Vec<T> {
        self.tables(key, &format!("[[{key}]] sections"), read)
    }

    /// Reads each table of an array with `read`, in file order. An absent array is empty.
    pub(super) fn tables<T>(
        &mut self,
        key: &'static str,
        expected: &str,
        mut read: impl FnMut(&mut Section<'d>) -> T,
    ) -> Vec<T> {
        let Some(value) = self.get(key) else { return Vec::new() };
        let DeValue::Array(elements) = value.get_ref() else {
            self.reject(key, value::shown(value.get_ref()), expected);
            return Vec::new();
        };
        let mut items = Vec::with_capacity(elements.len());
        for (index, element) in elements.iter().enumerate() {
            let path = format!("{}[{index}]", self.path_of(key));
            match element.get_ref() {
                DeValue::Table(table) => items.push(self.child(path, element.span().start, Some(table), &mut read)),
                other => self.reject(key, value::shown(other), expected),
            }
        }
        items
    }

    /// Returns whether the file sets `key`.
    pub(super) fn has(&self, key: &str) -> bool {
        self.table.is_some_and(|table| table.contains_key(key))
    }

    pub(super) fn is_empty_array(&self, key: &str) -> bool {
        let array = self.table.and_then(|table| table.get(key)).and_then(|value| value.get_ref().as_array());
        array.is_some_and(|array| array.is_empty())
    }

    /// Whether the value of `key` is an array.
    pub(super) fn has_array(&self, key: &str) -> bool {
        self.table.and_then(|table| table.get(key)).is_some_and(|value| value.get_ref().is_array())
    }

    /// Reports an error about `key`, which may be absent or an element such as `endpoints[1]`.
    pub(super) fn reject(&self, key: &str, found: impl Display, expected: impl Display) {
        let span = self.span_of(key);
        self.place.report(span.start, self.path_of(key), found.to_string(), expected.to_string());
    }

    /// The folder of the file, against which relative paths are resolved.
    pub(super) fn folder(&self) -> &'d std::path::Path {
        std::path::Path::new(self.place.file).parent().unwrap_or(std::path::Path::new(""))
    }

    fn child<T>(
        &self,
        path: String,
        start: usize,
        table: Option<&'d DeTable<'d>>,
        read: impl FnOnce(&mut Section<'d>) -> T,
    ) -> T {
        let mut section = Section::new(self.place, path, start, table);
        let value = read(&mut section);
        section.finish();
        value
    }

    fn parse<T>(
        &self,
        value: &Spanned<DeValue<'_>>,
        path: String,
        parse: impl FnOnce(&DeValue<'_>) -> Parsed<T>,
    ) -> Option<T> {
        let parsed = parse(value.get_ref());
        parsed
            .map_err(|expected| {
                self.place.report(value.span().start, path, value::shown(value.get_ref()), expected.0.into_owned());
            })
            .ok()
    }

    fn elements<T>(&self, key: &str, elements: &DeArray<'_>, parse: impl Fn(&DeValue<'_>) -> Parsed<T>) -> Vec<T> {
        let path = self.path_of(key);
        let parsed =
            elements.iter().enumerate().map(|(i, element)| self.parse(element, format!("{path}[{i}]"), &parse));
        parsed.flatten().collect()
    }

    fn get(&mut self, key: &'static str) -> Option<&'d Spanned<DeValue<'d>>> {
        self.knows([key]);
        self.table?.get(key)
    }

    fn path_of(&self, key: &str) -> String {
        join(&self.path, key)
    }

    fn span_of(&self, key: &str) -> Range<usize> {
        let (name, index) = match key.strip_suffix(']').and_then(|key| key.split_once('[')) {
            Some((name, index)) => (name, index.parse::<usize>().ok()),
            None => (key, None),
        };
        let Some((name, value)) = self.table.and_then(|table| table.get_key_value(name)) else {
            return self.start..self.start;
        };
        match (value.get_ref(), index) {
            (DeValue::Array(elements), Some(index)) => elements.get(index).map_or(name.span(), Spanned::span),
            _ => name.span(),
        }
    }

    fn finish(self) {
        for key in self.table.into_iter().flat_map(|table| table.keys()) {
            let name: &str = key.get_ref();
            if !self.known.contains(&name) {
                let found = match nearest(name, &self.known) {
                    Some(nearest) => format!("an unknown key (did you mean {nearest}?)"),
                    None => "an unknown key".to_owned(),
                };
                let expected = format!("one of {}", self.known.join(", "));
                self.place.report(key.span().start, self.path_of(name), found, expected);
            }
        }
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

/// Returns the name in `known` that is most similar to `name`, if one is similar enough.
fn nearest(name: &str, known: &[&'static str]) -> Option<&'static str> {
    let alike = known.iter().map(|known| (strsim::jaro(name, known), *known)).filter(|(alike, _)| *alike > ALIKE);
    alike.max_by(|(one, _), (other, _)| one.total_cmp(other)).map(|(_, known)| known)
}
