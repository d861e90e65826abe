//! Compares two media types by a client's Accept header (RFC 9110 §12.5.1).

use std::cmp::Ordering;

use http::{HeaderMap, header};

use super::head::joined;

/// Greater if the client prefers `one` over `other` (media types such as `text/plain`); Equal without Accept.
pub fn compare(headers: &HeaderMap, one: &str, other: &str) -> Ordering {
    let list = joined(headers, &header::ACCEPT);
    let list = String::from_utf8_lossy(&list);
    quality(&list, one).total_cmp(&quality(&list, other))
}

/// The quality that the most specific matching range gives a media type. Malformed ranges are skipped.
fn quality(list: &str, media: &str) -> f32 {
    let kind = media.split('/').next().unwrap_or_default();
    let mut best = (0, 0.0);
    for range in list.split(',') {
        let mut parts = range.split(';').map(str::trim);
        let range = parts.next().unwrap_or_default();
        let specific = match range.split_once('/') {
            Some(("*", "*")) => 1,
            Some((range_kind, "*")) if range_kind.eq_ignore_ascii_case(kind) => 2,
            _ if range.eq_ignore_ascii_case(media) => 3,
            _ => continue,
        };
        let weight = parts.find_map(|parameter| parameter.strip_prefix("q=").or(parameter.strip_prefix("Q=")));
        let weight = weight.map_or(1.0, |weight| weight.trim().parse().unwrap_or(0.0));
        if specific > best.0 {
            best = (specific, weight);
        }
    }
    best.1
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::*;

    #[test]
    fn accept_chooses_text_or_json() {
        let table = [
            ("", Ordering::Equal),
            ("*/*", Ordering::Equal),
            ("text/event-stream", Ordering::Equal),
            ("text/plain", Ordering::Greater),
            ("Text/Plain; charset=utf-8", Ordering::Greater),
            ("text/*", Ordering::Greater),
            ("text/plain, */*;q=0.1", Ordering::Greater),
            ("application/json;q=0.5, text/plain;q=0.9", Ordering::Greater),
            ("application/json;q=0, */*", Ordering::Greater),
            ("text/plain, application/json", Ordering::Equal),
            ("application/json", Ordering::Less),
            ("application/*, text/plain;q=0.9", Ordering::Less),
            ("*/*, text/plain;q=0.2", Ordering::Less),
            ("text/html, application/json", Ordering::Less),
            ("text/plain;q=nonsense, */*;q=0.1", Ordering::Less),
            ("text, /, ;q=1, ,", Ordering::Equal),
        ];
        for (accept, expected) in table {
            let mut headers = HeaderMap::new();
            if !accept.is_empty() {
                headers.insert(header::ACCEPT, HeaderValue::from_static(accept));
            }
            assert_eq!(compare(&headers, "text/plain", "application/json"), expected, "{accept}");
        }
        let mut lines = HeaderMap::new();
        lines.append(header::ACCEPT, HeaderValue::from_static("application/json;q=0.1"));
        lines.append(header::ACCEPT, HeaderValue::from_static("text/plain;q=0.2"));
        assert_eq!(compare(&lines, "text/plain", "application/json"), Ordering::Greater);
    }
}
