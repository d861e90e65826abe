//! `[pools.picker]`: the built-in picker, or an EPP and its settings.

use http::HeaderName;

use super::{
    document::Section,
    epp::Epp,
    settings::{KeyValues, SettingKey, SettingKind as _, Settings, choice, settings},
    value::{self, OneOrMore},
};

/// How the endpoint of a request is chosen.
#[derive(Debug, Clone, PartialEq, Eq)]
#[expect(clippy::large_enum_variant, reason = "there is one for each pool")]
pub enum Picker {
    /// The built-in picker: least requests in flight, with session and prefix affinity.
    Builtin,
    /// An EPP, over ext_proc.
    Epp(Epp),
}

settings! {
    /// The keys of both pickers.
    struct PickerKeys {
        /// Which picker the pool uses.
        kind: PickerKind = PickerKind::Builtin => value::choice(),
        /// Header whose value keeps a session at one endpoint, or an array of names of which the first one in the request counts.
        /// The built-in picker (also if it chooses because a pool fails open) sends requests with the same value to the same
        /// endpoint, unless that has many more requests in flight than the least busy one.
        session_header: Vec<HeaderName> = Vec::new() => session_header().example("x-session-id"),
    }
}

choice! {
    /// The values of `kind`.
    enum PickerKind {
        /// The built-in picker: least requests in flight, with session and prefix affinity.
        Builtin = "builtin",
        /// An Endpoint Picker (EPP), configured by the settings below.
        Epp = "epp",
    }
}

fn session_header() -> OneOrMore<HeaderName> {
    value::header_name().one_or_more()
}

/// Adds the session headers of a pool to the keys of its picker.
pub(super) fn put_session_headers(headers: &[HeaderName], picker: &mut KeyValues) {
    session_header().put("session_header", &headers.to_vec(), picker);
}

/// The session headers of a pool.
pub(super) fn session_headers(pool: &Section<'_>) -> Option<Vec<HeaderName>> {
    session_header().read(&mut pool.at("picker"), "session_header")
}

impl Settings for Picker {
    fn read(section: &mut Section<'_>) -> Self {
        let PickerKeys { kind, session_header: _ } = PickerKeys::read(section);
        let of_epp: Vec<&'static str> = Epp::describe().into_iter().map(|key| key.name).collect();
        let given: Vec<&'static str> = of_epp.iter().copied().filter(|key| section.has(key)).collect();
        // An invalid `kind` with settings of an EPP was probably meant to be "epp".
        let is_wrong = section.has("kind") && value::choice::<PickerKind>().read(section, "kind").is_none();
        if kind == PickerKind::Epp || is_wrong && !given.is_empty() {
            return Self::Epp(Epp::read(section));
        }
        section.knows(of_epp);
        for key in given {
            section.reject(key, "a setting of an EPP", r#"kind = "epp""#);
        }
        Self::Builtin
    }

    fn values(&self) -> KeyValues {
        let (kind, of_epp) = match self {
            Self::Builtin => (PickerKind::Builtin, KeyValues::new()),
            Self::Epp(epp) => (PickerKind::Epp, epp.values()),
        };
        // `session_header` is the pool's.
        PickerKeys { kind, session_header: Vec::new() }.values().into_iter().chain(of_epp).collect()
    }

    fn describe() -> Vec<SettingKey> {
        PickerKeys::describe().into_iter().chain(Epp::describe().into_iter().map(SettingKey::unset)).collect()
    }
}

impl Picker {
    /// `is_discovered` tells that the pool is an InferencePool, which names the EPP.
    pub(super) fn check(&self, section: &Section<'_>, is_discovered: bool) {
        if let Self::Epp(epp) = self {
            epp.check(section, is_discovered);
        }
    }
}
