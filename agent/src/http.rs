//! HTTP/1.1 on plain sockets: heads, bodies, and the headers that must not travel further than one hop.
pub mod body;
pub mod headers;
pub mod request;
pub mod response;
