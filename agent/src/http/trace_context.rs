//! W3C Trace Context (level 1): reads `traceparent` and `tracestate` from a client and writes them for the next hop.
//!
//! Pure functions. A valid context is continued; an invalid one is removed and a new trace begins (§4.3). Parsing is
//! our own because the SDK accepts fields that are too short.

use std::fmt;

use http::{HeaderMap, HeaderName, HeaderValue};
use opentelemetry::trace::TraceState;

use super::head::joined;

/// The position in the trace (§3.2).
pub const TRACEPARENT: HeaderName = HeaderName::from_static("traceparent");
/// What tracing systems add to it (§3.3).
pub const TRACESTATE: HeaderName = HeaderName::from_static("tracestate");
/// Maximum length of a `tracestate`, in bytes; each span keeps a copy. The specification asks for at least 512.
const LONGEST: usize = 4096;

/// The content of a `traceparent`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct TraceParent {
    /// Never zero.
    pub trace_id: [u8; 16],
    /// Never zero.
    pub span_id: [u8; 8],
    /// The caller records its span (§3.2.2.5.1).
    pub sampled: bool,
}

impl TraceParent {
    /// Parses `version-traceid-parentid-flags` in lower-case hexadecimal (§3.2). Later versions may append a dash and
    /// more fields; unknown flags are ignored.
    pub fn parse(value: &[u8]) -> Option<Self> {
        let (fields, more) = value.split_at_checked(55)?;
        let version = octets::<1>(&fields[..2])?[0];
        match (version, more) {
            (0xff, _) => return None,
            (_, []) => {}
            (0, _) => return None,
            (_, more) if more[0] == b'-' => {}
            _ => return None,
        }
        if [fields[2], fields[35], fields[52]] != [b'-'; 3] {
            return None;
        }
        let (trace_id, span_id) = (octets(&fields[3..35])?, octets(&fields[36..52])?);
        let flags = octets::<1>(&fields[53..])?[0];
        (trace_id != [0; 16] && span_id != [0; 8]).then_some(Self { trace_id, span_id, sampled: flags & 1 == 1 })
    }
}

/// Formats the header in version 00.
impl fmt::Display for TraceParent {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (trace, span) = (u128::from_be_bytes(self.trace_id), u64::from_be_bytes(self.span_id));
        write!(f, "00-{trace:032x}-{span:016x}-{:02x}", u8::from(self.sampled))
    }
}

fn octets<const N: usize>(digits: &[u8]) -> Option<[u8; N]> {
    let value = |digit: u8| match digit {
        b'0'..=b'9' => Some(digit - b'0'),
        b'a'..=b'f' => Some(digit - b'a' + 10),
        _ => None,
    };
    let mut octets = [0; N];
    for (octet, pair) in octets.iter_mut().zip(digits.chunks_exact(2)) {
        *octet = value(pair[0])? << 4 | value(pair[1])?;
    }
    Some(octets)
}

/// Returns the context that a client sent. Removes both headers unless there is exactly one valid `traceparent`, and an
/// invalid `tracestate` alone.
pub fn received(headers: &mut HeaderMap) -> Option<(TraceParent, TraceState)> {
    let mut parents = headers.get_all(TRACEPARENT).iter();
    let parent = match (parents.next(), parents.next()) {
        (Some(one), None) => TraceParent::parse(one.as_bytes()),
        _ => None,
    };
    if parent.is_none() {
        headers.remove(TRACEPARENT);
        headers.remove(TRACESTATE);
    }
    let parent = parent?;
    if !headers.contains_key(TRACESTATE) {
        return Some((parent, TraceState::NONE));
    }
    // Several lines form one list (§3.3.1), which may be empty.
    let state = String::from_utf8(joined(headers, &TRACESTATE))
        .ok()
        .filter(|list| list.len() <= LONGEST)
        .and_then(|list| list.parse::<TraceState>().ok());
    if state.is_none() {
        headers.remove(TRACESTATE);
    }
    Some((parent, state.unwrap_or(TraceState::NONE)))
}

/// Sets `context` as the parent of the next hop's spans.
pub fn send(headers: &mut HeaderMap, context: TraceParent) {
    if let Ok(value) = HeaderValue::from_str(&context.to_string()) {
        headers.insert(TRACEPARENT, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TRACE: &str = "0af7651916cd43dd8448eb211c80319c";
    const SPAN: &str = "b7ad6b7169203331";

    #[test]
    fn traceparent_is_parsed_strictly() {
        let good = |text: &str| TraceParent::parse(text.as_bytes()).map(|parent| (parent.to_string(), parent.sampled));
        let table = [
            (format!("00-{TRACE}-{SPAN}-01"), true),
            (format!("00-{TRACE}-{SPAN}-00"), false),
            // Flags that a later level defines.
            (format!("00-{TRACE}-{SPAN}-03"), true),
            (format!("00-{TRACE}-{SPAN}-fe"), false),
            // Later versions, with and without further fields.
            (format!("01-{TRACE}-{SPAN}-01"), true),
            (format!("cc-{TRACE}-{SPAN}-01-what-the-future-will-be-like"), true),
            (format!("fe-{TRACE}-{SPAN}-01-"), true),
        ];
        for (text, sampled) in table {
            let sent = format!("00-{TRACE}-{SPAN}-0{}", u8::from(sampled));
            assert_eq!(good(&text), Some((sent, sampled)), "{text}");
        }
        let bad = [
            String::new(),
            format!("ff-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}-01-"),
            format!("00-{TRACE}-{SPAN}-01-extra"),
            format!("00-{TRACE}-{SPAN}-01."),
            format!("01-{TRACE}-{SPAN}-01."),
            format!("00-{TRACE}-{SPAN}"),
            format!("00-{TRACE}-{SPAN}-"),
            format!("00-{TRACE}-{SPAN}-1"),
            format!("00-{TRACE}-{SPAN}-0x"),
            format!("0-{TRACE}-{SPAN}-01"),
            format!("0x-{TRACE}-{SPAN}-01"),
            format!("00-{TRACE}-{SPAN}_01"),
            format!("00-{}-{SPAN}-01", "0".repeat(32)),
            format!("00-{TRACE}-{}-01", "0".repeat(16)),
            format!("00-{}-{SPAN}-01", TRACE.to_uppercase()),
            format!("00-{TRACE}-{}-01", SPAN.to_uppercase()),
            format!("00-{}-{SPAN}-01", &TRACE[1..]),
            format!("00-{TRACE}0-{SPAN}-01"),
            format!("00-{TRACE}-{}-01", &SPAN[1..]),
            format!("00-+{}-{SPAN}-01", &TRACE[1..]),
            format!("{TRACE}-{SPAN}-01"),
        ];
        for text in bad {
            assert_eq!(good(&text), None, "{text}");
        }
    }

    fn left(fields: &[(&'static str, &str)]) -> (bool, Vec<String>, Vec<String>) {
        let mut headers = HeaderMap::new();
        for (name, value) in fields {
            headers.append(*name, HeaderValue::from_bytes(value.as_bytes()).unwrap());
        }
        let found = received(&mut headers).is_some();
        let all = |name| headers.get_all(name).iter().map(|v| v.to_str().unwrap().to_owned()).collect();
        (found, all(TRACEPARENT), all(TRACESTATE))
    }

    #[test]
    fn malformed_trace_context_is_removed() {
        let parent = format!("00-{TRACE}-{SPAN}-01");
        let parent = parent.as_str();
        let (p, s) = ("traceparent", "tracestate");
        let one = || vec![parent.to_owned()];
        type Left = (bool, Vec<String>, Vec<String>);
        let table: [(&[(&'static str, &str)], Left); 9] = [
            (&[(p, parent)], (true, one(), vec![])),
            (&[(p, parent), (s, "a=1,b@c=2")], (true, one(), vec!["a=1,b@c=2".into()])),
            (&[(p, parent), (s, "a=1"), (s, "b=2")], (true, one(), vec!["a=1".into(), "b=2".into()])),
            (&[(p, parent), (s, "")], (true, one(), vec![String::new()])),
            (&[(p, parent), (s, "A=1")], (true, one(), vec![])),
            (&[(p, parent), (s, "a=1"), (s, "nonsense")], (true, one(), vec![])),
            (&[(p, "00-xyz"), (s, "a=1")], (false, vec![], vec![])),
            (&[(p, parent), (p, parent), (s, "a=1")], (false, vec![], vec![])),
            (&[(s, "a=1")], (false, vec![], vec![])),
        ];
        for (fields, expected) in table {
            assert_eq!(left(fields), expected, "{fields:?}");
        }
    }
}
