//! Requests that two readers might cut differently: the endpoint sees one request or none, and never the one hidden inside.

use penstock_tests::content::Fnv;

use crate::setting::{Setting, post};

/// Requests with a second one inside: refused.
#[tokio::test]
async fn what_is_ambiguous_is_not_forwarded() {
    let hidden = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
    let encoding = "transfer-encoding: chunked\r\n";
    let length = |n: usize| format!("content-length: {n}\r\n");
    let after_last = format!("0\r\n\r\n{hidden}");
    let in_chunk = format!("{:x}\r\n{hidden}\r\n0\r\n\r\n", hidden.len());
    let heads = [
        // The fields' order, case and repetition.
        length(after_last.len()) + encoding,
        encoding.to_owned() + &length(4),
        length(0) + "Transfer-Encoding: Chunked\r\n",
        length(0) + &length(hidden.len()),
        length(hidden.len()) + &length(0),
        format!("content-length: 0, {}\r\n", hidden.len()),
        // Transfer-Encoding that one reader takes and another does not.
        "transfer-encoding: xchunked\r\n".to_owned() + &length(4),
        "transfer-encoding : chunked\r\n".to_owned() + &length(4),
        "transfer-encoding: chunked\x0b\r\n".to_owned() + &length(4),
        "transfer-encoding:\x0bchunked\r\n".to_owned() + &length(4),
        "transfer-encoding: chunked\r\ntransfer-encoding: x\r\n".to_owned(),
        "transfer-encoding: x\r\ntransfer-encoding: chunked\r\n".to_owned(),
        "transfer-encoding: chunked, identity\r\n".to_owned(),
        "x: y\ntransfer-encoding: chunked\r\n".to_owned() + &length(4),
        "x: y\rtransfer-encoding: chunked\r\n".to_owned() + &length(4),
        "x: y\r\n transfer-encoding: chunked\r\n".to_owned() + &length(4),
        " transfer-encoding: chunked\r\n".to_owned() + &length(4),
        "x: \0\r\n".to_owned() + &length(4),
        // Lengths that overflow to something small.
        "content-length: 18446744073709551616\r\n".to_owned(),
        "content-length: -0\r\n".to_owned(),
        "content-length: 0_4\r\n".to_owned(),
    ];
    let mut wires: Vec<Vec<u8>> = Vec::new();
    for head in &heads {
        wires.extend([post(head, &after_last), post(head, &in_chunk), post(head, hidden)]);
    }
    for body in [
        format!("0\n\n{hidden}"),
        format!("5\r\nhello0\r\n\r\n{hidden}"),
        format!("2;\n\r\n{hidden}\r\n0\r\n\r\n"),
        format!("10000000000000000\r\n\r\n{hidden}"),
        format!("0x0\r\n\r\n{hidden}"),
        format!("0\r\nx: y\n\n{hidden}"),
    ] {
        wires.push(post(encoding, body));
    }
    let mut setting = Setting::start(|_| {}).await;
    for wire in wires {
        let before = setting.reached();
        let (response, mut client) = setting.answer(&wire).await;
        let status = response.status();
        assert!(matches!(status, 400 | 413 | 501), "{status} for {}", wire.escape_ascii());
        crate::setting::closed(&mut client).await;
        assert_eq!(setting.reached(), before, "{}", wire.escape_ascii());
    }
    setting.unharmed().await;
    assert!(setting.server.seen().iter().all(|seen| seen.target == "/test/body"));
}

/// Requests whose body looks like another: one request, with its body.
#[tokio::test]
async fn what_only_looks_ambiguous_is_one_request() {
    let hidden = "GET /smuggled HTTP/1.1\r\nhost: x\r\n\r\n";
    let last = format!("0\r\n\r\n{hidden}");
    let (n, m) = (hidden.len(), last.len());
    let chunk = |extension: &str, trailer: &str| format!("{m:x}{extension}\r\n{last}\r\n0\r\n{trailer}\r\n");
    let encoding = "transfer-encoding: chunked\r\n";
    let rows = [
        (post(&format!("content-length: {n}\r\n"), hidden), hidden),
        (post(&format!("content-length: {m}\r\n"), &last), &last),
        (post(&format!("content-length: 00{m}\r\n"), &last), &last),
        (post(encoding, chunk("", "")), &last),
        (post(encoding, chunk(";a=\"0\"", "")), &last),
        (post(encoding, chunk("", "content-length: 0\r\ntransfer-encoding: x\r\n")), &last),
        (post("transfer-encoding: \tCHUNKED \r\n", chunk("", "")), &last),
        (post(&format!("connection: content-length, host\r\ncontent-length: {n}\r\n"), hidden), hidden),
        (post(&format!("connection: transfer-encoding\r\n{encoding}"), chunk("", "")), &last),
        (format!("GET /test/echo HTTP/1.1\r\nhost: x\r\ncontent-length: {n}\r\n\r\n{hidden}").into_bytes(), hidden),
    ];
    let mut setting = Setting::start(|_| {}).await;
    for (wire, body) in rows {
        let before = setting.server.requests();
        let (response, mut client) = setting.answer(&wire).await;
        assert_eq!(response.status(), 200, "{}", wire.escape_ascii());
        // The next request on the connection is read where it begins.
        client.send_raw(&post("x-last: 1\r\ncontent-length: 0\r\n", "")).await.unwrap();
        assert_eq!(client.response().await.unwrap().status(), 200);
        assert_eq!(setting.server.requests(), before + 2, "{}", wire.escape_ascii());
        let seen = &setting.server.seen()[before as usize..];
        assert_eq!(seen[0].target, "/test/echo");
        assert_eq!((seen[0].body_framing.as_str(), seen[0].body_length), ("content-length", body.len() as u64));
        assert_eq!(seen[0].body_hash, Fnv::of(body.as_bytes()).value());
        assert_eq!(seen[0].trailers, []);
        assert_eq!(seen[1].header("x-last"), Some("1"));
    }
    setting.unharmed().await;
    assert!(setting.server.seen().iter().all(|seen| seen.target != "/smuggled"));
}
