//! `[process]`: the user that the agent runs as.

use std::{os::unix::ffi::OsStrExt as _, path::PathBuf, time::Duration};

use super::{
    document::Section,
    settings::settings,
    value::{self, Value, duration_or_off, integer},
};

settings! {
    /// The user that the agent runs as if it is started as root, and how the next agent takes over.
    pub struct Process {
        /// User and group (`uid:gid`) that an agent started as root (uid 0) switches to after reading this file. It keeps only the
        /// capabilities listed in docs/capabilities.md. The user must be able to read whatever is reloaded: this file, keys,
        /// certificates, files of endpoints, the kubeconfig. `penstock config check`, started as root, names those that this
        /// user cannot read. `"keep"`: the agent stays root.
        // `nobody` and its group in most distributions.
        pub user: Option<User> = Some(User { uid: 65_534, gid: 65_534 }) => user_or_keep(),
        /// Numbers of the supplementary groups of that user.
        pub groups: Vec<u32> = Vec::new() => integer(0..=u32::MAX - 1).list("an array of numbers"),
        /// Unix socket at which the agent hands its listening sockets to the next agent of the same user. An agent that starts while
        /// another one answers there takes over: it begins to accept when it is ready, and the other one finishes its responses and
        /// exits. The folder must exist, and the agent's user must be able to write into it. At most 90 bytes. Unset: no agent takes
        /// over. A relative path is resolved against the folder of this file. See
        /// docs/upgrade.md. `--upgrade-socket` and `PENSTOCK_UPGRADE_SOCKET` override it.
        pub upgrade_socket: Option<PathBuf> = None => value::file().example("/run/penstock/upgrade.sock"),
        /// How long the responses of an agent may take after another one has taken over, beyond `timeouts.lame_duck`.
        pub upgrade_drain: Option<Duration> = Some(Duration::from_secs(3600)) => duration_or_off(),
    }
}

/// Maximum length of `upgrade_socket`. The kernel takes 107 bytes, and the socket is bound with the process's number first.
const SOCKET_BYTES: usize = 90;

impl Process {
    pub(super) fn check(&self, section: &Section<'_>) {
        let long = self.upgrade_socket.as_ref().filter(|path| path.as_os_str().as_bytes().len() > SOCKET_BYTES);
        if let Some(path) = long {
            section.reject("upgrade_socket", path.display(), format_args!("a path of at most {SOCKET_BYTES} bytes"));
        }
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
