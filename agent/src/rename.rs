//! Gives an answer the model's name that the client asked for, where the picker sent the request under another one.
//!
//! Replaces `model` at the top level of a JSON document, and in a top-level `message` (Anthropic's events) or `response` (Responses
//! events), if it is a string with the picker's name. Everything else passes byte for byte. In an event stream each event's data is
//! a document. Takes pieces of any size; between two of them it keeps at most one string as long as the name.
//!
//! The documents are not validated: text that is not JSON passes unchanged.

mod json;
mod lines;

use bytes::{Bytes, BytesMut};
use http::HeaderMap;

use self::{
    json::JsonDocument,
    lines::{Lines, Part},
};
use crate::{
    bbr::{Model, ModelScanner},
    http::media::{EVENTS, is_coded, is_json, media_type},
};

/// The answers that can be read, by their Content-Type.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum BodyFormat {
    /// JSON documents: one, or one in each line.
    Documents,
    /// `text/event-stream`.
    Events,
}

impl BodyFormat {
    /// `None` for other types, and under a content coding.
    pub fn of(headers: &HeaderMap) -> Option<Self> {
        match media_type(headers).as_str() {
            _ if is_coded(headers) => None,
            EVENTS => Some(Self::Events),
            "application/x-ndjson" => Some(Self::Documents),
            other => is_json(other).then_some(Self::Documents),
        }
    }
}

/// The two names of one request's model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ModelNames {
    pub client: String,
    pub picker: String,
}

/// The top-level `model` of a JSON body that arrives in pieces, if it is a string.
#[derive(Debug, Default)]
pub struct ModelOf {
    scanner: ModelScanner,
    begun: bool,
    /// The body is not JSON.
    ended: bool,
}

impl ModelOf {
    /// Reads the next piece. Returns false if the rest does not matter.
    pub fn feed(&mut self, piece: &[u8]) -> bool {
        // A byte order mark may precede the document.
        let piece = if self.begun { piece } else { piece.strip_prefix("\u{feff}".as_bytes()).unwrap_or(piece) };
        self.begun |= !piece.is_empty();
        self.ended = self.ended || self.scanner.feed(piece).is_err();
        !self.ended && *self.scanner.model() == Model::NotYet
    }

    pub fn name(&self) -> Option<&str> {
        match self.scanner.model() {
            Model::Found(name) if !name.is_empty() => Some(name),
            _ => None,
        }
    }
}

#[derive(Debug)]
pub struct Rename {
    document: JsonDocument,
    /// For event streams.
    lines: Option<Lines>,
}

impl Rename {
    pub fn new(names: &ModelNames, kind: BodyFormat) -> Self {
        Self { document: JsonDocument::new(names), lines: (kind == BodyFormat::Events).then(Lines::default) }
    }

    /// Takes the next bytes of the body and returns what can be sent.
    pub fn feed(&mut self, body: &[u8]) -> Bytes {
        let mut out = BytesMut::with_capacity(body.len() + 64);
        let Self { document, lines } = self;
        match lines {
            None => document.feed(body, &mut out),
            Some(lines) => lines.split(body, |part, bytes| match part {
                Part::Data => document.feed(bytes, &mut out),
                // Line breaks between the data lines of an event belong to the data.
                Part::Other => out.extend_from_slice(bytes),
                Part::LineEnd => document.feed(bytes, &mut out),
                Part::EventEnd => {
                    document.reset(&mut out);
                    out.extend_from_slice(bytes);
                }
            }),
        }
        out.freeze()
    }

    /// Ends the body; returns what was kept.
    pub fn end(&mut self) -> Bytes {
        let mut out = BytesMut::new();
        self.document.reset(&mut out);
        out.freeze()
    }
}

#[cfg(test)]
mod tests {
    use http::header;
    use proptest::prelude::*;

    use super::*;

    const OPENAI: &str = "data: {\"id\":\"1\",\"model\":\"inner\",\"choices\":[{\"delta\":{\"content\":\"\\\"model\\\":\\\"inner\\\"\"}}]}\n\n\
         data: {\"id\":\"1\", \"model\" : \"inner\" ,\"choices\":[]}\r\n\r\ndata: [DONE]\n\n";
    const OPENAI_RENAMED: &str = "data: {\"id\":\"1\",\"model\":\"my-alias\",\"choices\":[{\"delta\":{\"content\":\"\\\"model\\\":\\\"inner\\\"\"}}]}\n\n\
         data: {\"id\":\"1\", \"model\" : \"my-alias\" ,\"choices\":[]}\r\n\r\ndata: [DONE]\n\n";

    fn names() -> ModelNames {
        ModelNames { client: "my-alias".to_owned(), picker: "inner".to_owned() }
    }

    /// The body after renaming; the same for every cut into two, and byte by byte.
    fn renamed(kind: BodyFormat, body: &str) -> String {
        let whole = in_pieces(kind, [body.as_bytes()]);
        for cut in 0..=body.len() {
            let (one, two) = body.as_bytes().split_at(cut);
            assert_eq!(in_pieces(kind, [one, two]), whole, "cut at {cut}");
        }
        assert_eq!(in_pieces(kind, body.as_bytes().chunks(1)), whole, "byte by byte");
        whole
    }

    fn in_pieces<'p>(kind: BodyFormat, pieces: impl IntoIterator<Item = &'p [u8]>) -> String {
        let mut rename = Rename::new(&names(), kind);
        let mut out: Vec<u8> = pieces.into_iter().flat_map(|piece| rename.feed(piece)).collect();
        out.extend(rename.end());
        String::from_utf8(out).expect("text")
    }

    #[test]
    fn model_of_a_document_is_renamed_wherever_it_is_cut() {
        for (body, expected) in [
            (r#"{"model":"inner"}"#, r#"{"model":"my-alias"}"#),
            (
                r#" { "a" : [1,{"model":"inner"}], "model" : "inner" } "#,
                r#" { "a" : [1,{"model":"inner"}], "model" : "my-alias" } "#,
            ),
            (
                r#"{"type":"message","model":"inner","content":[]}"#,
                r#"{"type":"message","model":"my-alias","content":[]}"#,
            ),
            (r#"{"message":{"model":"inner"}}"#, r#"{"message":{"model":"my-alias"}}"#),
            (r#"{"response":{"x":{},"model":"inner"}}"#, r#"{"response":{"x":{},"model":"my-alias"}}"#),
            (r#"{"mo\u0064el":"inn\u0065r"}"#, r#"{"mo\u0064el":"my-alias"}"#),
            ("{\"model\":\"inner\"}\n{\"model\":\"inner\"}\n", "{\"model\":\"my-alias\"}\n{\"model\":\"my-alias\"}\n"),
        ] {
            assert_eq!(renamed(BodyFormat::Documents, body), expected);
        }
    }

    #[test]
    fn other_text_passes_unchanged() {
        for body in [
            r#"{"model":"inner2"}"#,
            r#"{"model":"inne"}"#,
            r#"{"model":["inner"]}"#,
            r#"{"model":{"model":"inner"}}"#,
            r#"{"other":{"model":"inner"}}"#,
            r#"{"message":[{"model":"inner"}]}"#,
            r#"{"message":{"message":{"model":"inner"}}}"#,
            r#"[{"model":"inner"}]"#,
            r#"{"content":"\"model\":\"inner\"","x":"model","y":"inner"}"#,
            r#"{"models":"inner","Model":"inner"}"#,
            r#"["model","inner"]"#,
            r#""model":"inner""#,
            r#"{"model":"inner"#,
            r#"{"model":"#,
            r#"{"model":"a string that is much longer than the name that the picker gave to the model"}"#,
            "}}]]\"\\",
            "",
        ] {
            assert_eq!(renamed(BodyFormat::Documents, body), body);
        }
    }

    #[test]
    fn model_of_each_event_is_renamed_wherever_it_is_cut() {
        assert_eq!(renamed(BodyFormat::Events, OPENAI), OPENAI_RENAMED);
        for (body, expected) in [
            // A byte order mark, carriage returns, several data lines, no space, comments and other fields.
            ("\u{feff}data:{\"model\":\"inner\"}\r\r", "\u{feff}data:{\"model\":\"my-alias\"}\r\r"),
            ("data: {\ndata: \"model\":\ndata: \"inner\"}\n\n", "data: {\ndata: \"model\":\ndata: \"my-alias\"}\n\n"),
            (
                ": {\"model\":\"inner\"}\nevent: message_start\nid: 7\ndata: {\"message\":{\"model\":\"inner\"}}\n\n",
                ": {\"model\":\"inner\"}\nevent: message_start\nid: 7\ndata: {\"message\":{\"model\":\"my-alias\"}}\n\n",
            ),
            // The data of one event does not reach the next.
            (
                "data: {\"message\":{\n\ndata: {\"model\":\"inner\"}\n\n",
                "data: {\"message\":{\n\ndata: {\"model\":\"my-alias\"}\n\n",
            ),
            ("data: {\"model\":\"in\ndata: ner\"}\n\n", "data: {\"model\":\"in\ndata: ner\"}\n\n"),
            ("data: {\"model\":\"inn\n\ndata: er\"}\n\n", "data: {\"model\":\"inn\n\ndata: er\"}\n\n"),
            ("database: {\"model\":\"inner\"}\n\n", "database: {\"model\":\"inner\"}\n\n"),
            ("data\n\ndata: {\"model\":\"inner\"}", "data\n\ndata: {\"model\":\"my-alias\"}"),
        ] {
            assert_eq!(renamed(BodyFormat::Events, body), expected);
        }
    }

    #[test]
    fn name_is_escaped_as_json() {
        let names = ModelNames { client: "a\"b\\c\u{1}".to_owned(), picker: "inner".to_owned() };
        let out = Rename::new(&names, BodyFormat::Documents).feed(br#"{"model":"inner"}"#);
        assert_eq!(serde_json::from_slice::<serde_json::Value>(&out).expect("JSON")["model"], names.client);
    }

    #[test]
    fn long_string_is_not_kept() {
        let mut rename = Rename::new(&names(), BodyFormat::Documents);
        let begin = rename.feed(b"{\"model\":\"");
        assert_eq!(&begin[..], b"{\"model\":");
        let long = [b'x'; 64];
        assert_eq!(rename.feed(&long).len(), long.len() + 1);
        assert_eq!(&rename.feed(b"\"}")[..], b"\"}");
    }

    #[test]
    fn kind_is_known_by_the_content_type() {
        let kind = |content: &str, coding: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(header::CONTENT_TYPE, content.parse().expect("a value"));
            if !coding.is_empty() {
                headers.insert(header::CONTENT_ENCODING, coding.parse().expect("a value"));
            }
            BodyFormat::of(&headers)
        };
        assert_eq!(kind("Text/Event-Stream; charset=utf-8", ""), Some(BodyFormat::Events));
        assert_eq!(kind("application/json", "identity"), Some(BodyFormat::Documents));
        assert_eq!(kind("application/problem+json", ""), Some(BodyFormat::Documents));
        assert_eq!(kind("application/json", "Identity, "), Some(BodyFormat::Documents));
        assert_eq!(kind("application/json", "gzip"), None);
        assert_eq!(kind("application/json", "unheard-of"), None);
        assert_eq!(kind("text/plain", ""), None);
    }

    /// JSON in which the names occur as keys and values at several depths.
    fn value() -> impl Strategy<Value = serde_json::Value> {
        let word = prop::sample::select(vec!["model", "message", "response", "inner", "inner\"", "x\\", "é"]);
        let leaf = prop_oneof![
            word.clone().prop_map(|word| serde_json::json!(word)),
            any::<i32>().prop_map(|number| serde_json::json!(number)),
            Just(serde_json::Value::Null),
        ];
        leaf.prop_recursive(4, 40, 6, move |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..5).prop_map(serde_json::Value::Array),
                prop::collection::vec((word.clone(), inner), 0..5).prop_map(|members| {
                    members
                        .into_iter()
                        .map(|(key, value)| (key.to_owned(), value))
                        .collect::<serde_json::Map<_, _>>()
                        .into()
                }),
            ]
        })
    }

    fn set(value: &mut serde_json::Value) {
        if let Some(model) = value.get_mut("model").filter(|model| *model == "inner") {
            *model = "my-alias".into();
        }
    }

    proptest! {
        #[test]
        fn renaming_is_what_a_json_library_does(value in value(), pretty: bool, cut in 1_usize..9) {
            let text = if pretty { serde_json::to_string_pretty(&value) } else { serde_json::to_string(&value) }.expect("JSON");
            let mut expected = value;
            if expected.is_object() {
                set(&mut expected);
                for of in ["message", "response"] {
                    if let Some(nested) = expected.get_mut(of).filter(|nested| nested.is_object()) {
                        set(nested);
                    }
                }
            }
            let renamed = in_pieces(BodyFormat::Documents, text.as_bytes().chunks(cut));
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&renamed).expect("JSON"), expected.clone());
            // As one event, with each line of the text in a data line.
            let event: String = text.lines().map(|line| format!("data: {line}\n")).collect();
            let renamed = in_pieces(BodyFormat::Events, format!("{event}\n").as_bytes().chunks(cut));
            let data: String = renamed.lines().filter_map(|line| line.strip_prefix("data: ")).collect();
            prop_assert_eq!(serde_json::from_str::<serde_json::Value>(&data).expect("JSON"), expected);
        }
    }
}
