//! The messages of a takeover: lines of at most [`LINE`] bytes, of words separated by single blanks.
//!
//! ```text
//! new: penstock-takeover VERSION PROGRAM
//! old: sockets COUNT PROGRAM              or: refused REASON
//! old: socket ROLE own|held ADDRESS       COUNT times, each with a descriptor
//! new: ready ROLE[,ROLE...]               or: ready -
//! old: done
//! ```
//!
//! VERSION is [`VERSION`], PROGRAM the version of the agent. The first line and `refused` never change, so that agents of any two
//! versions can refuse each other.

use std::{fmt, net::SocketAddr};

use super::Role;

/// Version of everything after the first line.
pub const VERSION: u32 = 1;
/// Maximum length of a line, without its line feed.
pub const LINE: usize = 512;
/// Maximum number of sockets.
pub const SOCKETS: usize = 4096;

const MAGIC: &str = "penstock-takeover";

/// A line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TakeoverLine {
    Hello { version: u32, program: String },
    Sockets { count: usize, program: String },
    Refused(String),
    Socket { role: Role, held: bool, address: SocketAddr },
    Ready(Vec<Role>),
    Done,
}

#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    #[error("a line of more than {LINE} bytes")]
    Long,
    #[error("an unknown message, {0:?}")]
    Unknown(String),
    #[error("the end of the connection")]
    End,
}

impl fmt::Display for TakeoverLine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Hello { version, program } => write!(f, "{MAGIC} {version} {program}"),
            Self::Sockets { count, program } => write!(f, "sockets {count} {program}"),
            Self::Refused(reason) => write!(f, "refused {reason}"),
            Self::Socket { role, held, address } => {
                write!(f, "socket {role} {} {address}", if *held { "held" } else { "own" })
            }
            Self::Ready(roles) if roles.is_empty() => f.write_str("ready -"),
            Self::Ready(roles) => {
                let names: Vec<&str> = roles.iter().map(|role| role.name()).collect();
                write!(f, "ready {}", names.join(","))
            }
            Self::Done => f.write_str("done"),
        }
    }
}

impl TakeoverLine {
    /// The line with its line feed. Text that would not fit is cut.
    pub fn encode(&self) -> Vec<u8> {
        let mut line = self.to_string().replace(['\n', '\r'], " ");
        line.truncate(line.floor_char_boundary(LINE));
        line.push('\n');
        line.into_bytes()
    }

    fn parse(line: &str) -> Option<Self> {
        let (verb, rest) = line.split_once(' ').unwrap_or((line, ""));
        let mut words = rest.split(' ');
        let mut word = || words.next().filter(|word| !word.is_empty());
        let message = match verb {
            MAGIC => Self::Hello { version: word()?.parse().ok()?, program: word()?.to_owned() },
            "sockets" => {
                let count = word()?.parse().ok().filter(|count| *count <= SOCKETS)?;
                Self::Sockets { count, program: word()?.to_owned() }
            }
            "refused" => return Some(Self::Refused(rest.to_owned())),
            "socket" => {
                let role = Role::named(word()?)?;
                let held = match word()? {
                    "held" => true,
                    "own" => false,
                    _ => return None,
                };
                Self::Socket { role, held, address: word()?.parse().ok()? }
            }
            "ready" => match word()? {
                "-" => Self::Ready(Vec::new()),
                names => Self::Ready(names.split(',').map(Role::named).collect::<Option<_>>()?),
            },
            "done" if rest.is_empty() => return Some(Self::Done),
            _ => return None,
        };
        words.next().is_none().then_some(message)
    }
}

/// Collects received bytes and takes lines from them. Holds at most [`LINE`] bytes and one more read.
#[derive(Debug, Default)]
pub struct ReceivedLines(Vec<u8>);

impl ReceivedLines {
    pub fn push(&mut self, bytes: &[u8]) {
        self.0.extend_from_slice(bytes);
    }

    /// The next message; `None` if its line is incomplete.
    pub fn next(&mut self) -> Result<Option<TakeoverLine>, Malformed> {
        let end = self.0.iter().take(LINE + 1).position(|&byte| byte == b'\n');
        let Some(end) = end else { return if self.0.len() > LINE { Err(Malformed::Long) } else { Ok(None) } };
        let line = String::from_utf8_lossy(&self.0[..end]).into_owned();
        self.0.drain(..=end);
        TakeoverLine::parse(&line).ok_or(Malformed::Unknown(line)).map(Some)
    }
}

/// Why an agent that greets with this message cannot take over from this one.
pub fn mismatch(hello: &TakeoverLine) -> Option<String> {
    match hello {
        TakeoverLine::Hello { version, .. } if *version == VERSION => None,
        TakeoverLine::Hello { version, program } => Some(format!(
            "the running agent ({}) speaks version {VERSION} of the takeover protocol, the new one ({program}) version {version}: stop \
             the running agent before you start this one",
            env!("CARGO_PKG_VERSION")
        )),
        other => Some(format!("expected {MAGIC}, found {other}")),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn all() -> Vec<TakeoverLine> {
        let program = "1.2.3".to_owned();
        vec![
            TakeoverLine::Hello { version: 7, program: program.clone() },
            TakeoverLine::Sockets { count: SOCKETS, program },
            TakeoverLine::Refused("the reason, in several words".to_owned()),
            TakeoverLine::Refused(String::new()),
            TakeoverLine::Socket { role: Role::Listen, held: false, address: "0.0.0.0:8080".parse().unwrap() },
            TakeoverLine::Socket { role: Role::Tls, held: true, address: "[2001:db8::1]:8443".parse().unwrap() },
            TakeoverLine::Ready(vec![]),
            TakeoverLine::Ready(vec![Role::Listen, Role::Tls, Role::Admin]),
            TakeoverLine::Done,
        ]
    }

    #[test]
    fn message_is_decoded_as_it_was_encoded_however_its_bytes_arrive() {
        let bytes: Vec<u8> = all().iter().flat_map(TakeoverLine::encode).collect();
        for step in [1, 2, 7, bytes.len()] {
            let (mut lines, mut found) = (ReceivedLines::default(), Vec::new());
            for part in bytes.chunks(step) {
                lines.push(part);
                while let Some(message) = lines.next().unwrap() {
                    found.push(message);
                }
            }
            assert_eq!(found, all());
            assert_eq!(lines.0, b"");
        }
    }

    #[test]
    fn malformed_lines_are_refused() {
        for line in [
            "",
            "penstock-takeover",
            "penstock-takeover 1",
            "penstock-takeover x 1.0",
            "penstock-takeover 1 1.0 more",
            "sockets 4097 1.0",
            "sockets -1 1.0",
            "socket listen own",
            "socket web own 0.0.0.0:1",
            "socket listen 0.0.0.0:1 own",
            "socket listen own 0.0.0.0",
            "socket listen own 0.0.0.0:1 2",
            "ready",
            "ready listen,",
            "ready listen, tls",
            "done now",
            " done",
            "GET / HTTP/1.1",
        ] {
            let mut lines = ReceivedLines::default();
            lines.push(line.as_bytes());
            lines.push(b"\n");
            assert_eq!(lines.next(), Err(Malformed::Unknown(line.to_owned())));
        }
    }

    #[test]
    fn line_without_an_end_is_refused_at_its_bound() {
        let mut lines = ReceivedLines::default();
        lines.push(&[b'x'; LINE]);
        assert_eq!(lines.next(), Ok(None));
        lines.push(b"x");
        assert_eq!(lines.next(), Err(Malformed::Long));
        let long = TakeoverLine::Refused("é\n".repeat(LINE)).encode();
        assert!(long.len() <= LINE + 1 && long.iter().filter(|&&byte| byte == b'\n').count() == 1);
    }

    #[test]
    fn other_version_is_refused_by_both_names() {
        let hello = |version| TakeoverLine::Hello { version, program: "9.9.9".to_owned() };
        assert_eq!(mismatch(&hello(VERSION)), None);
        let reason = mismatch(&hello(VERSION + 1)).unwrap();
        for part in ["version 1 ", "version 2", "9.9.9", env!("CARGO_PKG_VERSION"), "stop the running agent"] {
            assert!(reason.contains(part), "{part}: {reason}");
        }
        assert!(mismatch(&TakeoverLine::Done).unwrap().contains("found done"));
    }

    proptest! {
        #[test]
        fn arbitrary_bytes_are_decoded_or_refused(bytes in prop::collection::vec(any::<u8>(), 0..2000), step in 1usize..600) {
            let mut lines = ReceivedLines::default();
            'all: for part in bytes.chunks(step) {
                lines.push(part);
                loop {
                    match lines.next() {
                        Ok(Some(message)) => prop_assert!(message.encode().len() <= LINE + 1),
                        Ok(None) => break,
                        Err(_) => break 'all,
                    }
                }
                prop_assert!(lines.0.len() <= LINE);
            }
        }
    }
}
