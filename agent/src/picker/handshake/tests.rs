//! Tests of pings, with a paused clock that advances whenever the runtime is idle, and of replies that must not end a connection.

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

const HEADERS: u8 = 1;
const DATA: u8 = 0;
const END_STREAM: u8 = 1;
const END_HEADERS: u8 = 4;

fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let mut bytes = (payload.len() as u32).to_be_bytes()[1..].to_vec();
    bytes.extend([kind, flags]);
    bytes.extend(stream.to_be_bytes());
    bytes.extend_from_slice(payload);
    bytes
}

/// A connection to a server that answers each stream with these bytes.
async fn answered_by(answer: impl Fn(u32) -> Vec<u8> + Send + 'static) -> (Opened, oneshot::Receiver<bool>) {
    let (near, mut far) = tokio::io::duplex(64 << 10);
    let (over, is_over) = oneshot::channel();
    tokio::spawn(async move {
        far.write_all(&frame(SETTINGS, 0, 0, &[])).await?;
        far.read_exact(&mut [0; PREFACE]).await?;
        loop {
            let mut head = [0; 9];
            far.read_exact(&mut head).await?;
            let [a, b, c, kind, _, stream @ ..] = head;
            far.read_exact(&mut vec![0; u32::from_be_bytes([0, a, b, c]) as usize]).await?;
            if kind == HEADERS {
                far.write_all(&answer(u32::from_be_bytes(stream))).await?;
            }
        }
        #[allow(unreachable_code, reason = "tells the type of the error")]
        io::Result::Ok(())
    });
    let ended = |orderly| {
        let _ = over.send(orderly);
    };
    (open(near, ended).await.expect("a connection"), is_over)
}

/// The bytes of the body.
async fn ask(opened: &Opened) -> Result<usize, h2::Error> {
    let mut send = opened.send.clone().ready().await?;
    let request = http::Request::get("http://a/").body(()).expect("a request");
    let mut body = send.send_request(request, true)?.0.await?.into_body();
    let mut length = 0;
    while let Some(data) = body.data().await {
        length += data?.len();
    }
    Ok(length)
}

#[tokio::test]
async fn malformed_replies_never_end_the_connection() {
    // Less than the declared length.
    let wrong = |stream| frame(HEADERS, END_HEADERS | END_STREAM, stream, &[0x88, 0x5c, 1, b'5']);
    let (opened, mut is_over) = answered_by(wrong).await;
    for number in 0..1200 {
        let error = ask(&opened).await.expect_err("a malformed reply");
        assert!(error.is_reset(), "{number}: {error}");
    }
    assert!(is_over.try_recv().is_err(), "the connection ended");
}

#[tokio::test]
async fn empty_frames_within_replies_are_ignored() {
    let (opened, mut is_over) = answered_by(|stream| {
        let mut bytes = frame(HEADERS, END_HEADERS, stream, &[0x88]);
        for _ in 0..150 {
            bytes.extend(frame(DATA, 0, stream, &[]));
            bytes.extend(frame(DATA, 0, stream, b"xy"));
        }
        bytes.extend(frame(DATA, END_STREAM, stream, &[]));
        bytes
    })
    .await;
    for _ in 0..3 {
        assert_eq!(ask(&opened).await.expect("a reply"), 300);
    }
    assert!(is_over.try_recv().is_err(), "the connection ended");
}
