//! A script's view of one stream: the peer's messages so far, and the means to reply.

use penstock_proto::core::Metadata;
use penstock_proto::ext_proc::processing_response::Response;
use penstock_proto::ext_proc::{ProcessingResponse, ProtocolConfiguration};
use tokio::sync::mpsc;
use tonic::Status;

use super::fault::Harm;
use super::{Answer, record};

pub struct Exchange {
    pub request_headers: Vec<(String, String)>,
    /// The body so far.
    pub request_body: Vec<u8>,
    pub response_headers: Vec<(String, String)>,
    /// Of the last message.
    pub metadata: Option<Metadata>,
    pub protocol_config: Option<ProtocolConfiguration>,
    /// A script's own state, such as the picked endpoint or a held-back body.
    pub picked: Option<String>,
    pub held: Vec<u8>,
    /// Whether the reply to the request head echoes every field, as production pickers do. Default: true.
    pub echoes: bool,
    /// The fault that strikes after the reply to the request head is sent.
    pub(super) after_header_reply: Option<Harm>,
    replies: mpsc::Sender<Result<ProcessingResponse, Status>>,
}

impl Exchange {
    pub(super) fn new(replies: mpsc::Sender<Result<ProcessingResponse, Status>>) -> Self {
        Self {
            request_headers: Vec::new(),
            request_body: Vec::new(),
            response_headers: Vec::new(),
            metadata: None,
            protocol_config: None,
            picked: None,
            held: Vec::new(),
            echoes: true,
            after_header_reply: None,
            replies,
        }
    }

    pub(super) fn replies(&self) -> mpsc::Sender<Result<ProcessingResponse, Status>> {
        self.replies.clone()
    }

    /// Sends a message. Waits while the peer reads none.
    pub async fn send(&mut self, mut message: ProcessingResponse) -> Answer {
        let header_reply = matches!(message.response, Some(Response::RequestHeaders(_)));
        if let Some(Response::RequestHeaders(reply)) = &mut message.response
            && self.echoes
        {
            let mutation = reply.response.get_or_insert_default().header_mutation.get_or_insert_default();
            reply::echo(&self.request_headers, mutation);
        }
        // The script's runner notices a departed peer.
        let _ = self.replies.send(Ok(message)).await;
        match self.after_header_reply.take_if(|_| header_reply) {
            Some(harm) => harm.strike(self).await,
            None => Ok(()),
        }
    }

    /// The endpoints that the last message limits the choice to, if any.
    #[must_use]
    pub fn subset(&self) -> Option<Vec<String>> {
        record::subset(self.metadata.as_ref())
    }

    /// The served endpoint in the last message.
    #[must_use]
    pub fn served(&self) -> Option<String> {
        record::served(self.metadata.as_ref())
    }
}

/// Ready-made messages for scripts.
pub mod reply {
    use bytes::Bytes;
    use penstock_proto::core::{HeaderValue, HeaderValueOption};
    use penstock_proto::ext_proc::body_mutation::Mutation;
    use penstock_proto::ext_proc::processing_response::Response;
    use penstock_proto::ext_proc::{
        BodyMutation, BodyResponse, CommonResponse, HeaderMutation, HeadersResponse, ImmediateResponse,
        ProcessingResponse, StreamedBodyResponse, TrailersResponse,
    };
    use penstock_proto::http_type::HttpStatus;
    use penstock_proto::prost_types::{Struct, Value, value::Kind};

    /// The header and metadata key of the picked endpoint.
    pub const DESTINATION: &str = "x-gateway-destination-endpoint";
    /// The production picker's maximum of body bytes per message.
    const PIECE: usize = 62_000;

    fn message(response: Response) -> ProcessingResponse {
        ProcessingResponse { response: Some(response), ..ProcessingResponse::default() }
    }

    /// Sets `headers`, each over an existing one, as the Go pickers do: with the default append action.
    #[must_use]
    pub fn mutation(headers: &[(&str, &str)]) -> HeaderMutation {
        let set = |(name, value): &(&str, &str)| HeaderValueOption {
            header: Some(HeaderValue {
                key: (*name).to_owned(),
                raw_value: Bytes::copy_from_slice(value.as_bytes()),
                ..HeaderValue::default()
            }),
            ..HeaderValueOption::default()
        };
        HeaderMutation { set_headers: headers.iter().map(set).collect(), remove_headers: Vec::new() }
    }

    /// Sets the `fields` that the mutation does not name, including pseudo-headers; of a repeated field only the last value, as in
    /// a Go map.
    pub fn echo(fields: &[(String, String)], out: &mut HeaderMutation) {
        let named = |name: &str| {
            let set = out.set_headers.iter().filter_map(|set| set.header.as_ref()).map(|header| header.key.as_str());
            set.chain(out.remove_headers.iter().map(String::as_str)).any(|named| named.eq_ignore_ascii_case(name))
        };
        let mut echoed: Vec<(&str, &str)> = Vec::new();
        for (name, value) in fields.iter().filter(|(name, _)| !named(name)) {
            echoed.retain(|(before, _)| before != name);
            echoed.push((name, value));
        }
        out.set_headers.extend(mutation(&echoed).set_headers);
    }

    #[must_use]
    pub fn request_headers(mutation: HeaderMutation) -> ProcessingResponse {
        let response =
            CommonResponse { header_mutation: Some(mutation), clear_route_cache: true, ..CommonResponse::default() };
        message(Response::RequestHeaders(HeadersResponse { response: Some(response) }))
    }

    /// The reply to the request head that names `endpoints` in header and metadata, and sets `headers`.
    #[must_use]
    pub fn pick(endpoints: &str, headers: &[(&str, &str)]) -> ProcessingResponse {
        let mut all = vec![(DESTINATION, endpoints)];
        all.extend_from_slice(headers);
        let mut message = request_headers(mutation(&all));
        message.dynamic_metadata = Some(destination(endpoints));
        message
    }

    /// `envoy.lb` metadata that names `endpoints`.
    #[must_use]
    pub fn destination(endpoints: &str) -> Struct {
        let of = |key: &str, kind| Struct { fields: [(key.to_owned(), Value { kind: Some(kind) })].into() };
        of("envoy.lb", Kind::StructValue(of(DESTINATION, Kind::StringValue(endpoints.to_owned()))))
    }

    fn streamed(body: Bytes, end_of_stream: bool) -> BodyResponse {
        let mutation = Mutation::StreamedResponse(StreamedBodyResponse { body, end_of_stream });
        let response = CommonResponse {
            body_mutation: Some(BodyMutation { mutation: Some(mutation) }),
            ..CommonResponse::default()
        };
        BodyResponse { response: Some(response) }
    }

    /// A whole body in as many messages as needed.
    fn pieces(body: &Bytes) -> impl Iterator<Item = BodyResponse> {
        let last = body.len().saturating_sub(1) / PIECE;
        (0..=last).map(move |n| streamed(body.slice(n * PIECE..body.len().min((n + 1) * PIECE)), n == last))
    }

    /// A whole request body.
    pub fn request_body(body: &Bytes) -> impl Iterator<Item = ProcessingResponse> {
        pieces(body).map(|piece| message(Response::RequestBody(piece)))
    }

    /// A whole request body in one message, however large.
    #[must_use]
    pub fn request_body_in_one(body: &Bytes) -> ProcessingResponse {
        message(Response::RequestBody(streamed(body.clone(), true)))
    }

    /// A whole response body.
    pub fn response_bodies(body: &Bytes) -> impl Iterator<Item = ProcessingResponse> {
        pieces(body).map(|piece| message(Response::ResponseBody(piece)))
    }

    /// A reply to a piece of the request body that changes nothing.
    #[must_use]
    pub fn request_body_unchanged() -> ProcessingResponse {
        message(Response::RequestBody(BodyResponse { response: Some(CommonResponse::default()) }))
    }

    #[must_use]
    pub fn response_headers(headers: &[(&str, &str)]) -> ProcessingResponse {
        response_mutation(mutation(headers))
    }

    #[must_use]
    pub fn response_mutation(mutation: HeaderMutation) -> ProcessingResponse {
        let response = CommonResponse { header_mutation: Some(mutation), ..CommonResponse::default() };
        message(Response::ResponseHeaders(HeadersResponse { response: Some(response) }))
    }

    #[must_use]
    pub fn response_body(body: Bytes, end_of_stream: bool) -> ProcessingResponse {
        message(Response::ResponseBody(streamed(body, end_of_stream)))
    }

    #[must_use]
    pub fn response_body_unchanged() -> ProcessingResponse {
        message(Response::ResponseBody(BodyResponse { response: Some(CommonResponse::default()) }))
    }

    #[must_use]
    pub fn response_trailers() -> ProcessingResponse {
        message(Response::ResponseTrailers(TrailersResponse::default()))
    }

    #[must_use]
    pub fn immediate(status: u16, headers: &[(&str, &str)], body: &str) -> ProcessingResponse {
        message(Response::ImmediateResponse(ImmediateResponse {
            status: Some(HttpStatus { code: status.into() }),
            headers: Some(mutation(headers)),
            body: Bytes::copy_from_slice(body.as_bytes()),
            ..ImmediateResponse::default()
        }))
    }
}
