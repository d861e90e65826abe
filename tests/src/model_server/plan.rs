//! The plan that a test puts into the request header `x-test-plan` as JSON, and the server's report of a received request. A
//! request with a plan is answered by it for any target.

use serde::{Deserialize, Serialize};

use crate::client::Request;
use crate::content::{Alphabet, Checker};

/// One response, byte by byte. Default: 200 with an empty body and `content-length: 0`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Plan {
    pub status: u16,
    /// Sent after the server's own fields.
    pub headers: Vec<(String, String)>,
    /// Status codes of interim heads, each sent in its own write.
    pub interim: Vec<u16>,
    pub framing: Framing,
    /// Bytes of payload.
    pub size: u64,
    /// The payload is the text in `x-test-says` of the request's JSON body, for a target of the completions API.
    pub says: bool,
    pub stream_id: u64,
    pub alphabet: Alphabet,
    /// Added to the size in `content-length`. If it is too large, the body ends with the connection, provided that `after` closes
    /// it.
    pub length_error: i64,
    /// Lengths of the chunks, if chunked.
    pub chunks: Lengths,
    /// Put after the size of every chunk, including the last: `name=value`.
    pub chunk_extension: Option<String>,
    pub trailers: Vec<(String, String)>,
    pub head: HeadWrites,
    /// Lengths of the writes after the head.
    pub writes: Lengths,
    pub pauses: Option<Pauses>,
    /// From the body on, only full segments are sent; with a close, the last bytes and the FIN share one (`TCP_CORK`).
    pub cork: bool,
    pub fault: Option<Fault>,
    pub after: After,
    /// The head switches protocols (101), and this replaces the body.
    pub upgraded: Option<Upgraded>,
    /// The stream that the peer sends after such a head, in the plan's alphabet: received bytes are compared with it, and
    /// [`super::ModelServer::take_upload`] returns the result.
    pub upload: Option<u64>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            status: 200,
            headers: Vec::new(),
            interim: Vec::new(),
            framing: Framing::ContentLength,
            size: 0,
            says: false,
            stream_id: 0,
            alphabet: Alphabet::Binary,
            length_error: 0,
            chunks: Lengths::Fixed(4096),
            chunk_extension: None,
            trailers: Vec::new(),
            head: HeadWrites::default(),
            writes: Lengths::Fixed(64 << 10),
            pauses: None,
            cork: false,
            fault: None,
            after: After::KeepAlive,
            upgraded: None,
            upload: None,
        }
    }
}

impl Plan {
    /// Switches to this protocol.
    #[must_use]
    pub fn switching(protocol: &str, upgraded: Upgraded) -> Self {
        let fields = [("connection", "upgrade"), ("upgrade", protocol)];
        let headers = fields.map(|(name, value)| (name.to_owned(), value.to_owned())).into();
        Self { status: 101, headers, framing: Framing::None, upgraded: Some(upgraded), ..Self::default() }
    }

    /// The header's value.
    #[must_use]
    pub fn header(&self) -> String {
        serde_json::to_string(self).expect("the plan cannot be serialised")
    }

    /// `GET /test/body` with this plan.
    #[must_use]
    pub fn request(&self) -> Request {
        Request::get("/test/body").header("x-test-plan", self.header())
    }

    /// Checks the payload of this plan.
    #[must_use]
    pub fn checker(&self) -> Checker {
        Checker::of(self.alphabet, self.stream_id)
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Framing {
    ContentLength,
    Chunked,
    /// Neither length nor chunks; the close ends the body.
    UntilClose,
    /// No body and no framing header, as for 204 and 304.
    None,
}

/// What a server does on a connection that has switched protocols.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Upgraded {
    /// Echoes received bytes and the close.
    Echo,
    /// Sends the plan's bytes and closes, whatever arrives meanwhile.
    Send,
    /// The same, after the peer has ended its side.
    SendLast,
}

/// A sequence of lengths in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Lengths {
    Fixed(u64),
    /// Each from 1 to `max`.
    Random {
        seed: u64,
        max: u64,
    },
    OneByte,
}

/// Pauses between writes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Pauses {
    pub seed: u64,
    /// After this many writes each.
    pub every: u64,
    /// Each from 0 to this many microseconds.
    pub up_to_us: u64,
}

/// How the head is written.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct HeadWrites {
    /// Bytes of the head that get their own write.
    pub split_at: Option<usize>,
    /// Between the two writes of a split head, and between a head and a body in separate writes.
    pub pause_us: u64,
    /// The first bytes of the body share the head's (last) write.
    pub with_body: bool,
}

/// A fault after this many bytes of the body on the wire, chunk-size lines included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Fault {
    pub after: u64,
    pub kind: FaultKind,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum FaultKind {
    /// Sends nothing more and keeps the connection open.
    Stall,
    /// Continues after this many milliseconds.
    StallMs(u64),
    /// Continues once [`super::ModelServer::resume`] or [`crate::Http2Server::resume`] is called; after an upgrade, acts like
    /// [`FaultKind::Stall`].
    UntilTold,
    /// A reset. Bytes that did not fit the peer's window are lost.
    Reset,
    /// A reset once [`super::ModelServer::resume`] or [`crate::Http2Server::resume`] is called; after an upgrade, acts like
    /// [`FaultKind::Stall`].
    ResetWhenTold,
    /// An orderly close.
    Close,
}

/// What happens to the connection afterwards.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum After {
    KeepAlive,
    /// The response says `connection: close`, and the connection closes.
    Close,
    /// The connection closes without announcement.
    SilentClose,
}

/// A request as the server received it; the response to `/test/echo`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Echo {
    pub method: String,
    pub target: String,
    /// In their received order and case.
    pub headers: Vec<(String, String)>,
    /// `none`, `content-length` or `chunked`.
    pub body_framing: String,
    pub body_length: u64,
    /// FNV-1a of the body: see [`crate::content::Fnv`].
    pub body_hash: u64,
    pub trailers: Vec<(String, String)>,
    /// The request's number on its connection, from 1.
    pub count: u64,
}

impl Echo {
    /// The first header of that name.
    #[must_use]
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(n, _)| n.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn plan_with_missing_fields_uses_defaults() {
        let plan: Plan = serde_json::from_str(
            r#"{"framing":"chunked","size":5,"writes":"one_byte","fault":{"after":3,"kind":{"stall_ms":4}}}"#,
        )
        .unwrap();
        let fault = Some(Fault { after: 3, kind: FaultKind::StallMs(4) });
        let expected = Plan { framing: Framing::Chunked, size: 5, writes: Lengths::OneByte, fault, ..Plan::default() };
        assert_eq!(plan, expected);
        assert_eq!(serde_json::from_str::<Plan>(&plan.header()).unwrap(), plan);
        assert!(serde_json::from_str::<Plan>(r#"{"sise":5}"#).is_err());
    }
}
