//! Which responses may take path `wire`: two pure rules with reasons, one before the request is sent, one before the response's head
//! is written.

use penstock_common::framing::state;

use super::{
    eligibility::{ResponseFacts, ToPicker},
    reason::SteerReason,
};

/// The facts about a request and its client.
#[derive(Debug, Clone, Copy)]
pub struct RequestFacts {
    /// The client speaks HTTP/2 to the agent.
    pub http2: bool,
    pub tls: bool,
    /// The pool's endpoints speak TLS.
    pub endpoint_tls: bool,
    /// The client's version is HTTP/1.0.
    pub http10: bool,
    /// Clients that close their side are answered all the same.
    pub half_close: bool,
    /// The pool picks for every request.
    pub per_request: bool,
    /// Bytes of the client's next request have been read.
    pub pipelined: bool,
    /// The request asks for another protocol.
    pub upgrade: bool,
    /// The request asks for a stream.
    pub streams: bool,
    /// The EPP gets every byte of the response's body.
    pub told: bool,
    /// The model's name in the response is changed.
    pub renamed: bool,
    /// Comments are sent in event streams.
    pub keepalive: bool,
}

/// Whether the connections are watched, and the endpoint is asked to close its connection after the response.
pub fn may_watch(asked: &RequestFacts) -> Result<(), SteerReason> {
    match () {
        () if asked.http2 => Err(SteerReason::Http2),
        () if asked.tls => Err(SteerReason::Tls),
        () if asked.endpoint_tls => Err(SteerReason::EndpointTls),
        () if asked.http10 => Err(SteerReason::Http10),
        () if asked.half_close => Err(SteerReason::HalfClose),
        () if !asked.per_request => Err(SteerReason::PickPer),
        () if asked.pipelined => Err(SteerReason::Pipelined),
        () if asked.upgrade || !asked.streams => Err(SteerReason::NotStreamed),
        () if asked.told => Err(SteerReason::ResponseToPicker),
        () if asked.renamed => Err(SteerReason::ModelRenamed),
        () if asked.keepalive => Err(SteerReason::SseKeepalive),
        () => Ok(()),
    }
}

/// Whether the response may be handed over. Only then is the client told that its connection closes.
pub fn may_begin(response: &ResponseFacts, min_bytes: u64, pipelined: bool) -> Result<(), SteerReason> {
    let framing = &response.framing;
    match () {
        () if framing.is_done() => Err(SteerReason::Complete),
        () if response.tls => Err(SteerReason::Tls),
        () if response.endpoint_tls => Err(SteerReason::EndpointTls),
        () if response.half_closed => Err(SteerReason::HalfClose),
        () if response.decoded => Err(SteerReason::Http10),
        () if response.to_picker == Some(ToPicker::All) => Err(SteerReason::ResponseToPicker),
        () if pipelined => Err(SteerReason::Pipelined),
        () if framing.state == state::LENGTH && framing.left < min_bytes => Err(SteerReason::Small),
        () => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use penstock_common::framing::Framing;

    use super::*;

    #[test]
    fn each_reason_not_to_watch_has_its_case() {
        use SteerReason as R;
        let base = RequestFacts {
            http2: false,
            tls: false,
            endpoint_tls: false,
            http10: false,
            half_close: false,
            per_request: true,
            pipelined: false,
            upgrade: false,
            streams: true,
            told: false,
            renamed: false,
            keepalive: false,
        };
        let rows = [
            (base, Ok(())),
            (RequestFacts { http2: true, ..base }, Err(R::Http2)),
            (RequestFacts { tls: true, ..base }, Err(R::Tls)),
            (RequestFacts { endpoint_tls: true, ..base }, Err(R::EndpointTls)),
            (RequestFacts { http10: true, ..base }, Err(R::Http10)),
            (RequestFacts { half_close: true, ..base }, Err(R::HalfClose)),
            (RequestFacts { per_request: false, ..base }, Err(R::PickPer)),
            (RequestFacts { pipelined: true, ..base }, Err(R::Pipelined)),
            (RequestFacts { upgrade: true, ..base }, Err(R::NotStreamed)),
            (RequestFacts { streams: false, ..base }, Err(R::NotStreamed)),
            (RequestFacts { told: true, ..base }, Err(R::ResponseToPicker)),
            (RequestFacts { renamed: true, ..base }, Err(R::ModelRenamed)),
            (RequestFacts { keepalive: true, ..base }, Err(R::SseKeepalive)),
        ];
        for (asked, expected) in rows {
            assert_eq!(may_watch(&asked), expected, "{asked:?}");
        }
    }

    #[test]
    fn each_reason_not_to_begin_has_its_case() {
        use SteerReason as R;
        let base = ResponseFacts {
            framing: Framing::chunked(),
            event_stream: true,
            local_endpoint: false,
            tls: false,
            endpoint_tls: false,
            half_closed: false,
            decoded: false,
            to_picker: None,
        };
        let rows = [
            (base, Ok(())),
            (ResponseFacts { framing: Framing::until_close(), ..base }, Ok(())),
            (ResponseFacts { framing: Framing::length(1000), ..base }, Ok(())),
            (ResponseFacts { framing: Framing::length(999), ..base }, Err(R::Small)),
            (ResponseFacts { framing: Framing::none(), ..base }, Err(R::Complete)),
            (ResponseFacts { tls: true, ..base }, Err(R::Tls)),
            (ResponseFacts { endpoint_tls: true, ..base }, Err(R::EndpointTls)),
            (ResponseFacts { half_closed: true, ..base }, Err(R::HalfClose)),
            (ResponseFacts { decoded: true, ..base }, Err(R::Http10)),
            (ResponseFacts { to_picker: Some(ToPicker::End), ..base }, Ok(())),
            (ResponseFacts { to_picker: Some(ToPicker::All), ..base }, Err(R::ResponseToPicker)),
        ];
        for (response, expected) in rows {
            assert_eq!(may_begin(&response, 1000, false), expected, "{response:?}");
        }
        assert_eq!(may_begin(&base, 1000, true), Err(R::Pipelined));
    }
}
