//! What the kernel charges each socket of a process for, as `ss` tells it.

use std::process::Command;

/// One end of a TCP connection; bytes.
#[derive(Clone, Copy, Debug)]
pub(crate) struct TcpSocket {
    /// What has been received and waits, with what the kernel needs around it, and how much that may be.
    pub(crate) receive: u64,
    pub(crate) receive_limit: u64,
    /// The same, of what waits to be sent or acknowledged.
    pub(crate) send: u64,
    pub(crate) send_limit: u64,
}

impl TcpSocket {
    /// Those of the machine that are connected and fit: `sport = :8080`, as ss(8) has it.
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
