//! A script made of one function, called once per whole request; its return value is sent.

use penstock_proto::ext_proc::processing_response::Response;
use penstock_proto::ext_proc::{HttpBody, HttpHeaders, ProcessingResponse};

use super::{Answer, Exchange, Script, reply};

type Answers = dyn Fn(&Exchange) -> Vec<ProcessingResponse> + Send + Sync;

/// Leaves the body unchanged, piece by piece, unless the function's messages replace it.
pub struct Answering(Box<Answers>);

impl Answering {
    pub fn new(answer: impl Fn(&Exchange) -> Vec<ProcessingResponse> + Send + Sync + 'static) -> Self {
        Self(Box::new(answer))
    }

    async fn answer(&self, exchange: &mut Exchange, has_body: bool) -> Answer {
        let messages = (self.0)(exchange);
        let replaces = messages.iter().any(|message| matches!(message.response, Some(Response::RequestBody(_))));
        if has_body && !replaces {
            exchange.send(reply::request_body_unchanged()).await?;
        }
        for message in messages {
            exchange.send(message).await?;
        }
        Ok(())
    }
}

#[tonic::async_trait]
impl Script for Answering {
    async fn request_headers(&self, exchange: &mut Exchange, headers: &HttpHeaders) -> Answer {
        if headers.end_of_stream { self.answer(exchange, false).await } else { Ok(()) }
    }

    async fn request_body(&self, exchange: &mut Exchange, body: &HttpBody) -> Answer {
        if body.end_of_stream {
            self.answer(exchange, true).await
        } else {
            exchange.send(reply::request_body_unchanged()).await
        }
    }
}
