//! `[process]`: who the agent is.

use super::{
    settings::settings,
    value::{Value, integer},
};

settings! {
    /// Who an agent is that was started as root.
    pub struct Process {
        /// Started as root (uid 0), the agent becomes this user and group once it has read this file, and keeps of root only the
        /// capabilities that docs/capabilities.md names. What it reads later has to be readable for them: this file at a reload,
        /// keys, certificates, files of endpoints. `keep`: it stays root.
        // `nobody` and its group, as most distributions number them.
        pub user: Option<User> = Some(User { uid: 65_534, gid: 65_534 }) => user_or_keep(),
        /// Supplementary groups that it has then, by number.
        pub groups: Vec<u32> = Vec::new() => integer(0..=u32::MAX - 1).list("an array of numbers"),
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct User {
    pub uid: u32,
    pub gid: u32,
}

/// `uid:gid`, or `keep`.
fn user_or_keep() -> Value<Option<User>> {
    let words = r#""keep", or the numbers of a user and a group that are not root's, such as "65534:65534""#;
    let parse = |text: &str| {
        if text == "keep" {
            return Some(None);
        }
        let id = |text: &str| text.parse().ok().filter(|id| (1..u32::MAX).contains(id));
        text.split_once(':').and_then(|(uid, gid)| Some(Some(User { uid: id(uid)?, gid: id(gid)? })))
    };
    Value::text(words, parse, |user| match user {
        Some(User { uid, gid }) => format!("{uid}:{gid}"),
        None => "keep".to_owned(),
    })
}
