//! Bounds text from outside for the log and for spans.

use std::borrow::Cow;

/// Maximum bytes of a request id, a model or a user agent.
pub const NAME: usize = 256;
/// Maximum bytes of a path, an error or a panic message.
pub const PHRASE: usize = 1024;

/// At most `limit` bytes of `text`, cut between characters; `…(+N bytes)` tells how much is missing.
pub fn cut(text: &str, limit: usize) -> Cow<'_, str> {
    if text.len() <= limit {
        return Cow::Borrowed(text);
    }
    let end = (0..=limit).rev().find(|&end| text.is_char_boundary(end)).unwrap_or_default();
    let kept = &text[..end];
    Cow::Owned(format!("{kept}…(+{} bytes)", text.len() - kept.len()))
}

#[cfg(test)]
mod tests {
    use super::cut;

    #[test]
    fn long_text_is_cut_between_characters_with_the_missing_length() {
        assert_eq!(cut("abc", 3), "abc");
        assert_eq!(cut("abcd", 3), "abc…(+1 bytes)");
        assert_eq!(cut("aäöü", 4), "aä…(+4 bytes)");
        assert_eq!(cut("äöü", 1), "…(+6 bytes)");
    }
}
