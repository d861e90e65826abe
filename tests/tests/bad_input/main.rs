//! What a client or an endpoint can get wrong, and what is unusual and right: every fault is answered with its status and
//! code, nothing of it reaches the other side, and connections that were open before do not notice.

mod bodies;
mod endpoints;
mod formats;
mod heads;
mod setting;
mod smuggling;
mod timeouts;
mod unusual;
