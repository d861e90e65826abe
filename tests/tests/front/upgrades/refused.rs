//! Which requests and responses switch: what the agent does not allow, what the endpoint refuses, and what nobody asked for.

use super::*;

/// An endpoint that does not switch answers with an ordinary response.
#[tokio::test]
async fn endpoint_refusal_is_forwarded_as_response() {
    let scene = scene(STEERED).await;
    let mut client = scene.client().await;
    for (status, framing) in [(200, Framing::ContentLength), (400, Framing::Chunked), (426, Framing::ContentLength)] {
        let plan = Plan { status, framing, size: 3000, ..Plan::default() };
        let response = client.request(&switch(&plan)).await.unwrap();
        assert_eq!((response.status(), response.read.end), (status, BodyEnd::Complete));
        plan.checker().feed(&response.body).unwrap();
        assert_eq!(response.header("connection"), None);
    }
    assert_eq!(client.request(&Request::get("/test/echo")).await.unwrap().status(), 200);
    assert_eq!(server(&scene).connections_accepted(), 1);
}

/// The body is sent first, framed as a body.
#[tokio::test]
async fn request_with_body_switches_after_body() {
    let scene = scene(STEERED).await;
    let body = json("m", 50_000);
    let request = |plan: &Plan| {
        Request::post("/test/upgrade", body.clone())
            .header("connection", "upgrade")
            .header("upgrade", "websocket")
            .header("x-test-plan", plan.header())
    };
    let plan = Plan::switching("websocket", Upgraded::Echo);
    let (mut client, early) = Switched::new(&scene, &request(&plan), b"first bytes").await;
    client.send(b", and later").await;
    client.to.shutdown().await.unwrap();
    assert_eq!([early, client.rest().await.0].concat(), b"first bytes, and later");
    let seen = server(&scene).seen().pop().unwrap();
    assert_eq!((seen.body_length, seen.body_hash), (body.len() as u64, Fnv::of(&body).value()));
    assert_eq!(seen.body_framing, "content-length");
}

fn upgrade_fields(seen: &Echo) -> (Option<&str>, Option<&str>) {
    (seen.header("connection"), seen.header("upgrade"))
}

/// An invalid upgrade, or one to a protocol that the agent does not allow, does not reach the endpoint.
#[tokio::test]
async fn disallowed_upgrades_are_not_forwarded() {
    let allowed = |config: &mut Config| config.listen.upgrades = vec!["websocket".to_owned(), "x-own".to_owned()];
    let scene = Scene::with(Front::Http1, Back::Http1, first, allowed).await;
    let rows = [
        "GET /test/echo HTTP/1.0\r\nconnection: upgrade\r\nupgrade: websocket\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nupgrade: websocket\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade, http2-settings\r\nupgrade: h2c\r\nhttp2-settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: TLS/1.0\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: TLS/1.0, h2c\r\nupgrade: websocket/13\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: \r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: , ,\r\n\r\n",
    ];
    for wire in rows {
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        client.send_raw(wire.as_bytes()).await.unwrap();
        let seen = client.response().await.unwrap().echoed();
        assert_eq!(upgrade_fields(&seen), (None, None), "{wire}");
        assert_eq!(seen.header("http2-settings"), None, "{wire}");
    }
    // Case is insignificant, and Connection may list other options.
    for (upgrade, connection) in [("WebSocket", "keep-alive, Upgrade"), ("x-own", "UPGRADE")] {
        let request = Request::get("/test/echo").header("connection", connection).header("upgrade", upgrade);
        let seen = scene.request(&request).await.echoed();
        assert_eq!(upgrade_fields(&seen), (Some("upgrade"), Some(upgrade)));
    }
}

/// A client may offer several protocols (RFC 9110 §7.8): the endpoint gets those that are allowed, in the client's order, and may
/// switch to any of them, and to no other.
#[tokio::test]
async fn allowed_protocols_of_a_list_are_offered() {
    let allowed = |config: &mut Config| config.listen.upgrades = vec!["x-own".to_owned(), "websocket".to_owned()];
    let scene = Scene::with(Front::Http1, Back::Http1, first, allowed).await;
    let offers = |path: &str, lines: &[&str]| {
        let offers = Request::get(path).header("connection", "keep-alive").header("connection", "upgrade");
        lines.iter().fold(offers, |request, line| request.header("upgrade", *line))
    };
    let rows: [(&[&str], &str); 5] = [
        (&["websocket, h2c"], "websocket"),
        (&["websocket", "h2c"], "websocket"),
        (&["TLS/1.0,, X-Own ,websocket"], "X-Own, websocket"),
        (&["websocket", "h2c, x-own", "websocket/13"], "websocket, x-own"),
        (&["", "websocket,"], "websocket"),
    ];
    for (lines, expected) in rows {
        let seen = scene.request(&offers("/test/echo", lines)).await.echoed();
        assert_eq!(upgrade_fields(&seen), (Some("upgrade"), Some(expected)), "{lines:?}");
    }
    let lines = ["h2c, websocket", "x-own"];
    for (switched, status) in [("websocket", 101), ("X-OWN", 101), ("websocket, x-own", 101), ("h2c", 502)] {
        let plan = Plan::switching(switched, Upgraded::Echo);
        let mut client = Client::connect(scene.agent.addr).await.unwrap();
        let request = offers("/test/upgrade", &lines).header("x-test-plan", plan.header());
        client.send_raw(&request.wire("agent")).await.unwrap();
        let head = client.head().await.unwrap();
        let named = (status == 101).then_some(switched);
        assert_eq!((head.status, head.header("upgrade")), (status, named), "{head:?}");
    }
}

/// 426 names the protocols that the endpoint requires (RFC 9110 §15.5.22). Other responses name none, and neither does one over
/// HTTP/2 or to HTTP/1.0.
#[tokio::test]
async fn upgrade_required_names_its_protocols() {
    let upgrade = |status, lines: &[&str]| Plan {
        status,
        size: 100,
        headers: lines.iter().map(|line| ("upgrade".to_owned(), (*line).to_owned())).collect(),
        ..Plan::default()
    };
    let echo = |plan: &Plan| Request::get("/test/echo").header("x-test-plan", plan.header());
    for front in [Front::Http1, Front::Tls1, Front::Http2] {
        let scene = Scene::with(front, Back::Http1, first, |_| {}).await;
        for (status, lines, expected) in [
            (426, &["websocket"][..], Some("websocket")),
            (426, &["TLS/1.2", "websocket, x-own"], Some("TLS/1.2, websocket, x-own")),
            (426, &[], None),
            (200, &["websocket"], None),
        ] {
            let plan = upgrade(status, lines);
            let response = scene.request(&echo(&plan)).await;
            let named = (response.header("connection"), response.header("upgrade"));
            let expected = expected.filter(|_| front != Front::Http2);
            assert_eq!((response.status(), named), (status, (expected.map(|_| "upgrade"), expected)), "{lines:?}");
            plan.checker().feed(&response.body).unwrap();
        }
        if front == Front::Http1 {
            let plan = upgrade(426, &["websocket"]).header();
            let mut client = Client::connect(scene.agent.addr).await.unwrap();
            client
                .send_raw(format!("GET /test/echo HTTP/1.0\r\nx-test-plan: {plan}\r\n\r\n").as_bytes())
                .await
                .unwrap();
            let response = client.response().await.unwrap();
            assert_eq!((response.status(), response.header("upgrade")), (426, None));
        }
    }
}

/// A switch is accepted only if the client requested it.
#[tokio::test]
async fn unrequested_switch_returns_502() {
    let scene = scene(STEERED).await;
    let websocket = Plan::switching("websocket", Upgraded::Echo);
    let other = Plan::switching("x-other", Upgraded::Echo);
    let both = Plan::switching("websocket, x-other", Upgraded::Echo);
    let none = Plan { headers: Vec::new(), ..websocket.clone() };
    let plain = |plan: &Plan| Request::get("/test/upgrade").header("x-test-plan", plan.header());
    let h2c = plain(&Plan::switching("h2c", Upgraded::Echo)).header("connection", "upgrade").header("upgrade", "h2c");
    let rows = [plain(&websocket), plain(&other), h2c, switch(&other), switch(&both), switch(&none)];
    for (number, request) in (1..).zip(rows) {
        let response = scene.request(&request).await;
        assert_eq!((response.status(), response.error_code().as_str()), (502, "bad_response"), "{request:?}");
        eventually(SOON, || server(&scene).received().len() == number).await;
        eventually(SOON, || server(&scene).connections_open() == 0).await;
    }
    assert_eq!(scene.request(&Request::get("/test/echo")).await.status(), 200);
}

/// HTTP/2 endpoints cannot switch and get no upgrade request.
#[tokio::test]
async fn http2_endpoint_gets_no_upgrade() {
    let scene = Scene::with(Front::Http1, Back::Http2, first, |_| {}).await;
    let request = Request::get("/test/echo").header("connection", "upgrade").header("upgrade", "websocket");
    let seen = scene.request(&request).await.echoed();
    assert_eq!(upgrade_fields(&seen), (None, None));
}
