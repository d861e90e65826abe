//! `[timeouts]`, and `timeouts` of a pool or a route, which go before it.

use std::time::Duration;

use super::{
    settings::settings,
    value::{duration, duration_or_off, seconds_or_off},
};

settings! {
    /// How long things may take.
    pub struct Timeouts {
        /// A request head, from its first byte. Then 408.
        pub head: Option<Duration> = Some(Duration::from_secs(10)) => duration_or_off(),
        /// No byte of a request body for this long, while the agent waits for one. Then 408. See `limits.body_min_rate`, too.
        pub body: Option<Duration> = Some(Duration::from_secs(60)) => duration_or_off(),
        /// An idle client connection between requests. Then it is closed.
        pub keep_alive: Option<Duration> = Some(Duration::from_secs(75)) => duration_or_off(),
        /// TCP connect to an endpoint. Then the next of the list, and 504 after the last.
        pub connect: Option<Duration> = Some(Duration::from_secs(1)) => duration_or_off(),
        /// From the request sent to the response head. Then 504.
        pub first_byte: Option<Duration> = Some(Duration::from_secs(600)) => duration_or_off(),
        /// No byte of a response for this long, from the endpoint or acknowledged by the client. Then the connection is broken off;
        /// over HTTP/2 the stream is reset, and the connection ends with the last of its streams.
        pub idle: Option<Duration> = Some(Duration::from_secs(300)) => duration_or_off(),
        /// The whole of a request, from the first byte of its head to the last byte of the response. Then 504, or the connection is
        /// broken off where the response has begun.
        pub request: Option<Duration> = None => duration_or_off(),
        /// An idle connection to an endpoint; below the 5s after which uvicorn closes it.
        pub endpoint_keep_alive: Duration = Duration::from_secs(4) => duration(),
        /// An endpoint's machine that acknowledges nothing, answers no keepalive probe, or takes no byte for this long. Then the
        /// connection is broken: the next of the list if nothing of the request was acknowledged, and otherwise a visible break.
        pub endpoint_unreachable: Option<Duration> = Some(Duration::from_secs(45)) => seconds_or_off(),
        /// From the end of `lame_duck`, how long running responses may take.
        pub drain: Duration = Duration::from_secs(30) => duration(),
        /// After SIGTERM, how long connections are still accepted while `/readyz` answers 503, HTTP/1.1 responses say
        /// `Connection: close` and HTTP/2 connections get GOAWAY: for as long as whoever sends requests here may take to notice.
        /// kube-proxy and most load balancers take 1s to 5s.
        pub lame_duck: Option<Duration> = Some(Duration::from_secs(5)) => duration_or_off(),
        /// How long a client that sends on after its answer is read, so that a reset does not take the answer from it.
        pub linger: Duration = Duration::from_secs(30) => duration(),
        /// A client's machine that acknowledges nothing of what it was sent, or answers no keepalive probe of an idle connection,
        /// for this long. Then the client has left. A client that is there and takes nothing has `idle`.
        pub client_unreachable: Option<Duration> = Some(Duration::from_secs(45)) => seconds_or_off(),
    }
}

settings! {
    /// Timeouts of a pool's or a route's requests. A route's go before its pool's, and those before `[timeouts]`: the outer
    /// `None` leaves it to them, the inner one is off.
    #[derive(Copy)]
    pub struct TimeoutOverrides {
        /// As `timeouts.body`.
        pub body: Option<Option<Duration>> = None => duration_or_off().optional("60s"),
        /// As `timeouts.first_byte`.
        pub first_byte: Option<Option<Duration>> = None => duration_or_off().optional("10m"),
        /// As `timeouts.idle`.
        pub idle: Option<Option<Duration>> = None => duration_or_off().optional("5m"),
        /// As `timeouts.request`.
        pub request: Option<Option<Duration>> = None => duration_or_off().optional("off"),
    }
}
