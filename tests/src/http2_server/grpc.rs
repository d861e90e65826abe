//! gRPC as a proxy sees it: length-prefixed messages, trailers with a status, and Trailers-Only errors. The messages have no
//! meaning; their bytes identify each response.
//!
//! | method | |
//! |---|---|
//! | `/test.Model/Unary` | returns the request's message |
//! | `/test.Model/Stream` | returns as many messages as the first byte of the request's message says |
//! | `/test.Model/Fail` | returns an error status without a message |

use std::time::Duration;

use bytes::{BufMut as _, Bytes, BytesMut};

use super::stream::{Exchange, Stop, map};
use crate::Alphabet;

/// Size of each message of a stream, in bytes.
pub const MESSAGE: usize = 3000;

/// A message with its prefix: uncompressed flag, length, bytes.
#[must_use]
pub fn framed(message: &[u8]) -> Bytes {
    let mut framed = BytesMut::with_capacity(5 + message.len());
    framed.put_u8(0);
    framed.put_u32(u32::try_from(message.len()).expect("the message is too long"));
    framed.put_slice(message);
    framed.freeze()
}

/// Message `number` of a stream, without its prefix.
#[must_use]
pub fn streamed(number: u64) -> Vec<u8> {
    Alphabet::Binary.bytes(number, 0, MESSAGE)
}

fn fields(fields: &[(&str, &str)]) -> Vec<(String, String)> {
    fields.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned())).collect()
}

const KIND: (&str, &str) = ("content-type", "application/grpc");

/// Answers according to the method.
pub(super) async fn answer(exchange: &mut Exchange) -> Result<(), Stop> {
    let ok = fields(&[("grpc-status", "0"), ("x-trace-bin", "AAEC/w"), ("x-twice", "1"), ("x-twice", "2")]);
    let body = Bytes::from(std::mem::take(&mut exchange.body));
    match exchange.echo.target.as_str() {
        "/test.Model/Unary" => {
            let mut out = exchange.head(200, &fields(&[KIND]), false)?;
            exchange.write(&mut out, body, false).await?;
            Ok(out.send_trailers(map(&ok))?)
        }
        "/test.Model/Stream" => {
            let mut out = exchange.head(200, &fields(&[KIND]), false)?;
            for number in 0..u64::from(body.get(5).copied().unwrap_or_default()) {
                exchange.write(&mut out, framed(&streamed(number)), false).await?;
                exchange.pause(Some(&mut out), Duration::from_millis(1)).await?;
            }
            Ok(out.send_trailers(map(&ok))?)
        }
        "/test.Model/Fail" => {
            let failed = fields(&[KIND, ("grpc-status", "5"), ("grpc-message", "no such model: %C3%A4")]);
            exchange.head(200, &failed, true).map(drop)
        }
        _ => {
            let unknown = fields(&[KIND, ("grpc-status", "12"), ("grpc-message", "unknown method")]);
            exchange.head(200, &unknown, true).map(drop)
        }
    }
}
