//! Comments in an event stream while nothing comes (`sse_keepalive`): when the next one is due, and whether it may be sent.

use std::time::Duration;

use bytes::Bytes;
use tokio::time::{Instant, sleep_until};

use crate::http::{
    media,
    response::{BodyKind, ResponseHead},
};

/// A comment with the blank line that ends it.
const COMMENT: &[u8] = b":\n\n";
/// The byte order mark that may begin an event stream, and nothing else.
const MARK: &[u8] = b"\xef\xbb\xbf";

/// Follows what a client gets of an event stream.
#[derive(Debug)]
pub struct SseKeepalive {
    every: Duration,
    /// When something was last sent.
    last: Instant,
    /// The last bytes that were sent; zeros before.
    end: [u8; 4],
    /// Nothing was sent.
    is_new: bool,
    /// After a comment at the beginning: how much of a byte order mark the endpoint has sent, which is left out.
    mark: Option<usize>,
}

impl SseKeepalive {
    /// For a response with this head; `None` if comments cannot be put into its body.
    pub fn of(every: Option<Duration>, head: &ResponseHead) -> Option<Self> {
        let is_open = matches!(head.body, BodyKind::Chunked | BodyKind::UntilClose);
        let fits =
            head.upgrade.is_none() && is_open && media::is_events(&head.headers) && !media::is_coded(&head.headers);
        let every = every.filter(|_| fits)?;
        Some(Self { every, last: Instant::now(), end: [0; 4], is_new: true, mark: None })
    }

    /// A comment is sent.
    pub fn commented(&mut self) {
        if self.is_new {
            self.mark = Some(0);
        }
        self.sent(COMMENT);
    }

    /// Takes the endpoint's next bytes, and returns those to send: without a byte order mark that a comment has come before. There it
    /// would be a part of the first event.
    pub fn take(&mut self, data: Bytes) -> Bytes {
        let Some(seen) = self.mark else { return data };
        let rest = &MARK[seen..];
        let same = data.iter().zip(rest).take_while(|(byte, expected)| byte == expected).count();
        if same == rest.len() {
            self.mark = None;
            return data.slice(same..);
        }
        if same == data.len() {
            self.mark = Some(seen + same);
            return Bytes::new();
        }
        self.mark = None;
        if seen == 0 { data } else { [&MARK[..seen], &data].concat().into() }
    }

    /// The beginning of a byte order mark that did not come to its end.
    pub fn rest(&mut self) -> Bytes {
        Bytes::from_static(&MARK[..self.mark.take().unwrap_or_default()])
    }

    /// These bytes were sent to the client.
    pub fn sent(&mut self, bytes: &[u8]) {
        self.last = Instant::now();
        for &byte in &bytes[bytes.len().saturating_sub(self.end.len())..] {
            self.end.rotate_left(1);
            self.end[3] = byte;
            self.is_new = false;
        }
    }

    /// Whether the last byte ended an event. A line may also end with CR, but LF could follow it.
    fn is_between_events(&self) -> bool {
        self.is_new || self.end.ends_with(b"\n\n") || self.end == *b"\r\n\r\n"
    }

    /// Resolves when the client has got nothing for the time, with a comment; never inside an event.
    pub async fn due(&self) -> Bytes {
        if !self.is_between_events() {
            std::future::pending::<()>().await;
        }
        sleep_until(self.last + self.every).await;
        Bytes::from_static(COMMENT)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn new() -> SseKeepalive {
        SseKeepalive { every: Duration::from_secs(1), last: Instant::now(), end: [0; 4], is_new: true, mark: None }
    }

    #[test]
    fn comments_go_between_whole_events() {
        for (sent, expected) in [
            ("", true),
            ("data: a\n\n", true),
            ("data: a\r\n\r\n", true),
            ("\n", false),
            ("data: a", false),
            ("data: a\n", false),
            ("data: a\r\n", false),
            ("data: a\n\r\n", false),
            ("data: a\r\r", false),
            ("data: a\n\ndata: b", false),
            (":\n\n", true),
        ] {
            // Whole, and byte by byte.
            let (mut whole, mut parts) = (new(), new());
            whole.sent(sent.as_bytes());
            sent.bytes().for_each(|byte| parts.sent(&[byte]));
            assert_eq!((whole.is_between_events(), parts.is_between_events()), (expected, expected), "{sent:?}");
        }
    }

    #[test]
    fn byte_order_mark_after_a_comment_is_left_out() {
        for (sent, expected) in [
            (&b"\xef\xbb\xbfdata: a\n\n"[..], &b"data: a\n\n"[..]),
            (b"\xef\xbb\xbf\xef\xbb\xbfdata", b"\xef\xbb\xbfdata"),
            (b"\xef\xbbdata", b"\xef\xbbdata"),
            (b"data: \xef\xbb\xbf", b"data: \xef\xbb\xbf"),
            (b"\xef\xbb", b"\xef\xbb"),
            (b"", b""),
        ] {
            for piece in 1..=sent.len().max(1) {
                let (mut commented, mut plain) = (new(), new());
                commented.commented();
                let (mut with, mut without) = (Vec::new(), Vec::new());
                for piece in sent.chunks(piece) {
                    with.extend_from_slice(&commented.take(Bytes::copy_from_slice(piece)));
                    without.extend_from_slice(&plain.take(Bytes::copy_from_slice(piece)));
                }
                with.extend_from_slice(&commented.rest());
                without.extend_from_slice(&plain.rest());
                assert_eq!((&with[..], &without[..]), (expected, sent), "in pieces of {piece}");
                // A later comment changes nothing.
                commented.commented();
                assert_eq!(&commented.take(Bytes::from_static(MARK))[..], MARK);
            }
        }
    }

    #[tokio::test(start_paused = true)]
    async fn comment_is_due_after_the_time_without_a_byte() {
        let mut keepalive = new();
        let begin = Instant::now();
        tokio::time::sleep(Duration::from_millis(700)).await;
        keepalive.sent(b"data: a\n\n");
        assert_eq!(keepalive.due().await, COMMENT);
        assert_eq!(begin.elapsed(), Duration::from_millis(1700));
        keepalive.sent(b"data");
        assert!(tokio::time::timeout(Duration::from_secs(3600), keepalive.due()).await.is_err());
    }
}
