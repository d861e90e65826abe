//! `timeouts` of a pool or a route: what they set goes before `[timeouts]`.

use super::{TimeoutOverrides, document::Section, value};

pub(super) fn overrides(section: &mut Section<'_>) -> TimeoutOverrides {
    TimeoutOverrides {
        body: section.read("body", value::duration_or_off),
        first_byte: section.read("first_byte", value::duration_or_off),
        idle: section.read("idle", value::duration_or_off),
        request: section.read("request", value::duration_or_off),
    }
}
