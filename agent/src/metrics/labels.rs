//! Label sets and the enums of label values. Free-form labels are `&'static str`, so the code bounds the cardinality.

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
            /// All variants in declaration order, so that `variant as usize` is the index.
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
    /// The outcome of an exchange with the EPP.
    EppOutcome {
        /// The EPP chose an endpoint.
        Picked = "picked",
        /// The EPP answered the request itself.
        Immediate = "immediate",
        /// The EPP failed and the pool fails open.
        FailOpen = "fail_open",
        /// The EPP failed and the pool fails closed.
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
    /// The state of a pool's endpoint: the first of these that applies, from the top.
    EndpointState {
        /// Gets no new requests.
        Draining = "draining",
        /// Its health checks fail.
        Unhealthy = "unhealthy",
        /// Excluded for a time because it failed requests.
        Ejected = "ejected",
        Ready = "ready",
    }
}

/// A shared pool name, so that label sets are created without copying it. Empty if no pool was selected.
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

/// One per replica, with a single state at a time.
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

/// One per InferencePool that the configuration names and resource that describes it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByWatch {
    pub(super) inference_pool: String,
    pub(super) resource: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByWatchAndReason {
    pub(super) inference_pool: String,
    pub(super) resource: &'static str,
    pub(super) reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByPoolAndIndex {
    pub(super) pool: PoolName,
    pub(super) index: &'static str,
}

/// Named as in OpenTelemetry's conventions. The model comes from responses, so [`super::models`] bounds its values.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByModel {
    pub(super) pool: PoolName,
    pub(super) gen_ai_response_model: Arc<str>,
    pub(super) gen_ai_token_type: &'static str,
}

/// Like [`ByModel`], with the model that the request names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByRequestModel {
    pub(super) pool: PoolName,
    pub(super) gen_ai_request_model: Arc<str>,
}

/// The attribute is one that the configuration names.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByAttribute {
    pub(super) pool: PoolName,
    pub(super) gen_ai_request_model: Arc<str>,
    pub(super) attribute: String,
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
    pub(super) path: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct ByFlow {
    pub(super) path: &'static str,
    pub(super) reason: &'static str,
}

/// The only free-form text, the result of a self-test. One per path at a time.
#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
pub(super) struct PathState {
    pub(super) path: &'static str,
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
