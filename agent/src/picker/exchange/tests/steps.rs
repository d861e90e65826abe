//! Steps on a stream, and what an exchange makes of them.

use super::*;

pub(super) const A: &str = "10.0.0.1:1";

/// A step on a stream after the head of a request with a body was sent.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A piece of the client's body.
    Piece,
    /// The last piece of the client's body.
    End,
    Reply(Box<ProcessingResponse>),
    Closed,
    Failed,
    Deadline,
}
pub(super) use Step::*;

pub(super) fn reply(response: Response) -> Step {
    Reply(Box::new(ProcessingResponse { response: Some(response), ..Default::default() }))
}

pub(super) fn option(name: &str, value: &str) -> HeaderValueOption {
    let header = HeaderValue { key: name.into(), value: String::new(), raw_value: value.to_owned().into() };
    HeaderValueOption { header: Some(header), ..Default::default() }
}

pub(super) fn mutation(headers: &[(&str, &str)]) -> Option<HeaderMutation> {
    let set_headers = headers.iter().map(|(name, value)| option(name, value)).collect();
    Some(HeaderMutation { set_headers, remove_headers: vec![] })
}

/// A reply to the head that picks `list`.
pub(super) fn head(list: &str) -> Step {
    let response = Some(CommonResponse {
        header_mutation: mutation(&[(message::DESTINATION, list)]),
        clear_route_cache: true,
        ..Default::default()
    });
    reply(Response::RequestHeaders(HeadersResponse { response }))
}

pub(super) fn with_metadata(step: Step, kind: Kind) -> Step {
    let one = |key: &str, kind| Struct { fields: [(key.to_owned(), Value { kind: Some(kind) })].into() };
    let Reply(mut message) = step else { panic!("not a reply") };
    message.dynamic_metadata = Some(one("envoy.lb", Kind::StructValue(one(message::DESTINATION, kind))));
    Reply(message)
}

pub(super) fn text(text: &str) -> Kind {
    Kind::StringValue(text.into())
}

pub(super) fn no_pick() -> Step {
    reply(Response::RequestHeaders(HeadersResponse::default()))
}

pub(super) fn body(mutation: Mutation) -> Step {
    let body_mutation = mutated(mutation);
    reply(Response::RequestBody(BodyResponse {
        response: Some(CommonResponse { body_mutation, ..Default::default() }),
    }))
}

pub(super) fn streamed(text: &'static str, end_of_stream: bool) -> Step {
    body(piece(text, end_of_stream))
}

pub(super) fn kept() -> Step {
    reply(Response::RequestBody(BodyResponse::default()))
}

pub(super) fn immediate(code: i32) -> Step {
    let status = Some(HttpStatus { code });
    reply(Response::ImmediateResponse(ImmediateResponse { status, body: "no".into(), ..Default::default() }))
}

/// Field 11 of ProcessingResponse, which holds a message.
pub(super) fn unknown() -> Step {
    Reply(Box::new(ProcessingResponse::decode(&[0x5a, 0][..]).unwrap()))
}

/// Messages without a reply that tell something else: fields 8, 9, 10, 12, 15 and 16 of ProcessingResponse.
pub(super) fn notices() -> [Step; 6] {
    let fields: [&[u8]; 6] = [&[0x42, 0], &[0x4a, 2, 0x18, 1], &[0x52, 2, 8, 1], &[0x60, 1], &[0x78, 1], &[0x80, 1, 1]];
    fields.map(|field| Reply(Box::new(ProcessingResponse::decode(field).unwrap())))
}

pub(super) fn trailers() -> Step {
    reply(Response::RequestTrailers(TrailersResponse::default()))
}

/// A reply to the head of the request that picks `list`, and after which none to the body comes.
pub(super) fn last_at_head(list: &str, mutation: Option<BodyMutation>) -> Step {
    reply(Response::RequestHeaders(HeadersResponse { response: Some(last(&[(message::DESTINATION, list)], mutation)) }))
}

pub(super) fn replace_at_head(list: &str, whole: &'static str) -> Step {
    last_at_head(list, mutated(Mutation::Body(whole.into())))
}

/// A reply to the head of the response, after which none to the body comes.
pub(super) fn last_at_response(headers: &[(&str, &str)], mutation: Option<BodyMutation>) -> Step {
    reply(Response::ResponseHeaders(HeadersResponse { response: Some(last(headers, mutation)) }))
}

fn last(headers: &[(&str, &str)], body_mutation: Option<BodyMutation>) -> CommonResponse {
    let status = ResponseStatus::ContinueAndReplace.into();
    CommonResponse { status, header_mutation: mutation(headers), body_mutation, ..Default::default() }
}

pub(super) fn mutated(mutation: Mutation) -> Option<BodyMutation> {
    Some(BodyMutation { mutation: Some(mutation) })
}

pub(super) fn piece(piece: &'static str, end_of_stream: bool) -> Mutation {
    Mutation::StreamedResponse(StreamedBodyResponse { body: piece.into(), end_of_stream })
}

/// Body mutations that change nothing.
pub(super) fn unchanged() -> [Option<BodyMutation>; 3] {
    [None, Some(BodyMutation::default()), mutated(Mutation::ClearBody(false))]
}

pub(super) fn request() -> http::request::Parts {
    let request = http::Request::post("/v1/completions?x=1").header("Host", "llm.example").header("X-Id", "7");
    request.body(()).unwrap().into_parts().0
}

pub(super) fn exchange(has_body: bool, subset: Option<&[SocketAddr]>) -> Exchange {
    let header = HeaderName::from_static(message::DESTINATION);
    let limits = ExchangeLimits { replaced_body: 10, memory: Budget::unlimited(), epp: EppLimits::default() };
    Exchange::new(header, &request(), has_body, subset, limits)
}

pub(super) fn step(exchange: &mut Exchange, step: Step) {
    match step {
        Piece => exchange.request_body("piece".into(), false),
        End => exchange.request_body("end".into(), true),
        Reply(reply) => exchange.receive(*reply),
        Closed => exchange.closed(),
        Failed => exchange.failed(PickError::Reset { message: String::new(), answered: exchange.answered() }),
        Deadline => exchange.deadline(),
    }
}

/// All events in short form (`a:1,b:2 original`, `a:1 replaced xyz`, `immediate 429`, `error closed_without_pick`), and the
/// number of the step that caused the last one.
pub(super) fn run(exchange: &mut Exchange, steps: Vec<Step>) -> (Vec<String>, usize) {
    let mut seen = Vec::new();
    let mut at = 0;
    for (index, next) in steps.into_iter().enumerate() {
        step(exchange, next);
        while let Some(event) = exchange.next_event() {
            at = index + 1;
            seen.push(match event {
                Err(error) => format!("error {}", error.reason()),
                Ok(Event::ResponseHead(mutation)) => format!("response head {}", mutation.set_headers.len()),
                Ok(Event::Excessive) => "excessive".to_owned(),
                Ok(Event::ResponseDeclined) => "declined".to_owned(),
                Ok(Event::ResponseTrailers(_)) => "trailers".to_owned(),
                Ok(Event::ResponseBody(answer)) => format!("{answer:?}"),
                Ok(Event::Outcome(Outcome::Immediate(reply))) => format!("immediate {}", reply.status.as_u16()),
                Ok(Event::Outcome(Outcome::Picked(decision))) => {
                    let endpoints: Vec<_> = decision.endpoints.iter().map(ToString::to_string).collect();
                    let body = match decision.body {
                        Body::Original => "original".to_owned(),
                        Body::DigestOnly(_) => "digest only".to_owned(),
                        Body::Renamed(renamed) => format!("renamed to {}", renamed.picker),
                        Body::Replaced(pieces) => format!("replaced {}", String::from_utf8_lossy(&pieces.concat())),
                    };
                    format!("{} {body}", endpoints.join(","))
                }
            });
        }
    }
    (seen, at)
}
