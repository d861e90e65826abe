//! `[timeouts]`, and the `timeouts` of a pool or a route, which override it.

use std::time::Duration;

use super::{
    settings::settings,
    value::{duration, duration_or_off, seconds_or_off},
};

settings! {
    /// Timeouts of requests and connections.
    pub struct Timeouts {
        /// How long a request head may take, from its first byte. After it, the request is answered with 408. Over HTTP/2 it applies
        /// to the connection's preface with its SETTINGS, to each head, trailers included, and to each other frame except DATA. As
        /// nothing can follow an incomplete one, the connection is closed with GOAWAY.
        pub head: Option<Duration> = Some(Duration::from_secs(10)) => duration_or_off(),
        /// How long the agent waits for the next byte of a request body. After it, the request is answered with 408. See also
        /// `limits.body_min_rate`.
        pub body: Option<Duration> = Some(Duration::from_secs(60)) => duration_or_off(),
        /// How long a client connection may be idle between requests. After it, the connection is closed.
        pub keep_alive: Option<Duration> = Some(Duration::from_secs(75)) => duration_or_off(),
        /// How long a TCP connect to an endpoint may take. After it, the next endpoint of the pick is tried; after the last one,
        /// the request is answered with 504.
        pub connect: Option<Duration> = Some(Duration::from_secs(1)) => duration_or_off(),
        /// How long an endpoint may take to send the response head after it got the request. After it, the request is answered with
        /// 504.
        pub first_byte: Option<Duration> = Some(Duration::from_secs(600)) => duration_or_off(),
        /// How long a response may pause: no byte from the endpoint, or none acknowledged by the client. After it, the connection
        /// is reset; over HTTP/2, the stream is reset, and the connection is closed after its last stream.
        pub idle: Option<Duration> = Some(Duration::from_secs(300)) => duration_or_off(),
        /// How long a whole request may take, from the first byte of its head to the last byte of the response. After it, the
        /// request is answered with 504, or the connection is reset if the response has begun.
        pub request: Option<Duration> = None => duration_or_off(),
        /// How long the endpoints may take for a request, from its dispatch to the last byte of the response, all attempts together.
        /// After it, the request ends as after `request`.
        pub dispatch: Option<Duration> = None => duration_or_off(),
        /// How long an endpoint connection is kept idle for reuse. The default is below the 5s after which uvicorn closes it.
        pub endpoint_keep_alive: Duration = Duration::from_secs(4) => duration(),
        /// How long an endpoint's machine may acknowledge nothing, answer no keepalive probe, or accept no byte. After it, the
        /// connection is reset: the request goes to the next endpoint of the pick if none of it was acknowledged, and fails visibly
        /// otherwise.
        pub endpoint_unreachable: Option<Duration> = Some(Duration::from_secs(45)) => seconds_or_off(),
        /// How long running responses may take after the end of `lame_duck`.
        pub drain: Duration = Duration::from_secs(30) => duration(),
        /// How long the agent still accepts connections after SIGTERM, while `/readyz` answers 503, HTTP/1.1 responses carry
        /// `Connection: close` and HTTP/2 connections get GOAWAY. It should cover the time that load balancers need to notice:
        /// kube-proxy and most others take 1s to 5s.
        pub lame_duck: Option<Duration> = Some(Duration::from_secs(5)) => duration_or_off(),
        /// How long the agent reads from a client that continues to send after its response, so that a reset does not destroy the
        /// response.
        pub linger: Duration = Duration::from_secs(30) => duration(),
        /// How long a client's machine may acknowledge nothing that it was sent, or answer no keepalive probe on an idle
        /// connection. After it, the client counts as gone. A reachable client that accepts no data is subject to `idle`.
        pub client_unreachable: Option<Duration> = Some(Duration::from_secs(45)) => seconds_or_off(),
    }
}

settings! {
    /// Timeouts of a pool or a route. Those of a route override those of its pool, which override `[timeouts]`. The outer `None`
    /// does not override; the inner one means off.
    #[derive(Copy)]
    pub struct TimeoutOverrides {
        /// Overrides `timeouts.body`.
        pub body: Option<Option<Duration>> = None => duration_or_off().optional("60s"),
        /// Overrides `timeouts.first_byte`.
        pub first_byte: Option<Option<Duration>> = None => duration_or_off().optional("10m"),
        /// Overrides `timeouts.idle`.
        pub idle: Option<Option<Duration>> = None => duration_or_off().optional("5m"),
        /// Overrides `timeouts.request`.
        pub request: Option<Option<Duration>> = None => duration_or_off().optional("off"),
        /// Overrides `timeouts.dispatch`.
        pub dispatch: Option<Option<Duration>> = None => duration_or_off().optional("off"),
    }
}
