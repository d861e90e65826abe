//! HTTP/1.1 on plain sockets: heads, bodies, and the headers that must not travel further than one hop.
//!
//! Everything here is a pure function of bytes (only [`body::ReplayBody`] touches a file), strict where a second reading of
//! the same bytes would be possible (RFC 9112 §11.2, request smuggling), and silent on the wire: errors are values with a
//! status and a label, and the caller, who owns the socket, answers them.

pub mod head;
pub mod request;
pub mod accept;
pub mod body;
pub mod coding;
pub mod trailers;
pub mod headers;
pub mod digest;
pub mod date;
pub mod trace_context;
pub mod response;
pub mod reply;
pub mod frames;
pub mod frame_heads;
