//! Matches an EPP's answers about a response's body with the messages that it was sent, and says what goes out.
//!
//! EPPs answer in two ways: one answer for each message, empty if the message is unchanged (lwepp), or with a stream of pieces and an
//! end (GIE, llm-d), which may come only after the whole body was sent. Messages without an answer are kept, within a limit, so that
//! they can go out as they are if the EPP fails. Invariant: no byte goes out twice, and none is left out unless the EPP says so.

use std::{collections::VecDeque, sync::Arc};

use bytes::Bytes;
use penstock_proto::ext_proc::{BodyResponse, body_mutation::Mutation};

use crate::{
    abridge::{Difference, difference},
    budget::{Budget, Share},
    tee::data,
};

/// An EPP's answer to a message with a piece of a response's body.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Answer {
    /// The message is unchanged.
    Keep,
    /// This replaces the message; empty if it is dropped.
    Replace(Bytes),
    /// The next piece of the body, and whether it is the last one.
    Streamed(Bytes, bool),
    /// The whole body, in a reply to the head.
    Whole(Bytes),
    /// A body in a reply to the head that is not applied to the head: it came too late or exceeds the limits.
    WithoutHead,
}

impl Answer {
    pub fn of(reply: BodyResponse) -> Self {
        let mutation = reply.response.and_then(|common| common.body_mutation).and_then(|mutation| mutation.mutation);
        match mutation {
            None | Some(Mutation::ClearBody(false)) => Self::Keep,
            Some(Mutation::ClearBody(true)) => Self::Replace(Bytes::new()),
            Some(Mutation::Body(body)) => Self::Replace(body),
            Some(Mutation::StreamedResponse(piece)) => Self::Streamed(piece.body, piece.end_of_stream),
        }
    }
}

/// An answer that cannot be obeyed: what goes out would not be the body that the EPP means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum UnusableAnswer {
    /// A message is to go out unchanged, and its copy was dropped.
    CopyDropped,
    /// A piece of a body after messages were left unchanged to their end, or a whole body after an answer.
    Mixed,
    /// A body whose head is not applied.
    WithoutHead,
    /// The EPP replied to the trailers, and messages without an answer are not known.
    Unanswered,
}

/// Why the copy was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DroppedCopy {
    Limit,
    Memory,
}

#[derive(Debug)]
pub struct Returned {
    /// The messages without an answer, oldest first; `None` once the copy was dropped.
    copy: Option<VecDeque<Bytes>>,
    share: Share,
    /// Bytes in `copy`.
    bytes: usize,
    limit: usize,
    /// Messages sent, and answers to them.
    sent: u64,
    answered: u64,
    /// The last message was sent.
    all_sent: bool,
    /// Each answer so far was for one message, in order.
    matched: bool,
    /// Some message went out because of an answer of its own, and not of a stream of pieces.
    by_message: bool,
    /// A stream of pieces has begun.
    streamed: bool,
    done: bool,
}

impl Returned {
    /// Keeps up to `limit` bytes of messages without an answer, which count against `memory`.
    pub fn new(limit: usize, memory: &Arc<Budget>) -> Self {
        Self {
            copy: Some(VecDeque::new()),
            share: memory.share(),
            bytes: 0,
            limit,
            sent: 0,
            answered: 0,
            all_sent: false,
            matched: true,
            by_message: false,
            streamed: false,
            done: false,
        }
    }

    /// A message is sent. Returns why the copy was dropped, if it was dropped now.
    pub fn sent(&mut self, message: &Bytes, end: bool) -> Option<DroppedCopy> {
        self.sent += 1;
        self.all_sent |= end;
        let copy = self.copy.as_mut()?;
        let dropped = if self.bytes + message.len() > self.limit {
            DroppedCopy::Limit
        } else if self.share.grow(message.len() as u64) {
            self.bytes += message.len();
            copy.push_back(message.clone());
            return None;
        } else {
            DroppedCopy::Memory
        };
        self.drop_copy();
        Some(dropped)
    }

    /// Takes an answer. Returns what goes out, which may be empty.
    pub fn answer(&mut self, answer: Answer) -> Result<Bytes, UnusableAnswer> {
        // Envoy repeats the end of a large body, and EPPs may do the same.
        if self.done {
            return Ok(Bytes::new());
        }
        let is_owed = self.answered < self.sent;
        let out = match answer {
            // An answer to nothing.
            Answer::Keep | Answer::Replace(_) if !is_owed || !self.matched => Bytes::new(),
            Answer::Keep => {
                self.by_message = true;
                if self.copy.is_none() {
                    return Err(UnusableAnswer::CopyDropped);
                }
                self.next().unwrap_or_default()
            }
            Answer::Replace(body) => {
                self.by_message = true;
                self.next();
                body
            }
            Answer::WithoutHead => return Err(UnusableAnswer::WithoutHead),
            Answer::Whole(_) if self.answered > 0 => return Err(UnusableAnswer::Mixed),
            Answer::Whole(body) => {
                self.drop_copy();
                self.done = true;
                return Ok(body);
            }
            Answer::Streamed(body, end) => {
                self.streamed = true;
                if self.by_message && !is_owed && !body.is_empty() {
                    return Err(UnusableAnswer::Mixed);
                }
                let message = if is_owed { self.next() } else { None };
                self.matched &= message.is_some_and(|message| is_answer_to(&message, &body));
                self.done = end;
                body
            }
        };
        self.done |= self.by_message && self.all_sent && self.answered == self.sent;
        Ok(out)
    }

    /// Whether each message so far has an answer.
    pub fn is_answered(&self) -> bool {
        self.answered >= self.sent
    }

    /// Whether each message so far has an answer that is for it alone, or the EPP has ended the body.
    pub fn is_whole(&self) -> bool {
        self.done || self.matched && self.is_answered()
    }

    /// Whether everything that is to go out has been returned.
    pub fn is_done(&self) -> bool {
        self.done
    }

    /// The EPP replied to the trailers, so it says nothing more about the body. Returns what goes out unchanged.
    pub fn end(&mut self) -> Result<Vec<Bytes>, UnusableAnswer> {
        let is_whole = self.done || self.streamed || self.is_answered();
        self.done = true;
        if is_whole { Ok(Vec::new()) } else { self.rest().ok_or(UnusableAnswer::Unanswered) }
    }

    /// What has no answer, if it is known. The EPP answers no more.
    pub fn rest(&mut self) -> Option<Vec<Bytes>> {
        let copy = self.copy.take();
        self.drop_copy();
        copy.filter(|_| self.matched).map(Into::into)
    }

    fn drop_copy(&mut self) {
        self.copy = None;
        self.share.shrink(self.bytes as u64);
        self.bytes = 0;
    }

    /// The oldest message without an answer, which has one now. `None` if the copy was dropped.
    fn next(&mut self) -> Option<Bytes> {
        self.answered += 1;
        let message = self.copy.as_mut()?.pop_front()?;
        self.bytes -= message.len();
        self.share.shrink(message.len() as u64);
        Some(message)
    }
}

/// Whether `answer` is for this message alone: each line is the same, or has the same JSON but for the model's name. An EPP that
/// changes more may also have added or left out an event, which the number of lines does not tell.
fn is_answer_to(message: &[u8], answer: &[u8]) -> bool {
    let lines = |text| <[u8]>::split(text, |byte| *byte == b'\n');
    let is_same = |(sent, got)| {
        sent == got
            || matches!((data(sent), data(got)), (Some(sent), Some(got)) if difference(sent, got) != Difference::Other)
    };
    message == answer
        || lines(message).count() == lines(answer).count() && lines(message).zip(lines(answer)).all(is_same)
}

#[cfg(test)]
mod tests {
    use super::Answer::{Keep, Replace, Streamed};
    use super::*;

    fn returned() -> Returned {
        Returned::new(100, &Budget::unlimited())
    }

    fn text(text: &'static str) -> Bytes {
        Bytes::from_static(text.as_bytes())
    }

    fn streamed(piece: &'static str, end: bool) -> Answer {
        Streamed(text(piece), end)
    }

    /// Sends the messages, the last of which ends the body, and returns what goes out for the answers.
    fn out(messages: &[&'static str], answers: Vec<Answer>) -> (Result<String, UnusableAnswer>, Returned) {
        let mut returned = returned();
        for (number, message) in (1..).zip(messages) {
            assert_eq!(returned.sent(&text(message), number == messages.len()), None);
        }
        let all: Result<Vec<Bytes>, _> = answers.into_iter().map(|answer| returned.answer(answer)).collect();
        (all.map(|all| String::from_utf8(all.concat()).unwrap()), returned)
    }

    #[test]
    fn what_the_picker_returns_goes_out() {
        for (messages, answers, expected) in [
            (&["a", "b", ""][..], vec![Keep, Keep, Keep], "ab"),
            (&["a", "b", ""], vec![Keep, Replace(text("xyz")), Keep], "axyz"),
            (&["a", "b", ""], vec![Replace(Bytes::new()), Keep, Keep], "b"),
            (&["a", "b", ""], vec![streamed("whole", true)], "whole"),
            (
                &["a", "b", ""],
                vec![streamed("1", false), streamed("2", false), streamed("3", false), streamed("4", true)],
                "1234",
            ),
            (&["a", "b"], vec![streamed("a", false), streamed("b", true)], "ab"),
            // Answers to nothing, and after the end.
            (&["a"], vec![Keep, Keep, streamed("", true)], "a"),
            (&["a"], vec![streamed("x", true), streamed("x", true), Keep], "x"),
            (&["a", "b"], vec![streamed("x\ny", false), Keep, Keep, streamed("z", true)], "x\nyz"),
        ] {
            let (found, returned) = out(messages, answers);
            assert_eq!((found.as_deref(), returned.is_done()), (Ok(expected), true), "{messages:?}");
            assert!(returned.is_whole(), "{messages:?}");
        }
    }

    #[test]
    fn body_after_unchanged_messages_cannot_be_obeyed() {
        let (found, _) = out(&["a"], vec![Keep]);
        assert_eq!(found.as_deref(), Ok("a"));
        let mut returned = returned();
        returned.sent(&text("a"), false);
        returned.answer(Keep).unwrap();
        assert_eq!(returned.answer(streamed("a", false)), Err(UnusableAnswer::Mixed));
    }

    #[test]
    fn unanswered_messages_are_the_rest_if_answers_match() {
        for (answers, rest) in [
            (vec![], Some("a\nb\nc\n")),
            (vec![Keep], Some("b\nc\n")),
            (vec![Replace(text("other"))], Some("b\nc\n")),
            (vec![streamed("a\n", false), streamed("b\n", false)], Some("c\n")),
            // An event was added or left out, or too much was changed to tell.
            (vec![streamed(":\n", false), streamed("a\n", false)], None),
            (vec![streamed("b\n", false)], None),
            (vec![streamed("A\n", false)], None),
            // For two messages, or a part of one.
            (vec![streamed("a\nb\n", false)], None),
            (vec![streamed("a", false)], None),
            (vec![streamed("a\n", false), streamed("b\nc", false)], None),
        ] {
            let (_, mut returned) = out(&["a\n", "b\n", "c\n"], answers.clone());
            let found = returned.rest().map(|rest| rest.concat());
            assert_eq!(found.as_deref(), rest.map(str::as_bytes), "{answers:?}");
            assert!(!returned.is_whole(), "{answers:?}");
        }
        // The model's name was replaced, and the document written anew.
        let event = "data: {\"n\": 1, \"model\": \"a\"}\n\n";
        for (answer, rest) in
            [("data: {\"model\":\"b\",\"n\":1}\n\n", Some("next\n")), ("data: {\"model\":\"b\",\"n\":2}\n\n", None)]
        {
            let (_, mut returned) = out(&[event, "next\n"], vec![streamed(answer, false)]);
            assert_eq!(returned.rest().map(|rest| rest.concat()).as_deref(), rest.map(str::as_bytes), "{answer}");
        }
        // More pieces than messages.
        let (_, mut returned) = out(&["a"], vec![streamed("a", false), streamed("b", false)]);
        assert_eq!(returned.rest(), None);
    }

    /// The EPP has replied to the trailers.
    #[test]
    fn end_without_an_end_of_the_body_leaves_nothing_unanswered() {
        for (answers, rest) in [
            // Answers for each message: the others stay as they are.
            (vec![], Ok("abc")),
            (vec![Keep], Ok("bc")),
            (vec![Keep, Keep, Replace(text("x"))], Ok("")),
            // A stream of pieces is the whole body.
            (vec![streamed("x", false)], Ok("")),
            (vec![streamed("x", true)], Ok("")),
        ] {
            let (_, mut returned) = out(&["a", "b", "c"], answers.clone());
            let found = returned.end().map(|rest| String::from_utf8(rest.concat()).unwrap());
            assert_eq!(found.as_deref(), rest.as_ref().map(|rest| *rest), "{answers:?}");
            assert!(returned.is_done());
        }
        let mut returned = returned();
        returned.sent(&Bytes::from(vec![b'x'; 101]), false);
        assert_eq!(returned.end(), Err(UnusableAnswer::Unanswered));
    }

    #[test]
    fn whole_body_is_the_first_answer_or_none() {
        let (found, mut returned) = out(&["a"], vec![Answer::Whole(text("xyz")), streamed("b", true), Keep]);
        assert_eq!((found.as_deref(), returned.is_done(), returned.rest()), (Ok("xyz"), true, None));
        let (found, _) = out(&["a"], vec![Keep, Answer::Whole(text("xyz"))]);
        assert_eq!(found.as_deref(), Ok("a"), "the only message was answered");
        let (found, _) = out(&["a", "b"], vec![Keep, Answer::Whole(text("xyz"))]);
        assert_eq!(found, Err(UnusableAnswer::Mixed));
    }

    #[test]
    fn body_without_its_head_cannot_be_obeyed() {
        for before in [vec![], vec![Keep]] {
            let (found, _) = out(&["a", "b"], [before, vec![Answer::WithoutHead]].concat());
            assert_eq!(found, Err(UnusableAnswer::WithoutHead));
        }
        let (found, _) = out(&["a"], vec![streamed("whole", true), Answer::WithoutHead]);
        assert_eq!(found.as_deref(), Ok("whole"), "the body has ended");
    }

    #[test]
    fn copy_beyond_a_bound_is_dropped_and_the_body_is_not() {
        let budget = Budget::new(60, prometheus_client::metrics::gauge::Gauge::default());
        for (limit, dropped) in [(50, DroppedCopy::Limit), (100, DroppedCopy::Memory)] {
            let mut returned = Returned::new(limit, &budget);
            assert_eq!(returned.sent(&Bytes::from(vec![b'x'; 40]), false), None);
            assert_eq!(returned.sent(&Bytes::from(vec![b'x'; 30]), false), Some(dropped));
            assert!(budget.share().grow(60), "the copy still counts");
            assert_eq!(returned.sent(&text("y"), true), None);
            assert_eq!(returned.answer(streamed("a", false)), Ok(text("a")));
            assert_eq!(returned.answer(streamed("b", true)), Ok(text("b")));
            assert_eq!((returned.is_done(), returned.rest()), (true, None));
        }
        let mut returned = Returned::new(5, &budget);
        assert_eq!(returned.sent(&text("too long"), true), Some(DroppedCopy::Limit));
        assert_eq!(returned.answer(Keep), Err(UnusableAnswer::CopyDropped));
        // What is answered makes room.
        let mut returned = Returned::new(50, &budget);
        for _ in 0..10 {
            assert_eq!(returned.sent(&Bytes::from(vec![b'x'; 40]), false), None);
            assert_eq!(returned.answer(Keep).unwrap().len(), 40);
        }
    }
}
