//! `[process]`: the user that the agent runs as.

use super::{
    settings::settings,
    value::{Value, integer},
};

settings! {
    /// The user that the agent runs as if it is started as root.
    pub struct Process {
        /// User and group (`uid:gid`) that an agent started as root (uid 0) switches to after reading this file. It keeps only the
        /// capabilities listed in docs/capabilities.md. The user must be able to read whatever is reloaded: this file, keys,
        /// certificates, files of endpoints, the kubeconfig. `penstock config check`, started as root, names those that this
        /// user cannot read. `"keep"`: the agent stays root.
        // `nobody` and its group in most distributions.
        pub user: Option<User> = Some(User { uid: 65_534, gid: 65_534 }) => user_or_keep(),
        /// Numbers of the supplementary groups of that user.
        pub groups: Vec<u32> = Vec::new() => integer(0..=u32::MAX - 1).list("an array of numbers"),
    }
}

/// The user and group that the agent switches to. Neither is root.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    /// Number of the user, not 0.
    pub uid: u32,
    /// Number of the primary group, not 0.
    pub gid: u32,
}

const USER_OR_KEEP: &str = r#""keep", or the uid and gid of a user and a group other than root, such as "65534:65534""#;

fn user_or_keep() -> Value<Option<User>> {
    Value::text(
        USER_OR_KEEP,
        |text| parse_user(text).ok(),
        |user| match user {
            Some(User { uid, gid }) => format!("{uid}:{gid}"),
            None => "keep".to_owned(),
        },
    )
}

/// Parses `uid:gid` or `keep`. The error says what was expected.
pub fn parse_user(text: &str) -> Result<Option<User>, &'static str> {
    if text == "keep" {
        return Ok(None);
    }
    let id = |text: &str| text.parse().ok().filter(|id| (1..u32::MAX).contains(id));
    let user = text.split_once(':').and_then(|(uid, gid)| Some(User { uid: id(uid)?, gid: id(gid)? }));
    user.map(Some).ok_or(USER_OR_KEEP)
}
