//! Tests of pings, with a paused clock: it advances whenever the runtime is idle.

use parking_lot::Mutex;
use tokio::{
    io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream},
    time::Instant,
};

use super::*;

const SETTINGS: u8 = 4;
const PING_FRAME: u8 = 6;
const ACK: u8 = 1;
const PREFACE: usize = 24;
const HOUR: Duration = Duration::from_secs(3600);
/// Servers written in Go close connections that ping more often.
const ALLOWED: Duration = Duration::from_secs(300);

type Pings = Arc<Mutex<Vec<Instant>>>;

/// Sends SETTINGS, and an answer to each of the first `answers` pings. Notes when pings come.
async fn serve(mut io: DuplexStream, answers: usize, pings: Pings) -> io::Result<()> {
    io.write_all(&[0, 0, 0, SETTINGS, 0, 0, 0, 0, 0]).await?;
    io.read_exact(&mut [0; PREFACE]).await?;
    loop {
        let mut head = [0; 9];
        io.read_exact(&mut head).await?;
        let [a, b, c, kind, flags, ..] = head;
        let mut payload = vec![0; u32::from_be_bytes([0, a, b, c]) as usize];
        io.read_exact(&mut payload).await?;
        if kind != PING_FRAME || flags & ACK != 0 {
            continue;
        }
        let answered = pings.lock().len();
        pings.lock().push(Instant::now());
        if answered < answers {
            head[4] = ACK;
            io.write_all(&head).await?;
            io.write_all(&payload).await?;
        }
    }
}

async fn opened(answers: usize) -> (Opened, Pings, oneshot::Receiver<bool>) {
    let (near, far) = tokio::io::duplex(64 << 10);
    let (pings, (over, is_over)) = (Pings::default(), oneshot::channel());
    tokio::spawn(serve(far, answers, Arc::clone(&pings)));
    let ended = |orderly| {
        let _ = over.send(orderly);
    };
    (open(near, ended).await.expect("a connection"), pings, is_over)
}

#[tokio::test(start_paused = true)]
async fn pings_are_five_minutes_apart_and_only_with_streams() {
    let (opened, pings, mut is_over) = opened(usize::MAX).await;
    sleep(HOUR).await;
    assert!(pings.lock().is_empty(), "no stream is open");
    opened.streams.store(1, Ordering::Relaxed);
    let begin = Instant::now();
    sleep(HOUR).await;
    let came = std::mem::take(&mut *pings.lock());
    assert!(came.windows(2).all(|two| two[1] - two[0] > ALLOWED), "{came:?}");
    // Not fewer than necessary either.
    assert!(came[0] - begin < ALLOWED + Duration::from_secs(11), "{came:?}");
    assert!((11..=12).contains(&came.len()), "{came:?}");
    opened.streams.store(0, Ordering::Relaxed);
    sleep(HOUR).await;
    assert!(pings.lock().is_empty(), "no stream is open");
    assert!(is_over.try_recv().is_err(), "the connection ended");
}

#[tokio::test(start_paused = true)]
async fn unanswered_ping_ends_the_connection() {
    let (opened, pings, is_over) = opened(1).await;
    opened.streams.store(1, Ordering::Relaxed);
    let orderly = timeout(HOUR, is_over).await.expect("the connection did not end").expect("an end");
    assert!(!orderly);
    let pings = pings.lock().clone();
    assert_eq!(pings.len(), 2);
    let waited = pings[1].elapsed();
    assert!((19..=21).contains(&waited.as_secs()), "{waited:?}");
}
