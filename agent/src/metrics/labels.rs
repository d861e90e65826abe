//! Label sets and the closed sets of label values. Free-form labels are `&'static str`, so cardinality is fixed by the code.

use std::{fmt, sync::Arc};

use prometheus_client::encoding::{EncodeLabelSet, EncodeLabelValue, LabelValueEncoder};

/// An enum whose variants are label values.
macro_rules! label {
    ($(#[$meta:meta])* $name:ident { $($(#[$variant_meta:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
        pub enum $name {
            $($(#[$variant_meta])* $variant,)+
        }

        impl $name {
            /// In the order of declaration, so that `variant as usize` is its index.
            pub const ALL: [Self; [$($text),+].len()] = [$(Self::$variant),+];

            pub const fn as_str(self) -> &'static str {
                match self {
                    $(Self::$variant => $text,)+
                }
            }
        }

        impl EncodeLabelValue for $name {
            fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
                self.as_str().encode(encoder)
            }
        }
    };
}

label! {
    /// Who carries the bytes of a response's body.
    Path {
        /// The kernel, from the model server's socket on this machine.
        Local = "local",
        /// The kernel, from the agent's connection to the endpoint.
        Ingress = "ingress",
        /// User space.
        Relay = "relay",
    }
}

label! {
    /// How an exchange with the EPP ended.
    EppOutcome {
        /// It named an endpoint.
        Picked = "picked",
        /// It answered the request itself.
        Immediate = "immediate",
        /// It failed and the pool is open.
        FailOpen = "fail_open",
        /// It failed and the pool is closed.
        FailClosed = "fail_closed",
    }
}

label! {
    /// Where a request's endpoint connection came from.
    Connection {
        New = "new",
        Reused = "reused",
        Failed = "failed",
    }
}

label! {
    /// How an endpoint of a pool is: what of these holds first, from the top.
    EndpointState {
        /// Gets no new requests.
        Draining = "draining",
        /// Down, by its checks.
        Unhealthy = "unhealthy",
        /// Taken out for a while, by the requests that it failed.
        Ejected = "ejected",
        Ready = "ready",
    }
}

/// Shared, so that a label set is made without copying the name. Empty: the request never got as far as a pool.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) struct PoolName(pub(super) Arc<str>);

impl EncodeLabelValue for PoolName {
    fn encode(&self, encoder: &mut LabelValueEncoder<'_>) -> fmt::Result {
        (&*self.0).encode(encoder)
    }
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPool {
    pub(super) pool: PoolName,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByAnswer {
    pub(super) pool: PoolName,
    pub(super) status: u16,
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByOutcome {
    pub(super) pool: PoolName,
    pub(super) outcome: EppOutcome,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPoolAndReason {
    pub(super) pool: PoolName,
    pub(super) reason: &'static str,
}

/// As many as there are replicas: one state each at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByReplica {
    pub(super) pool: PoolName,
    pub(super) replica: String,
    pub(super) state: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPoolAndState {
    pub(super) pool: PoolName,
    pub(super) state: EndpointState,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct BySource {
    pub(super) pool: PoolName,
    pub(super) source: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct BySourceAndReason {
    pub(super) pool: PoolName,
    pub(super) source: &'static str,
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPoolAndIndex {
    pub(super) pool: PoolName,
    pub(super) index: &'static str,
}

/// With the names of OpenTelemetry's conventions. The model comes from responses, so [`super::models`] bounds its values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByModel {
    pub(super) pool: PoolName,
    pub(super) gen_ai_response_model: Arc<str>,
    pub(super) gen_ai_token_type: &'static str,
}

/// As [`ByModel`]; the model is what the request names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByRequestModel {
    pub(super) pool: PoolName,
    pub(super) gen_ai_request_model: Arc<str>,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByReason {
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByListener {
    pub(super) listener: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPath {
    pub(super) path: Path,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByFlow {
    pub(super) path: Path,
    pub(super) reason: &'static str,
}

/// The one free-form text: what a self-test said. One per path at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct PathState {
    pub(super) path: Path,
    pub(super) reason: String,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByResult {
    pub(super) result: Connection,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct Build {
    pub(super) version: &'static str,
}
