//! What the kernel charges each socket of a process for, as reported by `ss`.

use std::process::Command;

/// One end of a TCP connection; sizes in bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TcpSocket {
    /// Received and unread data including kernel overhead, and its limit.
    pub(crate) receive: u64,
    pub(crate) receive_limit: u64,
    /// The same for data to be sent or acknowledged.
    pub(crate) send: u64,
    pub(crate) send_limit: u64,
}

impl TcpSocket {
    /// The machine's connected sockets that match a filter such as `sport = :8080` (ss(8)).
    pub(crate) fn all(filter: &str) -> Vec<Self> {
        let output = Command::new("ss").args(["-tnmHO", "state", "established", filter]).output().unwrap();
        assert!(output.status.success(), "{output:?}");
        String::from_utf8(output.stdout).unwrap().lines().map(Self::parse).collect()
    }

    /// `0 0 127.0.0.1:8080 127.0.0.1:40000 skmem:(r0,rb131072,t0,tb46080,f0,w0,o0,bl0,d0)`
    fn parse(line: &str) -> Self {
        let memory = || line.split_whitespace().find_map(|word| word.strip_prefix("skmem:(")?.strip_suffix(')'));
        let field = |name: &str| memory()?.split(',').find_map(|field| field.strip_prefix(name)?.parse().ok());
        let parsed = || {
            Some(Self {
                receive: field("r")?,
                receive_limit: field("rb")?,
                send: field("w")?,
                send_limit: field("tb")?,
            })
        };
        parsed().unwrap_or_else(|| panic!("ss printed {line:?}"))
    }
}
