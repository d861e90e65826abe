//! HTTP/1.1 messages: heads, bodies, and the headers that apply to a single hop.
//!
//! Everything here is a pure function of bytes; only [`body::ReplayBody`] uses a file. Parsing is strict where another
//! parser could read the same bytes differently (RFC 9112 §11.2, request smuggling). Errors are values with a status
//! and a label; the caller, which owns the socket, sends the answer.

pub mod head;
pub mod request;
pub mod accept;
pub mod body;
pub mod coding;
pub mod media;
pub mod trailers;
pub mod fields;
pub mod headers;
pub mod cors;
pub mod digest;
pub mod date;
pub mod trace_context;
pub mod response;
pub mod reply;
pub mod frame_heads;
pub mod empty_data;
