//! The ways by which the bytes of a body reach their receiver.

/// Who carries the bytes of a flow.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Path {
    /// The kernel: the endpoint's own `sendmsg` puts them into the client's send queue.
    Local,
    /// The kernel: the verdict redirects what has arrived on the source's connection.
    Ingress,
    /// The kernel: packets are rewritten between the endpoint and the client.
    Wire,
    /// User space receives and sends them.
    Relay,
}

impl Path {
    /// Best first; `path as usize` is the index.
    pub const ALL: [Self; 4] = [Self::Local, Self::Ingress, Self::Wire, Self::Relay];

    /// Metric label.
    pub const fn label(self) -> &'static str {
        match self {
            Self::Local => "local",
            Self::Ingress => "ingress",
            Self::Wire => "wire",
            Self::Relay => "relay",
        }
    }

    /// The path to try when this one cannot carry a flow.
    pub const fn next(self) -> Self {
        match self {
            Self::Local => Self::Ingress,
            Self::Ingress | Self::Wire | Self::Relay => Self::Relay,
        }
    }
}
