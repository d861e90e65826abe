//! Penstock: routes each inference request to the endpoint its picker chooses, then lets the kernel carry the response.
//!
//! Modules are listed in the order in which a request passes through them; a module never imports from its callers. What other
//! crates use is public here, and nothing else is, so that the compiler finds what nobody uses.

#![warn(missing_docs)]
#![allow(unreachable_pub, reason = "`pub` within a private module says what the module offers to the others")]

mod pem;
mod listeners;
pub mod config;
pub mod capability;
mod text;
mod deadline;
pub mod logging;
mod readiness;
mod probe;
pub mod panics;
mod metrics;
mod budget;
mod reserve;
mod dns;
mod admin;
mod http;
mod telemetry;
mod bbr;
mod abridge;
mod route;
mod server_tls;
mod picker;
mod kernel;
mod tee;
mod rename;
mod steer;
mod client;
mod endpoint;
mod deliver;
mod selftest;
mod ladder;
mod error;
mod shared;
#[cfg_attr(
    not(feature = "kubernetes"),
    allow(dead_code, unused_imports, reason = "only the discovery finds a Gateway")
)]
mod gateway;
mod inference_pools;
mod room;
mod worker;
mod upload;
mod proxy;
pub mod trial;
mod tried;
mod turns;
mod tls;
mod proxy_header;
mod connection;
mod server;
mod takeover;
mod reload;
mod control;
mod live;
#[cfg(feature = "kubernetes")]
mod kubernetes;
#[cfg(not(feature = "kubernetes"))]
#[path = "no_kubernetes.rs"]
mod kubernetes;
mod app;
mod notify;
pub mod run;
pub mod epp_server;

pub use app::Agent;

/// What `penstock doctor` needs besides.
pub mod command {
    pub use crate::{
        kernel::{
            Kernel,
            cgroup::{self, CgroupError},
            version,
            wire::{Pinned, Wire, detach, pinned, prepare},
        },
        ladder::{Ladder, Program, Rung, RungState},
        selftest::{Check, WIRE_CASES},
    };
}

/// Parts of the agent that fuzz targets and tests drive by themselves. They change with the agent.
pub mod parts {
    pub use crate::{
        abridge::{Abridged, Abridger, Difference, Whole, difference},
        bbr::{Found, JsonError, Model, ModelScanner, Summary},
        budget::{Bodies, Budget},
        client::{ClientSocket, close::Linger},
        deliver::{Delivery, End},
        dns::DnsResolver,
        endpoint::{connection::EndpointConnection, timeouts::ConnectionTimeouts},
        http::{
            body::{BodyError, BodyReader, Decoded, ReplayBody},
            fields::FieldPolicy,
            head::HeadLimits,
            headers::{Arrival, prepare_request},
            request::{RequestBody, RequestHead, RequestParser, from_http2, parse_request},
            response::{
                AfterResponse, BodyKind, RequestFraming, ResponseHead, ResponseParser, parse_response, write_request,
            },
            trace_context,
        },
        metrics::Metrics,
        picker::{
            error::PickError,
            exchange::{Body, Decision, Event, Exchange, ExchangeLimits, Outcome},
            message::DESTINATION,
            mutation,
        },
        probe::{Point, Probe},
        steer::{
            Source, WorkerSteering,
            session::{Session, Target},
        },
        tee::{BodyFacts, Tee},
    };
}
