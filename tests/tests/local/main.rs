//! The path `local`, on which an endpoint's own `sendmsg` reaches the client: whoever the endpoint is and however it sends,
//! wherever on this machine it is, and however it ends.

mod senders;
