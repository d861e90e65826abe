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
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket, h2c\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: websocket\r\nupgrade: h2c\r\n\r\n",
        "GET /test/echo HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\nupgrade: \r\n\r\n",
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
