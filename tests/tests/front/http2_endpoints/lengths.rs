//! The `content-length` of HTTP/2 endpoints, with and without a body.

use std::sync::atomic::AtomicUsize;

use super::*;

/// What the client gets.
#[derive(Clone, Copy)]
enum Answer {
    Length(&'static str),
    /// The response without the field, or 502 if it has a body.
    WithoutLength,
    BadGateway,
}

/// What the endpoint declares.
const ROWS: [(&[&str], Answer); 6] = [
    (&["5"], Answer::Length("5")),
    (&["5", "5"], Answer::Length("5")),
    (&["5", "6"], Answer::BadGateway),
    (&["5, 5"], Answer::BadGateway),
    (&["x"], Answer::BadGateway),
    // The h2 crate reads it as 0.
    (&[""], Answer::WithoutLength),
];

/// Answers one request after another, on whichever connection, with these lengths.
async fn endpoint(method: &'static str, status: &'static str) -> std::net::SocketAddr {
    let next = Arc::<AtomicUsize>::default();
    scripted_endpoint(move |_, mut frames| {
        let next = Arc::clone(&next);
        async move {
            while let Some(head) = frames.find(|frame| frame.kind == kind::HEADERS).await? {
                let (lengths, _) = ROWS[next.fetch_add(1, Relaxed)];
                let lengths = lengths.iter().map(|length| ("content-length", *length));
                let fields: Vec<_> = [(":status", status)].into_iter().chain(lengths).collect();
                let has_body = method == "GET" && status == "200";
                frames.send(&Frame::headers(head.stream, !has_body, &fields)).await?;
                if has_body {
                    frames.send(&Frame::new(kind::DATA, END_STREAM, head.stream, *b"hello")).await?;
                }
            }
            Ok(())
        }
    })
    .await
}

#[tokio::test]
async fn one_length_is_passed_on_and_others_return_502() {
    for (method, status) in [("GET", "200"), ("HEAD", "200"), ("GET", "304")] {
        for over_http2 in [false, true] {
            let agent = agent(endpoint(method, status).await, |config| config.pools[0].ejection.failures = 0);
            for (lengths, answer) in ROWS {
                let request = Request::new(method, "/");
                let response = if over_http2 {
                    Http2Client::connect(agent.addr).await.unwrap().request(&request).await.unwrap()
                } else {
                    Client::connect(agent.addr).await.unwrap().request(&request).await.unwrap()
                };
                let what = format!("{method} {status} {lengths:?}, HTTP/2 {over_http2}");
                let has_body = method == "GET" && status == "200";
                let expected: &[&str] = match answer {
                    Answer::Length(length) => &[length],
                    Answer::WithoutLength if !has_body => &[],
                    Answer::WithoutLength | Answer::BadGateway => {
                        assert_eq!(response.status(), 502, "{what}");
                        continue;
                    }
                };
                let fields =
                    response.head.headers.iter().filter(|(name, _)| name.eq_ignore_ascii_case("content-length"));
                let found: Vec<&str> = fields.map(|(_, value)| value.as_str()).collect();
                assert_eq!((response.status().to_string().as_str(), &found[..]), (status, expected), "{what}");
                let body = if has_body { "hello" } else { "" };
                assert_eq!((response.read.end, response.text().as_str()), (BodyEnd::Complete, body), "{what}");
            }
        }
    }
}
