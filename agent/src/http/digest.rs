//! Removes headers that an EPP's replacement body makes wrong: digests of the client's body (RFC 9530, RFC 3230, RFC
//! 1864), and its content coding if the new body is not coded.

use bytes::Bytes;
use http::{HeaderMap, HeaderName, HeaderValue, header};

use super::coding::{CodingError, Codings, Decoder};
use crate::budget::Budget;

const DIGESTS: [HeaderName; 4] = [
    HeaderName::from_static("content-digest"),
    HeaderName::from_static("content-md5"),
    HeaderName::from_static("digest"),
    HeaderName::from_static("repr-digest"),
];
/// Bytes of the new body that are inspected to find out whether it is coded.
const LOOK: u64 = 64 * 1024;
const TEXT: usize = 512;

/// Removes from `headers` what describes the client's body; `client` is what the client sent. Headers that the EPP
/// changed stay.
pub fn remove_stale(headers: &mut HeaderMap, client: &HeaderMap, body: &[Bytes]) {
    let is_clients = |headers: &HeaderMap, name: &HeaderName| headers.get_all(name) == client.get_all(name);
    for name in DIGESTS.iter().filter(|name| is_clients(headers, name)).collect::<Vec<_>>() {
        headers.remove(name);
    }
    if is_clients(headers, &header::CONTENT_ENCODING)
        && let Codings::Known(codings) = Codings::of(headers)
        && !codings.is_empty()
        && (is_text(body) || !is_coded(Decoder::new(&codings, u64::MAX, &Budget::unlimited()), body))
    {
        headers.remove(header::CONTENT_ENCODING);
    }
}

/// Removes the digests of a body.
pub fn remove(headers: &mut HeaderMap) {
    DIGESTS.iter().for_each(|name| drop(headers.remove(name)));
}

/// Removes from a response's `headers` what does not fit a body that the agent has changed, and weakens its ETag (RFC 9110 §8.8.1).
pub fn remove_from_changed(headers: &mut HeaderMap) {
    remove(headers);
    if let Some(tag) = headers.get(header::ETAG).filter(|tag| !tag.as_bytes().starts_with(b"W/"))
        && let Ok(weak) = HeaderValue::from_bytes(&[b"W/", tag.as_bytes()].concat())
    {
        headers.insert(header::ETAG, weak);
    }
}

/// Whether the body begins as text. Some decoders would accept text as coded data for a while.
fn is_text(body: &[Bytes]) -> bool {
    let begin: Vec<u8> = body.iter().flatten().copied().take(TEXT).collect();
    let text = match std::str::from_utf8(&begin) {
        Ok(text) => text,
        Err(error) if error.error_len().is_none() => {
            std::str::from_utf8(&begin[..error.valid_up_to()]).unwrap_or_default()
        }
        Err(_) => return false,
    };
    text.chars().all(|character| !character.is_control() || matches!(character, '\t' | '\n' | '\r'))
}

fn is_coded(mut decoder: Decoder, body: &[Bytes]) -> bool {
    let (mut seen, mut decoded) = (0, 0);
    let mut pieces = body.iter();
    while seen < LOOK && decoded < LOOK {
        let ended = match pieces.next() {
            Some(piece) => {
                let part = piece.len().min(LOOK as usize);
                decoder.push(&piece[..part]);
                seen += part as u64;
                // The rest is not pushed.
                if part < piece.len() {
                    seen = LOOK;
                }
                false
            }
            None => {
                decoder.end();
                true
            }
        };
        loop {
            match decoder.step() {
                Ok(Some(piece)) if decoded < LOOK => decoded += piece.len() as u64,
                Ok(Some(_)) => return true,
                Ok(None) => break,
                Err(CodingError::Corrupt { .. } | CodingError::Truncated { .. }) => return false,
                Err(_) => return true,
            }
        }
        if ended {
            return true;
        }
    }
    true
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    const GZIPPED: &[u8] = include_bytes!("coding/testdata/body.gz");
    const BROTLI: &[u8] = include_bytes!("coding/testdata/body.br");

    fn headers(fields: &[(&'static str, &'static str)]) -> HeaderMap {
        fields.iter().map(|&(name, value)| (HeaderName::from_static(name), HeaderValue::from_static(value))).collect()
    }

    #[test]
    fn digests_of_the_client_are_removed_and_those_of_the_epp_kept() {
        let client = headers(&[
            ("content-md5", "Q2hlY2sgSW50ZWdyaXR5IQ=="),
            ("digest", "sha-256=X48E9qOokqqrvdts8nOJRJN3OWDUoyWxBf7kbu9DBPE="),
            ("content-digest", "sha-256=:d435Qo+nKZ+gLcUHn7GQtQ72hiBVAgqoLsZnZPiTGPk=:"),
            ("repr-digest", "sha-256=:d435Qo+nKZ+gLcUHn7GQtQ72hiBVAgqoLsZnZPiTGPk=:"),
            ("x-other", "stays"),
        ]);
        let mut now = client.clone();
        now.insert("digest", HeaderValue::from_static("sha-256=of-the-other"));
        remove_stale(&mut now, &client, &[Bytes::from_static(b"{}")]);
        assert_eq!(now, headers(&[("digest", "sha-256=of-the-other"), ("x-other", "stays")]));
    }

    #[test]
    fn content_encoding_is_removed_if_the_new_body_is_not_coded() {
        let plain = format!("{{\"model\":\"m\",\"prompt\":\"{}\"}}", "x".repeat(300_000));
        let (plain, gzip, br) = (Bytes::from(plain), Bytes::from_static(GZIPPED), Bytes::from_static(BROTLI));
        let rows: [(&'static str, &Bytes, bool); 12] = [
            ("gzip", &plain, false),
            ("gzip", &gzip, true),
            ("gzip", &br, false),
            ("br", &plain, false),
            ("br", &br, true),
            ("zstd", &plain, false),
            ("deflate", &plain, false),
            ("gzip, br", &plain, false),
            ("identity", &plain, true),
            // The agent cannot decode this coding.
            ("compress", &plain, true),
            ("gzip", &Bytes::new(), false),
            ("x-gzip", &gzip, true),
        ];
        for (coding, body, stays) in rows {
            let client = headers(&[("content-encoding", coding)]);
            for piece in [1000, 1 << 20] {
                let pieces: Vec<Bytes> = body.chunks(piece).map(Bytes::copy_from_slice).collect();
                let mut now = client.clone();
                remove_stale(&mut now, &client, &pieces);
                assert_eq!(now.contains_key("content-encoding"), stays, "{coding}, {} bytes", body.len());
            }
        }
        // A coding set by the EPP is trusted.
        let client = headers(&[("content-encoding", "gzip")]);
        let mut now = headers(&[("content-encoding", "br")]);
        remove_stale(&mut now, &client, &[plain]);
        assert_eq!(now, headers(&[("content-encoding", "br")]));
    }
}
