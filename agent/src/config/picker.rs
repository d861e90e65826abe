//! `[pools.picker]`: the built-in picker, or an EPP with settings of its own.

use http::HeaderName;

use super::{
    document::Section,
    epp::Epp,
    settings::{Key, Kind as _, Settings, choice, settings},
    value::{self, OneOrMore},
};

/// What chooses the endpoint of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "there is one for each pool")]
pub enum Picker {
    /// Least in-flight with session and prefix affinity, in this process.
    Builtin,
    Epp(Epp),
}

settings! {
    /// What both pickers have.
    struct PickerKeys {
        /// Which picker the pool has.
        kind: PickerKind = PickerKind::Builtin => value::choice(),
        /// Where the built-in picker chooses (also for a pool that fails open): requests with the same value of this header go to the
        /// same endpoint, unless it is much busier than the idlest. Or an array of names: the first that a request has counts.
        session_header: Vec<HeaderName> = Vec::new() => session_header().example("x-session-id"),
    }
}

choice! {
    /// The values of `kind`.
    enum PickerKind {
        /// Least in-flight with session and prefix affinity, in this process.
        Builtin = "builtin",
        /// An Endpoint Picker, with the settings below.
        Epp = "epp",
    }
}

fn session_header() -> OneOrMore<HeaderName> {
    value::header_name().one_or_more()
}

/// Those of a pool.
pub(super) fn session_headers(pool: &Section<'_>) -> Option<Vec<HeaderName>> {
    session_header().read(&mut pool.at("picker"), "session_header")
}

impl Settings for Picker {
    fn read(section: &mut Section<'_>) -> Self {
        let PickerKeys { kind, session_header: _ } = PickerKeys::read(section);
        let of_epp: Vec<&'static str> = Epp::describe().into_iter().map(|key| key.name).collect();
        let given: Vec<&'static str> = of_epp.iter().copied().filter(|key| section.has(key)).collect();
        // A wrong `kind` beside settings of an EPP was meant to be one.
        let is_wrong = section.has("kind") && value::choice::<PickerKind>().read(section, "kind").is_none();
        if kind == PickerKind::Epp || is_wrong && !given.is_empty() {
            return Self::Epp(Epp::read(section));
        }
        section.knows(of_epp);
        for key in given {
            section.reject(key, "a setting of an EPP", r#"kind = "epp" beside it"#);
        }
        Self::Builtin
    }

    fn describe() -> Vec<Key> {
        PickerKeys::describe().into_iter().chain(Epp::describe().into_iter().map(Key::unset)).collect()
    }
}

impl Picker {
    pub(super) fn check(&self, section: &Section<'_>) {
        if let Self::Epp(epp) = self {
            epp.check(section);
        }
    }
}
