//! Accepts settings under the names of the previous version.
//!
//! Changes the tree before it is read: every old name becomes the new one, with a warning. The reader and the checks see only new
//! names.

use toml::{
    Spanned,
    de::{DeTable, DeValue},
};

use super::{DocumentContext, join};
use crate::config::{
    error::ConfigWarning,
    settings::{SettingKey, Shape},
};

/// Renames the old keys in `table`, which is the section `path` with these keys, and in its sub-sections.
pub(super) fn apply(
    place: &DocumentContext<'_>,
    table: &mut DeTable<'_>,
    path: &str,
    keys: &[SettingKey],
    warnings: &mut Vec<ConfigWarning>,
) {
    for key in keys {
        let below = join(path, key.name);
        if let Some((old_name, value)) = key.old_name.and_then(|old_name| table.remove_entry(old_name)) {
            let span = old_name.span();
            let old_key = join(path, old_name.get_ref());
            if table.contains_key(key.name) {
                place.report(span.start, old_key, format!("both {below} and this old name"), format!("{below} alone"));
            } else {
                let (file, position) = (place.file.to_owned(), place.position(span.start));
                warnings.push(ConfigWarning { file, position, old_key, key: below.clone() });
                table.insert(Spanned::new(span, key.name.into()), value);
            }
        }
        match (&key.shape, table.get_mut(key.name).map(Spanned::get_mut)) {
            (Shape::Section(keys), Some(DeValue::Table(table))) => apply(place, table, &below, keys, warnings),
            (Shape::Sections(keys), Some(DeValue::Array(elements))) => {
                for (index, element) in elements.iter_mut().enumerate() {
                    if let DeValue::Table(table) = element.get_mut() {
                        apply(place, table, &format!("{below}[{index}]"), keys, warnings);
                    }
                }
            }
            _ => {}
        }
    }
}
