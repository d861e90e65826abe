//! What was written in response to each request: length and hash of the body on the wire, chunk framing included. A client that
//! sets
//! `x-request-id` can get the record at `GET /test/sent?ID` and compare it with what it received.
//!
//! Invariant: a byte is recorded before it is on the wire, so a client that has read the last byte finds it in the record.

use std::collections::VecDeque;

use serde::{Deserialize, Serialize};

use crate::content::Fnv;

use super::plan::Echo;

/// The number of requests kept; the oldest are evicted first.
const REMEMBERED: usize = 1024;

/// One exchange as the server saw it: the response to `/test/sent`. Hashes are FNV-1a.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Sent {
    pub id: String,
    /// The request's body without framing.
    pub request_length: u64,
    pub request_hash: u64,
    /// The response's body including framing.
    pub length: u64,
    pub hash: u64,
}

#[derive(Default)]
pub(super) struct Account(VecDeque<Sent>);

impl Account {
    pub(super) fn find(&self, id: &str) -> Option<&Sent> {
        self.0.iter().rev().find(|sent| sent.id == id)
    }

    fn note(&mut self, tally: &Tally) {
        let Some(sent) = self.0.iter_mut().rev().find(|sent| sent.id == tally.sent.id) else {
            self.0.push_back(tally.sent.clone());
            self.0.drain(..self.0.len().saturating_sub(REMEMBERED));
            return;
        };
        sent.clone_from(&tally.sent);
    }
}

/// Follows the bytes of one response.
pub(super) struct Tally {
    sent: Sent,
    hash: Fnv,
    /// The head so far; `None` in the body.
    head: Option<Vec<u8>>,
}

impl Tally {
    /// `None` for a request without an id.
    pub(super) fn of(request: &Echo) -> Option<Self> {
        let id = request.header("x-request-id")?.to_owned();
        let sent = Sent { id, request_length: request.body_length, request_hash: request.body_hash, ..Sent::default() };
        Some(Self { sent, hash: Fnv::default(), head: Some(Vec::new()) })
    }

    /// Records bytes that are about to be written.
    pub(super) fn writing(&mut self, mut bytes: &[u8], account: &mut Account) {
        while let Some(head) = &mut self.head {
            let seen = head.len();
            head.extend_from_slice(bytes);
            let Some(end) = head.windows(4).position(|end| end == b"\r\n\r\n") else { return };
            bytes = &bytes[end + 4 - seen..];
            let interim = head.starts_with(b"HTTP/1.1 1");
            self.head = interim.then(Vec::new);
        }
        self.hash.update(bytes);
        self.sent.length += bytes.len() as u64;
        self.sent.hash = self.hash.value();
        account.note(self);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn echo(id: &str) -> Echo {
        let headers = vec![("X-Request-Id".to_owned(), id.to_owned())];
        Echo { headers, body_length: 3, body_hash: 4, ..Echo::default() }
    }

    #[test]
    fn head_bytes_in_any_split_are_not_counted() {
        let wire = b"HTTP/1.1 103 Early Hints\r\n\r\nHTTP/1.1 200 OK\r\na: b\r\n\r\nbody\r\n\r\nmore";
        for size in 1..=wire.len() {
            let (mut account, mut tally) = (Account::default(), Tally::of(&echo("one")).unwrap());
            for piece in wire.chunks(size) {
                tally.writing(piece, &mut account);
            }
            let hash = Fnv::of(b"body\r\n\r\nmore").value();
            let expected = Sent { id: "one".to_owned(), request_length: 3, request_hash: 4, length: 12, hash };
            assert_eq!(account.find("one"), Some(&expected));
        }
    }

    #[test]
    fn oldest_entries_are_evicted() {
        let mut account = Account::default();
        for id in 0..=REMEMBERED {
            Tally::of(&echo(&id.to_string())).unwrap().writing(b"HTTP/1.1 200 OK\r\n\r\n", &mut account);
        }
        assert_eq!((account.find("0"), account.0.len()), (None, REMEMBERED));
        assert!(account.find("1").is_some() && Tally::of(&Echo::default()).is_none());
    }
}
