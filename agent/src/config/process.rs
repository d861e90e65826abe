//! `[process]`: who the agent is.

use toml::de::DeValue;

use super::{
    Process, User,
    document::Section,
    value::{self, Expected, Parsed},
};

pub(super) fn process(section: &mut Section<'_>) -> Process {
    let default = Process::default();
    let given = section.has("groups");
    let groups = section.list("groups", "an array of numbers", value::integer(0..=u32::MAX - 1));
    Process {
        user: section.read("user", user_or_keep).unwrap_or(default.user),
        groups: if given { groups } else { default.groups },
    }
}

/// `uid:gid`, or `keep`.
fn user_or_keep(value: &DeValue<'_>) -> Parsed<Option<User>> {
    let text = if let DeValue::String(text) = value { text.as_ref() } else { "" };
    if text == "keep" {
        return Ok(None);
    }
    let id = |text: &str| text.parse().ok().filter(|id| (1..u32::MAX).contains(id));
    let user = text.split_once(':').and_then(|(uid, gid)| Some(User { uid: id(uid)?, gid: id(gid)? }));
    user.map(Some).ok_or(Expected(
        r#""keep", or the numbers of a user and a group that are not root's, such as "65534:65534""#.into(),
    ))
}
