//! Delivers what an endpoint sends to the client: through the kernel as far as a session carries it, and through user space. The
//! bytes are the same on every path.
//!
//! A delivery ends with the message or with a failure. If its future is dropped, both connections can only be closed.

mod ending;
mod frames;
mod keepalive;
mod response;
mod splice;
mod tunnel;

use std::io;

pub use ending::judge;
pub use frames::{FrameCoding, Frames, Sink};
pub use keepalive::SseKeepalive;
pub use response::Delivery;
pub use tunnel::Tunnel;

use crate::{client::patience, kernel::wire::FlowStop, steer::session::Ended};

/// How a delivery ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum End {
    /// Every byte of the message is written or redirected.
    Complete {
        /// The endpoint connection may take another request.
        reusable: bool,
    },
    /// The client has left, or its connection broke.
    ClientGone,
    /// The endpoint closed or reset inside the message, or sent invalid framing.
    Broken,
    /// No byte arrived for the idle time, or the client acknowledged none.
    Idle,
    /// A tunnel was asked to stop, and nothing was in transit.
    Over,
    /// The agent stops, and the kernel carries the rest.
    Left,
    /// Something outside of a flow on path `wire` ended it.
    Stopped(FlowStop),
}

impl End {
    /// Label for metrics and logs.
    pub fn reason(self) -> &'static str {
        match self {
            Self::Complete { .. } => "ok",
            Self::ClientGone => "client_gone",
            Self::Broken => "endpoint_broke",
            Self::Idle => "idle_timeout",
            Self::Over => "over",
            Self::Left => "left",
            Self::Stopped(why) => why.reason(),
        }
    }
}

/// For a session from the endpoint to the client.
impl From<Ended> for End {
    fn from(ended: Ended) -> Self {
        match ended {
            Ended::From => Self::Broken,
            Ended::To(error) if patience::is_over(&error) => Self::Idle,
            Ended::To(_) => Self::ClientGone,
            Ended::Idle => Self::Idle,
            Ended::Asked => Self::Over,
        }
    }
}

/// Maps the result of a write to the client.
fn written(done: io::Result<()>) -> Result<(), End> {
    done.map_err(|error| Ended::To(error).into())
}
