//! Writes the log to stderr through a queue that is bounded in bytes, on its own thread.
//!
//! Takes each event as one formatted line and never waits: a line that does not fit is dropped and counted. An event is
//! always one line without control characters and at most [`LINE`] bytes long.

pub mod filter;

use std::{
    io::{self, Write},
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed},
        mpsc,
    },
    time::Duration,
};

use tracing_subscriber::fmt::MakeWriter;

/// Maximum length of a line, in bytes.
pub const LINE: usize = 64 << 10;
/// How long the end of the process waits for the last lines to be written.
const FLUSH: Duration = Duration::from_secs(1);

/// Why a line was dropped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum DropReason {
    /// `--log-queue-bytes` of lines waited to be written.
    QueueFull,
    /// The line is longer than [`LINE`].
    TooLong,
    /// The output refused it.
    NotWritten,
}

impl DropReason {
    pub const ALL: [Self; 3] = [Self::QueueFull, Self::TooLong, Self::NotWritten];

    pub fn label(self) -> &'static str {
        match self {
            Self::QueueFull => "queue_full",
            Self::TooLong => "too_long",
            Self::NotWritten => "not_written",
        }
    }

    /// Lines that this process has dropped for this reason. A process has a single log, so the count is global.
    pub fn lines(self) -> u64 {
        DROPPED[self as usize].load(Relaxed)
    }

    fn count(self) {
        DROPPED[self as usize].fetch_add(1, Relaxed);
    }
}

static DROPPED: [AtomicU64; DropReason::ALL.len()] = [const { AtomicU64::new(0) }; DropReason::ALL.len()];

enum LogMessage {
    Line(Vec<u8>),
    /// Acknowledged once everything before it has been written.
    End(mpsc::Sender<()>),
}

/// The sending side of the queue. Clones share it.
#[derive(Clone)]
pub struct LogQueue {
    messages: mpsc::Sender<LogMessage>,
    /// Bytes in the queue.
    queued: Arc<AtomicUsize>,
    limit: usize,
    /// Whether lines contain the formatter's own escape sequences for colours.
    colours: bool,
}

/// Writes what is queued when dropped; waits at most `FLUSH`.
pub struct LogGuard(mpsc::Sender<LogMessage>);

impl Drop for LogGuard {
    fn drop(&mut self) {
        let (written, end) = mpsc::channel();
        if self.0.send(LogMessage::End(written)).is_ok() {
            let _ = end.recv_timeout(FLUSH);
        }
    }
}

/// Starts the thread that writes to `output`. At most `limit` bytes are queued.
pub fn start(output: impl Write + Send + 'static, limit: usize, colours: bool) -> io::Result<(LogQueue, LogGuard)> {
    let (messages, queue) = mpsc::channel();
    let queued = Arc::new(AtomicUsize::new(0));
    let theirs = Arc::clone(&queued);
    std::thread::Builder::new().name("penstock-log".to_owned()).spawn(move || run(output, &queue, &theirs))?;
    Ok((LogQueue { messages: messages.clone(), queued, limit, colours }, LogGuard(messages)))
}

fn run(output: impl Write, queue: &mpsc::Receiver<LogMessage>, queued: &AtomicUsize) {
    let mut output = io::BufWriter::with_capacity(LINE, output);
    while let Ok(first) = queue.recv() {
        let mut next = Some(first);
        while let Some(message) = next {
            match message {
                LogMessage::Line(line) => {
                    // A closed stderr cannot be reported anywhere else.
                    if output.write_all(&line).is_err() {
                        DropReason::NotWritten.count();
                    }
                    queued.fetch_sub(line.len(), Relaxed);
                }
                LogMessage::End(written) => {
                    let _ = output.flush();
                    let _ = written.send(());
                }
            }
            next = queue.try_recv().ok();
        }
        let _ = output.flush();
    }
}

impl LogQueue {
    fn put(&self, line: Vec<u8>) {
        let length = line.len();
        if self.queued.fetch_add(length, Relaxed) + length > self.limit {
            self.queued.fetch_sub(length, Relaxed);
            return DropReason::QueueFull.count();
        }
        let _ = self.messages.send(LogMessage::Line(line));
    }
}

impl<'q> MakeWriter<'q> for LogQueue {
    type Writer = LogEvent<'q>;

    fn make_writer(&'q self) -> LogEvent<'q> {
        LogEvent(self)
    }
}

/// Takes one event, which the formatter writes in one call.
pub struct LogEvent<'q>(&'q LogQueue);

impl Write for LogEvent<'_> {
    fn write(&mut self, event: &[u8]) -> io::Result<usize> {
        match line(event, self.0.colours) {
            Some(line) => self.0.put(line),
            None => DropReason::TooLong.count(),
        }
        Ok(event.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Formats the event as one line. Control characters and bidirectional controls become escapes that are valid in JSON.
fn line(event: &[u8], colours: bool) -> Option<Vec<u8>> {
    if event.len() > LINE {
        return None;
    }
    let text = String::from_utf8_lossy(event);
    let text = text.strip_suffix('\n').unwrap_or(&text);
    let mut line = Vec::with_capacity(event.len() + 1);
    for char in text.chars() {
        match char {
            '\n' => line.extend_from_slice(b"\\n"),
            '\r' => line.extend_from_slice(b"\\r"),
            '\t' => line.extend_from_slice(b"\\t"),
            // The formatter has escaped those inside fields.
            '\x1b' if colours => line.push(b'\x1b'),
            char if char.is_control() || is_bidi_control(char) => {
                line.extend_from_slice(format!("\\u{:04x}", u32::from(char)).as_bytes());
            }
            char => line.extend_from_slice(char.encode_utf8(&mut [0; 4]).as_bytes()),
        }
    }
    line.push(b'\n');
    Some(line)
}

/// Line separators and the controls of bidirectional text.
fn is_bidi_control(char: char) -> bool {
    matches!(char, '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}' | '\u{200e}' | '\u{200f}')
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc::{Receiver, Sender};

    use tracing_subscriber::layer::SubscriberExt as _;

    use super::*;

    /// Blocks writes until the gate opens, then passes them on.
    struct Gate(Receiver<()>, Sender<Vec<u8>>);

    impl Write for Gate {
        fn write(&mut self, buf: &[u8]) -> io::Result<usize> {
            let _ = self.0.recv();
            let _ = self.1.send(buf.to_vec());
            Ok(buf.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    /// What `log` writes through a queue of `limit` bytes whose reader starts only afterwards.
    fn written(limit: usize, json: bool, log: impl FnOnce()) -> String {
        let (open, gate) = mpsc::channel();
        let (out, chunks) = mpsc::channel();
        let (queue, guard) = start(Gate(gate, out), limit, false).unwrap();
        let layer = tracing_subscriber::fmt::layer().with_ansi(false).without_time();
        if json {
            let layer = layer.json().flatten_event(true).with_writer(queue);
            tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        } else {
            let layer = layer.with_writer(queue);
            tracing::subscriber::with_default(tracing_subscriber::registry().with(layer), log);
        }
        drop(open);
        drop(guard);
        String::from_utf8(chunks.iter().flatten().collect()).unwrap()
    }

    #[test]
    fn lines_beyond_the_queue_limit_are_dropped_and_counted() {
        let before = DropReason::QueueFull.lines();
        let line = "x".repeat(1000);
        let written = written(10_000, true, || (0..100).for_each(|_| tracing::info!(line)));
        // The writer may have taken some lines before the gate stopped it.
        assert!(written.len() <= 10_000 + LINE && written.lines().all(|one| one.contains(&line)), "{}", written.len());
        let lines = written.lines().count() as u64;
        assert!(lines < 100 && DropReason::QueueFull.lines() - before >= 100 - lines);
    }

    #[test]
    fn event_with_control_characters_stays_one_line() {
        let evil = "a\n2026-01-01 INFO forged\r\x1b[31m\u{7f}\u{85}\u{202e}\0";
        for json in [false, true] {
            let written = written(LINE, json, || tracing::warn!(error = %evil, "{evil}"));
            assert_eq!(written.matches('\n').count(), 1, "{written:?}");
            assert!(!written.trim_end().chars().any(char::is_control), "{written:?}");
            if json {
                let line: serde_json::Value = serde_json::from_str(&written).unwrap();
                assert_eq!(line["error"], evil);
            }
        }
    }

    #[test]
    fn event_longer_than_a_line_is_dropped_and_counted() {
        let before = DropReason::TooLong.lines();
        let written = written(1 << 20, true, || {
            tracing::info!(text = "y".repeat(LINE));
            tracing::info!("next");
        });
        assert!(written.lines().count() == 1 && written.contains("next"), "{written}");
        assert_eq!(DropReason::TooLong.lines() - before, 1);
    }
}
